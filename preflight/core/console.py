"""What a person is told on stderr, and numbers for people."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys

from tqdm import tqdm

from preflight.core.log import LOG_LEVELS

_threshold = LOG_LEVELS.index("info")


def set_log_level(name: str) -> None:
    """From now on `say` only what is of this level of `LOG_LEVELS`, or graver."""
    global _threshold
    _threshold = LOG_LEVELS.index(name)


def say(line: str, level: str = "info") -> None:
    """One line on stderr that does not break a progress bar; a warning is marked as one."""
    if LOG_LEVELS.index(level) < _threshold:
        return
    line = f"warning: {line}" if level == "warning" else line
    with contextlib.suppress(OSError):  # whoever read it has left: no reason to lose a run
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


@functools.cache
def say_once(line: str) -> None:
    """`say` what a process should hear only the first time."""
    say(line)


def is_progress_shown() -> bool:
    """A progress bar only on a terminal that is wide enough; plain lines elsewhere."""
    if LOG_LEVELS.index("info") < _threshold:
        return False
    return sys.stderr.isatty() and shutil.get_terminal_size().columns >= 40


def format_bytes(count: float) -> str:
    """A byte count for people, in powers of 1024: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``48 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
