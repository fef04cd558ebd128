"""How much of the waiting prompts is read between two steps, and what need not be read again."""

from __future__ import annotations

from collections.abc import Sequence

_SECONDS = 0.25  # that a piece may take; streams stand still meanwhile
_FIRST_TOKENS, _MIN_TOKENS, MAX_TOKENS = 256, 64, 2048
_ALONE = 4  # times as much where no stream waits


class PieceBudget:
    """The tokens of a piece: about as many as are read within a quarter of a second.

    Args:
        n_tokens: always this many; unset: it follows the times that are noted.
    """

    def __init__(self, n_tokens: int | None = None) -> None:
        self._is_fixed = n_tokens is not None
        self._n_tokens = n_tokens or _FIRST_TOKENS

    def find(self, *, is_alone: bool) -> int:
        """The tokens of the next piece; more where it is alone: no row generates."""
        if self._is_fixed or not is_alone:
            return self._n_tokens
        return min(MAX_TOKENS, _ALONE * self._n_tokens)

    def note(self, n_tokens: int, seconds: float) -> None:
        """Tell how long a piece took. It changes by a factor of two at most: clocks are noisy."""
        if self._is_fixed or 2 * n_tokens < self._n_tokens:  # so few tokens say nothing
            return
        fitting = n_tokens * _SECONDS / max(seconds, 1e-9)
        fitting = min(2 * self._n_tokens, max(self._n_tokens // 2, int(fitting)))
        self._n_tokens = min(MAX_TOKENS, max(_MIN_TOKENS, fitting))


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
