"""The search for a batch size, a function of its arguments alone.

A prediction leads it, and each trial corrects the prediction. The answer rests on trials only: the
largest size that fits has run, and so has the next larger one, which does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from preflight.foresight.trial_spec import TrialResult

MAX_SIZE = 1_048_576  # of --batch-size
USUAL_TRIALS = 6  # a search with a fair prediction ends within so many
FAST_SHARE = 0.98  # a size whose tokens/s reach this share of the best is as good
SMALL_SIZE = 8  # of which a step is short, and wastes no tokens


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Sizes are ``None`` when none fits; each size that is named has run.

    Attributes:
        trials: in the order in which they ran.
        limit_bytes: what a trial was allowed to need.
        largest: the largest size that fits.
        fastest: the size with the most tokens per second.
        recommended: the size to take: the smallest within 2 % of the least time for the same loss.
        chosen: the size to use: the recommended one, or one near it that divides the update.
        accumulation: micro-steps that keep the update's sequences; ``None``: as configured.
        bound: why no larger size was tried: ``memory``, ``data``, ``time``, or ``list`` when the
            sizes were given.
        predicted_largest: the largest size by memory alone, from the corrected prediction.
    """

    trials: tuple[TrialResult, ...]
    limit_bytes: int
    largest: int | None
    fastest: int | None
    recommended: int | None
    chosen: int | None
    accumulation: int | None
    bound: str
    predicted_largest: int


def search(
    probe: Callable[[int], TrialResult],
    predict: Callable[[int], int],
    limit_bytes: int,
    *,
    sizes: tuple[int, ...] = (),
    target: int | None = None,
    keep: int | None = None,
    largest: int = MAX_SIZE,
    first: int | None = None,
    max_step_seconds: float = math.inf,
    times_tokens: Callable[[int], float] = lambda size: 1.0,
) -> SearchResult:
    """Find the largest size that fits, the fastest, and the one to take, in few trials.

    Args:
        probe: runs a trial of one size.
        predict: predicts `TrialResult.needed_bytes`; it rises with the size.
        limit_bytes: what a trial may need.
        sizes: try these and no others.
        target: the size that is wanted; smaller ones are tried only if it does not fit.
        keep: sequences per update; the chosen size times its accumulation gives this number.
        largest: sizes above it are of no use.
        first: a small size to begin with, where a step may take long.
        max_step_seconds: sizes whose micro-step would take longer are not tried.
        times_tokens: how many times the tokens of a very small size one needs for the same loss.
    """
    state = _Search(probe, predict, limit_bytes, target or largest, max_step_seconds, times_tokens)
    for size in dict.fromkeys(sizes or (target,) if target else sizes):
        state.run(size)
    if not sizes and not (target and state.fitting()):
        state.find_largest(None if target else first)
    if not sizes and not target:
        state.find_fastest()
    return state.conclude("list" if sizes else "", target, keep)


