"""A rank from its first line on: a process that the parent of a run on several ranks starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.processes import (
    die_with_parent,
    end_with_parent,
    shield_children,
)

_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = _ROOT / "main.py"
# What a killed process may need until the system says so.
_DEATH_SECONDS = 0.2


def start_rank(rank: int, words: list[str], environment: dict[str, str]) -> BaseProcess:
    """Start a rank with a command line, and with `environment` besides this one's.

    Signals wait until it calls `accept_signals`.

    Raises:
        PreflightError: code WORKER_LOST, when the process that forks ranks is killed twice.
    """
    arguments = (str(PROGRAM), words, os.environ | environment)
    for _ in range(2):
        try:
            with shield_children(signal.SIGTERM), _finding_modules():
                return _start(f"rank {rank}", arguments)
        except (EOFError, ConnectionError):  # then another one is started
            time.sleep(_DEATH_SECONDS)
    raise PreflightError(
        ExitCode.WORKER_LOST,
        "the process that starts ranks was killed twice",
        "checkpoints are kept; run the same command to continue",
    )


def _start(name: str, arguments: tuple[Any, ...]) -> BaseProcess:
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
    if sys.platform == "linux":  # elsewhere libraries do not bear a fork
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preflight.modes.rank_imports"])
    process = context.Process(target=_run, args=arguments, name=name)
    process.start()
    return process


@contextlib.contextmanager
def _finding_modules() -> Iterator[None]:
    """Let the fork server find the package: it does not get `sys.path` before Python 3.13."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(program: str, words: list[str], environment: dict[str, str]) -> None:
    die_with_parent()  # the fork server, which ends with its own
    end_with_parent(exit_code=int(ExitCode.WORKER_LOST))
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal reaches the parent alone
    # As in any other process: locks of the fork server's kind are reported when a rank is killed.
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")
