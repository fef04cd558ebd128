"""The search for a batch size: a function of its arguments alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from preflight.foresight.trials import Trial

MAX_SIZE = 1_048_576  # of --batch-size


USUAL_TRIALS = 6


FAST_SHARE = 0.98  # a size this near to the fastest is as good


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Sizes are ``None`` when none fits; every one of them has run.

    Attributes:
        trials: in the order in which they ran.
        limit_bytes: what a trial was allowed to need.
        largest: the largest size that fits.
        fastest: the one with the most tokens per second.
        recommended: the smallest within 2 % of the fastest.
        chosen: the one to go on with; not the recommended where a product has to be kept.
        accumulation: micro-steps that keep the product; ``None``: as configured.
        bound: what ended the search above `largest`: ``memory``, ``data``, ``time``, or
            ``list`` when the sizes were given.
        predicted_largest: what the line, corrected by the trials, says of memory alone.
    """

    trials: tuple[Trial, ...]
    limit_bytes: int
    largest: int | None
    fastest: int | None
    recommended: int | None
    chosen: int | None
    accumulation: int | None
    bound: str
    predicted_largest: int


def search(
    probe: Callable[[int], Trial],
    predict: Callable[[int], int],
    limit_bytes: int,
    *,
    sizes: tuple[int, ...] = (),
    target: int | None = None,
    keep: int | None = None,
    largest: int = MAX_SIZE,
    first: int | None = None,
    max_step_seconds: float = math.inf,
) -> SearchResult:
    """Find the largest size that fits and the fastest, in few trials.

    Args:
        probe: runs one size.
        predict: predicted `Trial.needed_bytes`, rising with the size.
        limit_bytes: what may be needed.
        sizes: try these and no others.
        target: the size that is wanted; only where it does not fit, smaller ones are tried.
        keep: sequences per update that the chosen size and its accumulation multiply to.
        largest: sizes above it are of no use.
        first: a small size to begin with, where a step may take long.
        max_step_seconds: sizes whose micro-step would take longer are not tried.
    """
    state = _Search(probe, predict, limit_bytes, target or largest, max_step_seconds)
    for size in dict.fromkeys(sizes or (target,) if target else sizes):
        state.run(size)
    if not sizes and not (target and state.fitting()):
        state.find_largest(None if target else first)
    if not sizes and not target:
        state.find_fastest()
    return state.conclude("list" if sizes else "", target, keep)


