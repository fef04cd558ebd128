"""Exit codes, and the one exception that a user is shown."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

# What would break a line or control a terminal: C0, DEL, C1, line separators, marks that turn the
# direction of text, and half-characters of file names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class ExitCode(IntEnum):
    """The exit code of the process: one number per kind of error, so that scripts can act on it."""

    DONE = 0
    CHECK_FAILED = 1
    FLAGS = 2
    TEXT = 3
    DATA = 4
    CHECKPOINT = 5
    STORAGE = 6
    LOCKED = 7
    OUT_OF_MEMORY = 8
    DIVERGED = 9
    WORKER_LOST = 10
    INTERNAL = 70
    SIGINT = 130
    SIGPIPE = 141
    SIGTERM = 143


class PreflightError(Exception):
    """An error that the user can act on: at most five lines and an exit code, never a traceback.

    ``lines`` say, in this order, what happened and where, what was expected and found, what was
    kept, and the command to continue with.
    """

    MAX_LINES = 5

    def __init__(self, code: ExitCode, *lines: str) -> None:
        self.code = code
        lines = tuple(_UNPRINTABLE.sub(lambda m: repr(m[0])[1:-1], line) for line in lines)
        self.lines = list(lines[: self.MAX_LINES - 1])
        if len(lines) >= self.MAX_LINES:
            self.lines.append("; ".join(lines[self.MAX_LINES - 1 :]))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """So that a worker process can send it to its parent."""
        return type(self), (self.code, *self.lines)
