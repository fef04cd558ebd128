"""How much of the waiting prompts is read between two steps, and what need not be read again."""

from __future__ import annotations

from collections.abc import Sequence

_SECONDS = 0.25  # that a piece may take; streams stand still meanwhile
_FIRST_TOKENS, _MIN_TOKENS, MAX_TOKENS = 256, 32, 2048


class PieceBudget:
    """The tokens of a piece: as many as are read within a quarter of a second.

    Args:
        n_tokens: always this many; unset: it follows the times that are noted.
    """

    def __init__(self, n_tokens: int | None = None) -> None:
        self._is_fixed = n_tokens is not None
        self.n_tokens = n_tokens or _FIRST_TOKENS

    def note(self, n_tokens: int, seconds: float) -> None:
        """Tell how long a piece took."""
        if self._is_fixed:
            return
        if seconds > _SECONDS:
            fitting = int(n_tokens * _SECONDS / seconds)
            self.n_tokens = min(self.n_tokens, max(_MIN_TOKENS, fitting))
        elif 2 * n_tokens > self.n_tokens and seconds < _SECONDS / 2:
            self.n_tokens = min(2 * self.n_tokens, MAX_TOKENS)


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    low, high = 0, most  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
