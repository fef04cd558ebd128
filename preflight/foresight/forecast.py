"""The loss that a run will reach, from shorter complete trainings of the same run.

The loss falls by about the same share with every doubling of the steps (a power law: Hestness et
al. 2017, arXiv:1712.00409; Kaplan et al. 2020, arXiv:2001.08361). Short trainings do not show that
share well: while a model learns which tokens are frequent and which follow each other, it is
larger or smaller than it will be. So the share is taken to be the geometric mean of the one that
was measured and of the usual one, with an uncertainty as large as it was found to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHARES = (64, 32, 16)  # of the run's steps
LEAST_FIRST_STEPS = 50  # of the shortest training, unless that were over a 16th of the run
LEAST_RUN_STEPS = 64
# By how much the logarithm of the loss falls with a doubling of the steps, and how far the
# logarithm of that number is off (normal). From 15 forecasts of 11 tiny models, among them those in
# benchmarks/RESULTS.md. A law with an onset and a floor was further off, and held less of them.
_USUAL_FALL, _SPREAD = 0.09, 0.4
_LEAST_FALL = 0.005  # where the trainings hardly differ
_NORMAL_95 = 1.645  # the 95 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Prediction:
    """The loss to be reached, in nats per token, and the ends of its 90 % interval."""

    loss: float
    low: float
    high: float

    def scale(self, factor: float) -> Prediction:
        """In another unit."""
        return Prediction(self.loss * factor, self.low * factor, self.high * factor)


def choose_lengths(total_steps: int) -> tuple[int, int, int]:
    """Steps of the three trainings: shares of the run, and more where these would be too few."""
    first = max(total_steps // SHARES[0], min(LEAST_FIRST_STEPS, total_steps // SHARES[2]))
    return first, 2 * first, 4 * first


def forecast_loss(steps: Sequence[int], losses: Sequence[float], total_steps: int) -> Prediction:
    """The loss after `total_steps`, from the losses that complete trainings of `steps` reached.

    Args:
        steps: lengths of the trainings, the longest last.
        losses: validation losses at their ends, in nats per token.
        total_steps: length of the run.
    """
    measured = math.log(losses[0] / losses[-1]) / math.log2(steps[-1] / steps[0])
    fall = math.sqrt(_USUAL_FALL * max(measured, _LEAST_FALL))
    n_doublings = math.log2(total_steps / steps[-1])

    def predict(deviations: float) -> float:
        return losses[-1] * math.exp(-n_doublings * fall * math.exp(deviations * _SPREAD))

    return Prediction(predict(0), predict(_NORMAL_95), predict(-_NORMAL_95))