class _Search:
    """Trials so far, and what follows from them."""

    def __init__(
        self,
        probe: Callable[[int], Trial],
        predict: Callable[[int], int],
        limit_bytes: int,
        largest: int,
        max_step_seconds: float,
    ) -> None:
        self.probe, self.predict, self.limit_bytes = probe, predict, limit_bytes
        self.largest, self.max_step_seconds = largest, max_step_seconds
        self.trials: dict[int, Trial] = {}

    def run(self, size: int) -> Trial:
        """The trial of a size; each is run once."""
        if size not in self.trials:
            self.trials[size] = self.probe(size)
        return self.trials[size]

    def bracket(self) -> tuple[int, int, bool]:
        """The largest size that fits, the smallest known not to, and whether that one was tried."""
        failed = [s for s, t in self.trials.items() if not t.fits(self.limit_bytes)]
        high = min([self.ceiling() + 1, *failed])
        low = max(
            (
                s
                for s, t in self.trials.items()
                if t.fits(self.limit_bytes) and s < min([MAX_SIZE + 1, *failed])
            ),
            default=0,
        )
        return low, high, high in self.trials

    def ceiling(self) -> int:
        """The largest size of any use: by the data, and by the time that a step takes."""
        timed = [t for t in self.trials.values() if t.step_seconds]
        if not timed:
            return self.largest
        last = max(timed, key=lambda t: t.batch_size)
        seconds = last.step_seconds / last.micro_steps / last.batch_size
        ceiling = max(1, int(min(self.largest, self.max_step_seconds / seconds)))
        # Less than twice of what has run is not worth another trial that long.
        near = ceiling < self.largest and ceiling < 2 * last.batch_size
        return min(ceiling, last.batch_size) if near else ceiling

    def estimate(self, size: int) -> float:
        """Bytes needed: the prediction, corrected by what was measured."""
        points = sorted(
            (t for t in self.trials.values() if not t.failure),
            key=lambda t: abs(t.needed_bytes - self.limit_bytes),
        )
        if not points:
            return self.predict(size)
        near, base = points[0], self.predict(points[0].batch_size)
        for other in points[1:]:
            run = base - self.predict(other.batch_size)
            rise = near.needed_bytes - other.needed_bytes
            if run and rise / run > 0:
                return near.needed_bytes + rise / run * (self.predict(size) - base)
        if near.needed_bytes < self.limit_bytes / 2:
            # What is off at a small size is what every size has: the interpreter, the context.
            return self.predict(size) + near.needed_bytes - base
        return self.predict(size) * near.needed_bytes / max(base, 1)

    def guess(self, low: int, high: int) -> int:
        """The largest size from `low` to `high` - 1 that is estimated to fit."""
        while high - low > 1:
            middle = (low + high) // 2
            if self.estimate(middle) <= self.limit_bytes:
                low = middle
            else:
                high = middle
        return low

    def find_largest(self, first: int | None) -> None:
        """Close in on the border until both its sides have been tried."""
        if first is not None:
            # Where even that is too much by prediction, a smaller one.
            self.run(max(1, self.guess(0, min(first, self.largest) + 1)))
        surprises = 0
        while True:
            low, high, tried = self.bracket()
            if high - low <= 1:
                return
            size = self._choose_next(low, high, tried, surprises)
            expected = self.estimate(size) <= self.limit_bytes
            trial = self.run(size)
            surprises += not trial.failure and trial.fits(self.limit_bytes) != expected

    def _choose_next(self, low: int, high: int, tried: bool, surprises: int) -> int:
        """A size strictly between `low` and `high`: where the corrected line meets the limit."""
        guess, half = self.guess(low, high), max(1, (high - low) // 2)
        # Where the line has been wrong again and again, longer and longer strides.
        stride = min(1 << max(0, surprises - 1), half)
        if tried and len(self.trials) >= 2 * USUAL_TRIALS:
            size = low + half
        elif guess <= low:
            size = low + stride
        elif tried and guess >= high - 1:
            # It failed against the line: by how much is known only if it got through.
            size = low + half if self.trials[high].failure else high - stride
        else:
            size = guess
        return min(max(size, low + 1), high - 1)

    def find_fastest(self) -> None:
        """Powers of two below the largest size, downwards until one is clearly slower."""
        largest, _, _ = self.bracket()
        size = 1 << max(0, int(largest * 3 / 4).bit_length() - 1)
        for _ in range(max(1, USUAL_TRIALS - len(self.trials))):
            if not 0 < size < largest:
                return
            best = max(t.tokens_per_second for t in self.fitting())
            if self.run(size).tokens_per_second < FAST_SHARE * best:
                return
            size //= 2

    def fitting(self) -> list[Trial]:
        """Trials that fit, below any that did not."""
        low, _, _ = self.bracket()
        return [t for s, t in self.trials.items() if s <= low and t.fits(self.limit_bytes)]

    def choose(self, preferred: int, keep: int) -> tuple[int, int] | tuple[None, None]:
        """Size and accumulation that multiply to `keep`, the size tried as all others are."""
        while (largest := self.bracket()[0]) > 0:
            size, accumulation = split_sequences(keep, preferred, largest)
            if self.run(size).fits(self.limit_bytes):
                return size, accumulation
        return None, None

    def conclude(self, bound: str, target: int | None, keep: int | None) -> SearchResult:
        """What the trials say."""
        recommended = self.recommend() if not target else self.bracket()[0]
        chosen, accumulation = recommended or None, None
        if chosen and keep:
            chosen, accumulation = self.choose(chosen, keep)
        low, high, tried = self.bracket()
        if not bound:
            limited = self.ceiling() < self.largest
            bound = "memory" if tried else "time" if limited else "data"
        fastest = max(self.fitting(), key=lambda t: t.tokens_per_second, default=None)
        return SearchResult(
            tuple(self.trials.values()),
            self.limit_bytes,
            low or None,
            fastest.batch_size if fastest else None,
            self.recommend() or None,
            chosen,
            accumulation,
            bound,
            high - 1 if tried else self.guess(low, self.largest + 1),
        )

    def recommend(self) -> int:
        """The smallest size within 2 % of the fastest; 0 when none fits."""
        enough = FAST_SHARE * max((t.tokens_per_second for t in self.fitting()), default=0.0)
        return min(
            (t.batch_size for t in self.fitting() if t.tokens_per_second >= enough), default=0
        )


def split_sequences(n_sequences: int, preferred: int, largest: int) -> tuple[int, int]:
    """Micro-batch and accumulation whose product is exactly `n_sequences`.

    Of the micro-batches up to `largest`, the one nearest in ratio to `preferred`.
    """
    small = (n for n in range(1, math.isqrt(n_sequences) + 1) if n_sequences % n == 0)
    divisors = {d for n in small for d in (n, n_sequences // n) if d <= largest}
    size = min(divisors, key=lambda d: (abs(math.log(d / preferred)), d))
    return size, n_sequences // size
