"""Documents of several sources, interleaved to given shares of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MARK_TOKENS = 10_000_000  # the shares that came out are noted so often


@dataclass
class MixState:
    """How far a mix has come: tokens of each group, and at each mark."""

    n_tokens: list[int]
    marks: list[list[int]] = field(default_factory=list)

    def add(self, group: int, n_tokens: int) -> None:
        """Count tokens that were written."""
        self.n_tokens[group] += n_tokens
        if sum(self.n_tokens) >= MARK_TOKENS * (len(self.marks) + 1):
            self.marks.append(list(self.n_tokens))


def choose_group(state: MixState, shares: Sequence[float]) -> tuple[int, float]:
    """The group that lags furthest behind its share, and how many tokens it may catch up.

    So many that it comes up to the one that lags next. The first of equals is chosen, so that the
    order is a function of the documents and the shares alone.
    """
    ratios = [n / share for n, share in zip(state.n_tokens, shares, strict=True)]
    group = min(range(len(ratios)), key=ratios.__getitem__)
    following = min((r for i, r in enumerate(ratios) if i != group), default=float("inf"))
    return group, shares[group] * following - state.n_tokens[group]


def count_pieces(lengths: np.ndarray, ends: np.ndarray, begin: int, room: float) -> int:
    """How many pieces from `begin` on are taken at once: whole documents that fill `room` tokens.

    At least one document, or what there is of it.
    """
    behind = np.cumsum(lengths[begin:])
    first = int(np.searchsorted(behind, room, side="left"))  # the piece that fills it
    stops = np.flatnonzero(ends[begin:])
    at = int(np.searchsorted(stops, first))
    return int(stops[at]) + 1 if at < len(stops) else len(lengths) - begin
