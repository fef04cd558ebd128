"""A child ends with its parent, and leaves its signals to it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from preflight.core.processes import end_with_parent, shield_children

# Not of conftest, which every child would import, and torch with it.
ROOT = Path(__file__).parents[2]
SPAWN = multiprocessing.get_context("spawn")


def _watch_and_sleep(folder: Path, exit_code: int, sender: Connection) -> None:
    end_with_parent(functools.partial((folder / "cleaned").touch), exit_code)
    sender.send(os.getpid())
    time.sleep(60)


def _fail() -> None:
    raise OSError("cleanup fails")


def _watch_with_bad_cleanup(folder: Path, exit_code: int, sender: Connection) -> None:
    sys.stderr = None  # type: ignore[assignment]  # the traceback of the thread
    end_with_parent(_fail, exit_code)
    sender.send(os.getpid())
    time.sleep(60)


def _start_child_and_sleep(target: str, folder: Path, sender: Connection) -> None:
    """The parent that is killed."""
    process = SPAWN.Process(target=globals()[target], args=(folder, 7, sender))
    process.start()
    time.sleep(60)


@pytest.mark.parametrize("target", ["_watch_and_sleep", "_watch_with_bad_cleanup"])
def test_a_killed_parent_takes_its_child_along(tmp_path: Path, target: str) -> None:
    receiver, sender = SPAWN.Pipe(duplex=False)
    parent = SPAWN.Process(target=_start_child_and_sleep, args=(target, tmp_path, sender))
    parent.start()
    assert receiver.poll(60)
    child = psutil.Process(receiver.recv())
    assert parent.pid == child.ppid()
    os.kill(child.pid, 0)
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert (tmp_path / "cleaned").exists() == (target == "_watch_and_sleep")


def test_a_process_without_a_parent_is_left_alone() -> None:
    called: list[bool] = []
    threads = psutil.Process().num_threads()
    end_with_parent(lambda: called.append(True))
    assert psutil.Process().num_threads() == threads
    assert called == []


SHIELDED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def _answer(sender: Connection) -> None:
    held = SPAWN.Lock()  # a killed process leaves it to the helper, which has nothing to say of it
    sender.send("started")
    time.sleep(60)
    held.release()


def _signal_two_children() -> None:
    """None of the signals ends the first child of a process or the second, at any moment."""
    for _ in range(2):
        receiver, sender = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_answer, args=(sender,))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with shield_children():
            process.start()
        sender.close()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before == set()
        try:
            assert process.pid is not None
            while not receiver.poll(0.002):  # from before its first line of Python on
                for number in SHIELDED:
                    os.kill(process.pid, number)
            assert receiver.recv() == "started"
            os.kill(process.pid, signal.SIGINT)
            process.join(0.3)
            assert process.is_alive()
        finally:
            process.kill()
            process.join()


if __name__ == "__main__":  # a process that has started no child yet
    _signal_two_children()


def test_signals_do_not_reach_a_shielded_child() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_parent_gets_what_came_while_a_child_started() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with shield_children():
            signal.raise_signal(signal.SIGUSR1)
            assert received == []
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
