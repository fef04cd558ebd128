"""The learning-rate range test: the loss while the learning rate rises from step to step.

Source: Smith 2017, arXiv:1506.01186, section 3.3; the exponential rise, the smoothed loss and the
end at divergence as in fastai's finder (Howard & Gugger 2020, arXiv:2002.04688).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from preflight.foresight.child import Report
from preflight.foresight.short_training import TrainingSpec

AVERAGED_SHARE = 0.05  # of the steps, over which losses are averaged
DIVERGED_AT = 4.0  # the smoothed loss is so many times its minimum
_LEAST_DROP = 0.02  # share of the first loss: less is no descent


@dataclass(frozen=True)
class RangeSpec:
    """A training whose learning rate rises exponentially from `lowest` to `highest`.

    `training` gives the model, the data, the batch and the number of steps.
    """

    training: TrainingSpec
    lowest: float
    highest: float

    @property
    def keep(self) -> float:
        """Share of the moving average that each step keeps."""
        return 1 - 1 / max(2.0, AVERAGED_SHARE * self.training.n_steps)

    def list_learning_rates(self) -> list[float]:
        """One for each step."""
        n_steps = self.training.n_steps
        growth = math.log(self.highest / self.lowest) / (n_steps - 1)
        return [self.lowest * math.exp(growth * step) for step in range(n_steps)]


def run_range_test(spec: RangeSpec, report: Report) -> list[tuple[float, float]]:
    """(learning rate, loss) of each step, up to the step at which the loss diverged.

    Args:
        spec: what is trained.
        report: takes (step, loss) of every step.
    """
    plan, runtime = spec.training.plan, spec.training.runtime
    place = spec.training.choose_data_place(runtime)
    trainer = spec.training.build_trainer(plan, runtime)
    points: list[tuple[float, float]] = []
    with spec.training.open_loader(runtime, place) as loader:
        for step, learning_rate in enumerate(spec.list_learning_rates()):
            # The plan is read at every step; a constant one gives the learning rate of this step.
            trainer.plan = replace(
                plan, scheduler="none", warmup_steps=0, peak_learning_rate=learning_rate
            )
            batches = (loader.next_batch() for _ in range(plan.accumulation_steps))
            loss = float(trainer.train_step(step, batches).loss)
            report((step + 1, loss))
            points.append((learning_rate, loss))
            if has_diverged([loss for _, loss in points], spec.keep):
                break
    return points


def has_diverged(losses: Sequence[float], keep: float) -> bool:
    """Whether the last loss is not finite, or the smoothed loss a multiple of its minimum."""
    if not math.isfinite(losses[-1]):
        return True
    smoothed = smooth(losses, keep)
    return smoothed[-1] > DIVERGED_AT * min(smoothed)


def smooth(values: Sequence[float], keep: float) -> list[float]:
    """Exponential moving average, corrected for its start at zero (Kingma & Ba 2015, section 3)."""
    average, result = 0.0, []
    for number, value in enumerate(values, 1):
        average = keep * average + (1 - keep) * value
        result.append(average / (1 - keep**number))
    return result


@dataclass(frozen=True)
class RangeResult:
    """What a range test found.

    Attributes:
        points: (learning rate, loss) of each step; only finite losses.
        smoothed: the moving averages of both, the learning rate's on a log scale. The average of
            the loss lags behind, and that of the learning rate by as much, so that the two belong
            together.
        steepest: the learning rate at which the smoothed loss falls fastest.
        minimum: the one at which it is lowest.
        diverged: whether the test ended by divergence.
        fault: why the test gives no learning rate; empty when it does.
    """

    points: list[tuple[float, float]]
    smoothed: list[tuple[float, float]]
    steepest: float | None
    minimum: float | None
    diverged: bool
    fault: str = ""

    @property
    def tenth(self) -> float | None:
        """A tenth of the minimum's learning rate."""
        return None if self.minimum is None else self.minimum / 10

    @property
    def suggested(self) -> float | None:
        """The larger of the two: both lie on the descent, left of the minimum."""
        found = [x for x in (self.steepest, self.tenth) if x is not None]
        return max(found, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "steepest": self.steepest,
            "minimum": self.minimum,
            "tenth_of_minimum": self.tenth,
            "suggested": self.suggested,
            "diverged": self.diverged,
            "fault": self.fault,
            "points": [list(point) for point in self.points],
            "smoothed": [list(point) for point in self.smoothed],
        }


def analyse_range(points: Sequence[tuple[float, float]], keep: float) -> RangeResult:
    """Find the steepest descent and the minimum of the smoothed loss over log learning rate."""
    finite = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    losses = [loss for _, loss in finite]
    diverged = len(finite) < len(points) or bool(losses and has_diverged(losses, keep))
    logs = smooth([math.log(rate) for rate, _ in finite], keep)
    means = smooth(losses, keep)
    smoothed = [(math.exp(x), y) for x, y in zip(logs, means, strict=True)]
    lowest = min(range(len(means)), key=means.__getitem__, default=0)
    if not means or means[0] - means[lowest] < _LEAST_DROP * means[0]:
        fault = "the loss never fell: a lower --find-lr-min, or a higher --find-lr-max"
        if not means:
            fault = (
                "the loss was not finite at the first step: a lower --find-lr-min, or "
                "--no-mixed-precision"
            )
        return RangeResult(finite, smoothed, None, None, diverged, fault)
    # Slopes over neighbours on both sides; the minimum lies behind the descent.
    slopes = {
        i: (means[i + 1] - means[i - 1]) / (logs[i + 1] - logs[i - 1])
        for i in range(1, min(lowest + 1, len(means) - 1))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=lowest)
    return RangeResult(finite, smoothed, smoothed[steepest][0], smoothed[lowest][0], diverged)
