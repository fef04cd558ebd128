"""Child processes that end with their parent and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess


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


def start_shielded(process: BaseProcess) -> None:
    """Start a child that does not receive Ctrl-C; the parent does, and ends the child.

    SIGINT is blocked while the child starts, since a child inherits the signal mask.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        process.start()
        return
    # Python starts this helper with the first child, and unblocks SIGINT when it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