class _Search:
    """The trials so far, and what follows from them."""

    def __init__(
        self,
        probe: Callable[[int], TrialResult],
        predict: Callable[[int], int],
        limit_bytes: int,
        largest: int,
        max_step_seconds: float,
        times_tokens: Callable[[int], float],
    ) -> None:
        self.probe, self.predict, self.limit_bytes = probe, predict, limit_bytes
        self.times_tokens = times_tokens
        self.largest, self.max_step_seconds = largest, max_step_seconds
        self.trials: dict[int, TrialResult] = {}

    def run(self, size: int) -> TrialResult:
        """The trial of a size; each size is run once."""
        if size not in self.trials:
            self.trials[size] = self.probe(size)
        return self.trials[size]

    def bracket(self) -> tuple[int, int, bool]:
        """The bracket around the border: (a size that fits, one that does not, was that one tried).

        The lower end is 0 where nothing fits yet. The upper end is the ceiling plus one as long as
        no trial below it has failed.
        """
        failed = [s for s, t in self.trials.items() if not t.fits(self.limit_bytes)]
        high = min([self.ceiling() + 1, *failed])
        # Memory may be noisy: a size that fits above one that does not is no safe answer.
        safe = min(failed, default=MAX_SIZE + 1)
        low = max((s for s in self.trials if s < safe), default=0)
        return low, high, high in self.trials

    def ceiling(self) -> int:
        """The largest size of any use: by the data, and by the time that a micro-step takes."""
        timed = [t for t in self.trials.values() if t.step_seconds]
        if not timed:
            return self.largest
        # Larger sizes are more efficient, so that the largest one timed tells most.
        last = max(timed, key=lambda t: t.batch_size)
        seconds = last.step_seconds / last.micro_steps / last.batch_size
        ceiling = max(1, int(min(self.largest, self.max_step_seconds / seconds)))
        # Where time sets the ceiling, a trial takes long: it has to promise twice the size.
        near = ceiling < self.largest and ceiling < 2 * last.batch_size
        return min(ceiling, last.batch_size) if near else ceiling

    def estimate(self, size: int) -> float:
        """Bytes needed: the prediction, corrected by the trials.

        Prediction and measurement are both nearly straight lines over the size, but may differ in
        slope (an item that was forgotten) and in offset (another interpreter, another context).
        Two trials correct both, a single trial only one of them.
        """
        points = sorted(
            (t for t in self.trials.values() if not t.failure),
            key=lambda t: abs(t.needed_bytes - self.limit_bytes),
        )
        if not points:
            return self.predict(size)
        # The trial nearest to the limit, since the border is there.
        near, base = points[0], self.predict(points[0].batch_size)
        for other in points[1:]:
            # Measured bytes per predicted byte between the two; noise may turn it around.
            run = base - self.predict(other.batch_size)
            rise = near.needed_bytes - other.needed_bytes
            if run and rise / run > 0:
                return near.needed_bytes + rise / run * (self.predict(size) - base)
        if near.needed_bytes < self.limit_bytes / 2:
            # At a small size the error is mostly an offset: the interpreter, the context.
            return self.predict(size) + near.needed_bytes - base
        # At a large size the error is mostly a factor.
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
        """Narrow the bracket until both sides of the border have been tried."""
        if first is not None:
            # A smaller one where the prediction says that even that does not fit.
            self.run(max(1, self.guess(0, min(first, self.largest) + 1)))
        surprises = 0
        while True:
            low, high, tried = self.bracket()
            if high - low <= 1:
                return
            size = self._choose_next(low, high, tried, surprises)
            expected = self.estimate(size) <= self.limit_bytes
            trial = self.run(size)
            # A trial that ran out of memory measured nothing, so that it corrects nothing either.
            surprises += not trial.failure and trial.fits(self.limit_bytes) != expected

    def _choose_next(self, low: int, high: int, tried: bool, surprises: int) -> int:
        """A size strictly between `low` and `high`: where the corrected prediction meets the limit.

        This is a secant search. Where the prediction does not behave like a line, it falls back to
        growing strides and at last to bisection, which always ends.
        """
        guess, half = self.guess(low, high), max(1, (high - low) // 2)
        # Each surprise doubles the stride away from the end that the prediction points to.
        stride = min(1 << max(0, surprises - 1), half)
        if tried and len(self.trials) >= 2 * USUAL_TRIALS:
            size = low + half  # too many trials: bisect
        elif guess <= low:
            size = low + stride  # the border seems to be at `low`: show it from above
        elif tried and guess >= high - 1:
            # The border seems to be at `high`: show it from below. A trial that ran to its end
            # says by how much it is over the limit; one that ran out of memory does not.
            size = low + half if self.trials[high].failure else high - stride
        else:
            size = guess
        return min(max(size, low + 1), high - 1)

    def find_fastest(self) -> None:
        """Try powers of two from where the best is expected, until one is clearly worse."""
        largest, _, _ = self.bracket()
        if not largest:
            return
        wasteful = FAST_SHARE * self.times_tokens(largest) > self.times_tokens(1)
        if wasteful and min(t.batch_size for t in self.fitting()) > SMALL_SIZE:
            self.run(SMALL_SIZE)  # how much speed a large size gains is not known without it
        # The largest power of two that is at most 3/4 of it: nearer ones tell nothing new.
        top = max(0, int(largest * 3 / 4).bit_length() - 1)
        start = self._expect_best(top)
        end = len(self.trials) + max(1, USUAL_TRIALS - len(self.trials))
        for exponents in (range(start, -1, -1), range(start + 1, top + 1)):
            for exponent in exponents:
                if len(self.trials) >= end or not 1 << exponent < largest:
                    return
                best = max(map(self.judge, self.fitting()))
                if self.judge(self.run(1 << exponent)) < FAST_SHARE * best:
                    break

    def judge(self, trial: TrialResult) -> float:
        """Tokens per second, as many as a very small size would need for the same loss."""
        return trial.tokens_per_second / self.times_tokens(trial.batch_size)

    def _expect_best(self, top: int) -> int:
        """The power of two up to `top` that is best if a step's time is a line over the size."""
        low, high = (choose(self.fitting(), key=lambda t: t.batch_size) for choose in (min, max))
        short, long = (trial.step_seconds / trial.micro_steps for trial in (low, high))
        slope = long / high.batch_size
        if low is not high:
            slope = min(slope, (long - short) / (high.batch_size - low.batch_size))
        constant = long - slope * high.batch_size
        best, least = top, math.inf
        for exponent in range(top, -1, -1):
            size = 1 << exponent
            seconds = (constant / size + slope) * self.times_tokens(size)
            if seconds < least * (1 - 1e-6):
                best, least = exponent, seconds
        return best

    def fitting(self) -> list[TrialResult]:
        """The trials that fit, below the smallest that does not."""
        low, _, _ = self.bracket()
        return [t for s, t in self.trials.items() if s <= low and t.fits(self.limit_bytes)]

    def choose(self, preferred: int, keep: int) -> tuple[int, int] | tuple[None, None]:
        """Size and accumulation whose product is `keep`; the size has run and fits."""
        # A divisor that does not fit after all lowers the bracket, and the next one is tried.
        while (largest := self.bracket()[0]) > 0:
            size, accumulation = split_sequences(keep, preferred, largest)
            if self.run(size).fits(self.limit_bytes):
                return size, accumulation
        return None, None

    def conclude(self, bound: str, target: int | None, keep: int | None) -> SearchResult:
        """The result; a trial of the chosen size may still have to run."""
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
        """The smallest size within 2 % of the best; 0 when none fits."""
        enough = FAST_SHARE * max(map(self.judge, self.fitting()), default=0.0)
        return min((t.batch_size for t in self.fitting() if self.judge(t) >= enough), default=0)


def split_sequences(n_sequences: int, preferred: int, largest: int) -> tuple[int, int]:
    """Micro-batch and accumulation whose product is exactly `n_sequences`.

    It takes the divisor up to `largest` whose ratio to `preferred` is nearest to 1.
    """
    small = (n for n in range(1, math.isqrt(n_sequences) + 1) if n_sequences % n == 0)
    divisors = {d for n in small for d in (n, n_sequences // n) if d <= largest}
    size = min(divisors, key=lambda d: (abs(math.log(d / preferred)), d))
    return size, n_sequences // size
