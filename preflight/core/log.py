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
from collections.abc import Iterator

log = logging.getLogger("preflight")


class _StderrHandler(logging.Handler):
    """Writes above a progress bar. A closed or missing stderr loses the message, never the run."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # 30 ms that a call without messages does not pay

        if sys.stderr is None:
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)
            sys.stderr.flush()


def configure_logging(level: str) -> None:
    """Show messages of `level` (debug, info, warning or error) and above on stderr."""
    log.handlers = [_StderrHandler()]
    log.propagate = False
    log.setLevel(level.upper())


@functools.cache
def log_once(message: str) -> None:
    """Log a message only the first time that this process has it."""
    log.info(message)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within, only warnings and errors are shown."""
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def is_progress_shown() -> bool:
    """Whether progress bars are shown: on a terminal at least 40 columns wide."""
    if not log.isEnabledFor(logging.INFO) or sys.stderr is None or sys.stderr.closed:
        return False
    return sys.stderr.isatty() and shutil.get_terminal_size().columns >= 40
