"""Work in a process of its own, which reports, answers and ends.

When it ends, all its memory is free, so that one trial never disturbs the next, nor a run. If the
system kills a process that needs too much, it kills this one alone.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.processes import end_with_parent, shield_children
from preflight.core.signals import StopFlag
from preflight.core.units import format_seconds
from preflight.device.runtime import is_out_of_memory

MAX_SILENT_SECONDS, LOOK_SECONDS = 1800.0, 0.1
Report = Callable[[Any], None]
Work = Callable[[Report], Any]  # a function of a module, or a partial of one


@dataclass(frozen=True)
class LackOfMemory:
    """The answer of a child that needed too much memory."""

    reason: str


ALL_MEMORY_HELD = LackOfMemory("it held all the memory that was available")


@dataclass(frozen=True)
class ChildRules:
    """What a child is called, where it writes, and when it is given up.

    Attributes:
        name: for messages: ``the trial of batch size 8``.
        folder: temporary, made for the child and removed with it.
        hard_limit_bytes: resident memory at which it is killed, before the machine swaps.
        stop: after a signal it is killed.
        stopped: what is told then.
        advice: what is told when it is silent for too long.
        silent_seconds: how long that is; unset: `MAX_SILENT_SECONDS`.
    """

    name: str
    folder: Path
    hard_limit_bytes: int
    stop: StopFlag
    stopped: tuple[str, ...]
    advice: str = "run the same command again"
    silent_seconds: float | None = None


def serve(work: Work, folder: Path, answer: Connection) -> None:
    """What the child does: work, answer, end."""
    end_with_parent(functools.partial(_remove_folder, folder), int(ExitCode.WORKER_LOST))
    with contextlib.suppress(OSError):  # Linux: out of memory, the system kills us, not the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        answer.send(("answer", work(lambda message: answer.send(("message", message)))))
    except PreflightError as error:
        answer.send(("error", (error.code, error.lines)))
    except Exception as error:
        cause = error.__cause__ or error  # the device's own words, where a compiler wrapped them
        if is_out_of_memory(error) or is_out_of_memory(cause):
            answer.send(("answer", LackOfMemory(str(cause).strip()[:120] or "no reason given")))
        else:
            answer.send(("crash", traceback.format_exc()))


def _remove_folder(folder: Path) -> None:
    for _ in range(3):  # the main thread may be writing there
        shutil.rmtree(folder, ignore_errors=True)


def run_in_child(work: Work, rules: ChildRules, on_message: Report = lambda message: None) -> Any:
    """Do `work` in a new process; when this returns, the process and its files are gone.

    Args:
        work: takes a function that sends a message to this process, and returns the answer.
        rules: see `ChildRules`.
        on_message: is called here with every message.

    Returns:
        What `work` returned, or a `LackOfMemory`.

    Raises:
        PreflightError: what the child raised; code WORKER_LOST, when it ended without an answer or
            is silent; code SIGINT or SIGTERM after a signal.
    """
    child = None
    try:
        storage.make_own_folder(rules.folder)
        with shield_children():
            child = Child(work, rules.folder)
        kind, content = await_answer(child.receiver, child.process, rules, on_message)
    finally:
        if child is not None:
            child.end()
        storage.remove_tree(rules.folder)
    return conclude(kind, content, rules)


class Child:
    """A process that does some work, started at once.

    Attributes:
        process: which ends with this one.
        receiver: where its messages and its answer come.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=serve, args=(work, folder, sender))
        self.process.start()
        sender.close()

    def end(self) -> None:
        """Kill it and the processes that it started, and wait for it."""
        _kill(self.process)
        self.receiver.close()


def conclude(kind: str, content: Any, rules: ChildRules) -> Any:
    """What a child returned, by the kind and content of its last message.

    Raises:
        PreflightError: as `run_in_child`.
    """
    if kind == "error":
        raise PreflightError(content[0], *content[1])
    if kind == "crash":
        raise RuntimeError(f"{rules.name} failed:\n{content}")
    return content if kind == "answer" else _explain_end(content, rules)


def _explain_end(exit_status: int, rules: ChildRules) -> LackOfMemory:
    if exit_status in (-signal.SIGKILL, -signal.SIGABRT):
        return LackOfMemory(f"killed by the system (signal {-exit_status})")
    raise PreflightError(
        ExitCode.WORKER_LOST,
        f"{rules.name} ended without a result (exit status {exit_status})",
        "run the same command again",
    )


def await_answer(
    receiver: Connection, process: BaseProcess, rules: ChildRules, on_message: Report
) -> tuple[str, Any]:
    """The kind of the child's last message, and its content; ``end`` and its exit status without.

    Raises:
        PreflightError: code WORKER_LOST after a long silence; SIGINT or SIGTERM after a signal.
    """
    n_looks, longest = 0, rules.silent_seconds or MAX_SILENT_SECONDS
    # Looks are counted, since a clock runs on while a person has stopped both (Ctrl-Z).
    while n_looks < round(longest / LOOK_SECONDS):
        n_looks += 1
        rules.stop.leave_if_stopping(*rules.stopped)
        found = look(receiver, process, LOOK_SECONDS)
        if found is not None:
            kind, content = found
            if kind != "message":
                return kind, content
            on_message(content)
            n_looks = 0
        if measure_resident_bytes(process) > rules.hard_limit_bytes:
            return "answer", ALL_MEMORY_HELD
    raise silence_error(rules, longest)


def look(receiver: Connection, process: BaseProcess, seconds: float) -> tuple[str, Any] | None:
    """The kind and content of a child's next message, waiting so long; none has come: ``None``.

    Of a child that has ended that is ``end``, and its exit status.
    """
    if not receiver.poll(seconds):
        return None
    try:
        return receiver.recv()
    except (EOFError, ConnectionError):
        process.join()
        return "end", process.exitcode


def measure_resident_bytes(process: BaseProcess) -> int:
    """The resident memory of a process; none where it has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).memory_info().rss
    return 0


def silence_error(rules: ChildRules, seconds: float) -> PreflightError:
    """No child has said anything for so long."""
    return PreflightError(
        ExitCode.WORKER_LOST,
        f"{rules.name} gave no result in {format_seconds(seconds)}",
        rules.advice,
    )


def _kill(process: BaseProcess) -> None:
    """Kill a child and the processes that it started (a compiler's workers), and wait for it."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.close()
