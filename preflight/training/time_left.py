"""The seconds that a run has left, from what this process has measured of its own steps."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection

_KEPT = 50
# A step that takes longer than so many usual ones was compiled, stopped (Ctrl-Z) or swapped.
_UNUSUAL = 5.0


class TimeLeft:
    """Estimates the rest of a run: its steps, and the pauses between them.

    Only what this process has seen counts, so that a resumed run, which may be on another machine,
    starts anew. A pause counts from its first time on.

    Args:
        total_steps: of the whole run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._step_seconds: deque[float] = deque(maxlen=_KEPT)
        # Seconds, by kind and by the number of steps from one to the next.
        self._pauses: dict[tuple[str, int], deque[float]] = {}
        self._is_first = True

    def add_step(self, seconds: float) -> None:
        """One more step; the first is left out, since it warms up."""
        if not self._is_first:
            self._step_seconds.append(seconds)
        self._is_first = False

    def add_pause(self, kind: str, every: int, seconds: float) -> None:
        """A pause that comes every so many steps, and after the last."""
        self._pauses.setdefault((kind, every), deque(maxlen=_KEPT)).append(seconds)

    def estimate(self, step: int) -> float | None:
        """Seconds from the end of `step`, before its pauses; ``None`` when nothing is known."""
        if not self._step_seconds:
            return None
        seconds = (self._total_steps - step) * _average_usual(self._step_seconds)
        for (_, every), taken in self._pauses.items():
            n_left = -(-self._total_steps // every) - (step - 1) // every
            seconds += n_left * _average_usual(taken)
        return seconds


def _average_usual(seconds: Collection[float]) -> float:
    limit = _UNUSUAL * statistics.median(seconds)
    return statistics.fmean(value for value in seconds if value <= limit)
