"""Signals as flags: a handler only records the signal; the loops read the flag and stop cleanly.

The first SIGINT, SIGTERM or SIGHUP: finish the step, save, exit. A second SIGINT: exit at once,
without saving. SIGUSR1: save a checkpoint and continue. A signal that whoever started the process
has set to be ignored stays ignored, as SIGHUP does under ``nohup``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from preflight.core.errors import ExitCode, PreflightError

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP and no SIGUSR1


class StopFlag:
    """Records signals while it is entered as a context; on exit the old handlers return."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.save_requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for name in (*_STOPPING, "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                handler = self._note_save if name == "SIGUSR1" else self._note_stop
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            _tell(b"\npreflight: stopped without saving; earlier checkpoints are intact\n")
            os._exit(int(ExitCode.SIGINT))
        self.received = number
        _tell(b"\npreflight: stopping (press Ctrl-C again to stop at once)\n")

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    @property
    def stopping(self) -> bool:
        """Whether a signal asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> ExitCode:
        """130 after SIGINT, 143 after SIGTERM and SIGHUP, else 0."""
        if self.received is None:
            return ExitCode.DONE
        return ExitCode.SIGINT if self.received == signal.SIGINT else ExitCode.SIGTERM

    def agree(self) -> bool:
        """Whether to stop; here several processes tell each other of their signals."""
        return self.stopping

    def leave_if_stopping(self, *lines: str) -> None:
        """Raise the `PreflightError` that ends the process with the signal's code.

        Raises:
            PreflightError: code SIGINT or SIGTERM, with `lines`, when a signal has come.
        """
        if self.stopping:
            raise PreflightError(self.exit_code, *lines)


@contextlib.contextmanager
def leave_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, while nothing that it does needs an end of its own.

    For the import of libraries: an exception in the middle of torch's own start-up aborts the
    process, and in other places it is swallowed, or printed as a traceback.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        _tell(b"\npreflight: stopped\n")
        os._exit(int(ExitCode.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or the caller's own
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(line: bytes) -> None:
    # os.write, because the signal may have interrupted a write to sys.stderr itself.
    # No stderr, a closed one, or a terminal that has gone: the message is lost.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.write(sys.stderr.fileno(), line)
