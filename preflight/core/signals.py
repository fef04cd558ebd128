"""Signals as flags: a handler only notes what came; the loops look at the note and leave cleanly.

First SIGINT, SIGTERM or SIGHUP: finish the step, save, leave. A second SIGINT: leave at once,
without saving. SIGUSR1: save now and go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

from preflight.core.errors import ExitCode, PreflightError

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP and no SIGUSR1


class StopFlag:
    """Catches signals while it is entered as a context; outside of it nothing changes."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.save_requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for name in (*_STOPPING, "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                handler = self._note_save if name == "SIGUSR1" else self._note_stop
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            self._tell(b"\npreflight: stopped at once; what was saved before is intact\n")
            os._exit(int(ExitCode.SIGINT))
        self.received = number
        self._tell(b"\npreflight: stopping after this step (Ctrl-C again: at once)\n")

    def _tell(self, line: bytes) -> None:
        # sys.stderr may be in the middle of a write; os.write is safe in a handler.
        with contextlib.suppress(OSError):  # the terminal may be what has just gone
            os.write(2, line)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    @property
    def stopping(self) -> bool:
        """Whether a signal asked to leave."""
        return self.received is not None

    @property
    def exit_code(self) -> ExitCode:
        """130 after SIGINT, 143 after SIGTERM and SIGHUP, else 0."""
        if self.received is None:
            return ExitCode.DONE
        return ExitCode.SIGINT if self.received == signal.SIGINT else ExitCode.SIGTERM

    def leave_if_stopping(self, *lines: str) -> None:
        """Raise the `PreflightError` that ends the process with the signal's code.

        Raises:
            PreflightError: code SIGINT or SIGTERM, with `lines`, when a signal has come.
        """
        if self.stopping:
            sys.stderr.flush()
            raise PreflightError(self.exit_code, *lines)
