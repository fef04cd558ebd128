"""A moving average, for figures that a person reads."""

from __future__ import annotations

import math


class MovingAverage:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3).

    Args:
        keep: the weight of a value beside the one after it.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with one more value; one that is not finite is left out."""
        if math.isfinite(value):
            self._total = self.keep * self._total + value
            self._weight = self.keep * self._weight + 1
        return self._total / self._weight if self._weight else value
