"""A rank from its first line on: a process that the parent of a run on several ranks starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from preflight.core.errors import ExitCode
from preflight.core.processes import (
    die_with_parent,
    end_with_parent,
    shield_children,
)

_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = _ROOT / "main.py"


def start_rank(rank: int, words: list[str], environment: dict[str, str]) -> BaseProcess:
    """Start a rank with a command line, and with `environment` besides this one's.

    Signals wait until it calls `accept_signals`.
    """
    is_forked = sys.platform == "linux"  # elsewhere libraries do not bear a fork
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
    if is_forked:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preflight.modes.rank_imports"])
    arguments = (str(PROGRAM), words, os.environ | environment)
    process = context.Process(target=_run, args=arguments, name=f"rank {rank}")
    with shield_children(signal.SIGTERM), _finding_modules():
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
