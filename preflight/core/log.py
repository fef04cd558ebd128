"""The one logger of the package, and its handler for the command line.

Modules write to `log`. A Python program that uses the package configures it as any other logger;
`main.py` calls `configure_logging`, which sends messages to stderr around a progress bar.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys

from tqdm import tqdm

LOG_LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("preflight")


class _StderrHandler(logging.Handler):
    """Writes above a progress bar. A closed or missing stderr loses the message, never the run."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError, ValueError):  # the reader has left, or it is closed
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)
            sys.stderr.flush()


def configure_logging(level: str) -> None:
    """Show messages of `level` (one of `LOG_LEVELS`) and above on stderr."""
    log.handlers = [_StderrHandler()]
    log.propagate = False
    log.setLevel(level.upper())


@functools.cache
def log_once(message: str) -> None:
    """Log what a process should be told only the first time."""
    log.info(message)


def is_progress_shown() -> bool:
    """A progress bar only on a terminal that is wide enough; plain lines elsewhere."""
    if not log.isEnabledFor(logging.INFO) or sys.stderr is None or sys.stderr.closed:
        return False
    return sys.stderr.isatty() and shutil.get_terminal_size().columns >= 40
