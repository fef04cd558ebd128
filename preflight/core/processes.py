"""Child processes that end with their parent and leave its signals to it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

_SHIELDED = {getattr(signal, n) for n in ("SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)}
_SPINS = "2000"  # of a loop that pauses for 40 to 140 cycles each time
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # of <sys/prctl.h>


def end_with_parent(cleanup: Callable[[], None] | None = None, exit_code: int = 1) -> None:
    """End this process as soon as its parent has ended, even by SIGKILL.

    A thread waits for the parent. A process that multiprocessing did not start has no parent to
    wait for: then nothing happens.

    Args:
        cleanup: called first, in that thread, while the main thread still runs.
        exit_code: this process's exit code.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        try:
            parent.join()
            if cleanup is not None:
                cleanup()
        finally:
            os._exit(exit_code)  # the main thread may be in a call that never returns

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def die_with_parent() -> None:
    """On Linux: SIGKILL for this process as soon as the thread that started it has ended.

    A stopped process dies too, and one whose threads never get to run. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_tracker() -> None:
    """Start multiprocessing's helper that frees semaphores of killed processes, without a word.

    It outlives this process. By default it then tells of each semaphore in a warning, which would
    follow the last line that this process has told. It is started once.
    """
    sys.warnoptions.append("ignore:resource_tracker")  # is passed on to it
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def limit_spinning() -> None:
    """Let torch's waiting threads spin for about 0.1 ms and then sleep; to be called before torch
    is loaded. What the user has set in the environment stays.

    By default GNU's OpenMP spins for milliseconds, and one busy process beside a run makes its
    steps two to three times longer. With no spinning at all, threads on some virtual machines wake
    so slowly that a small model's steps take four times as long (benchmarks/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def name_process(name: str) -> None:
    """On Linux: the name of this process in ``top`` and ``ps``, of at most 15 letters."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def accept_signals() -> None:
    """Take the signals that `shield_children` has kept from this process, also those before."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_SHIELDED, signal.SIGTERM})


@contextlib.contextmanager
def shield_children(*also: int) -> Iterator[None]:
    """Child processes that start within never receive Ctrl-C, SIGHUP or SIGUSR1, nor `also`.

    A terminal and a batch system send these to all processes of a run. The parent acts on them,
    and ends its children. They are blocked while a child starts, since it inherits the signal mask
    and keeps it, so that there is no moment in which a child is not shielded. SIGTERM stays: with
    it a pool of processes ends its workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    shielded = {*_SHIELDED, *also}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
    try:
        # Python starts this helper with the first child, and unblocks SIGINT when it has.
        _start_tracker()
        signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
