"""The loss that a run will reach, from shorter complete trainings of the same run.

The law is a power law with a beginning and an end (Hestness et al. 2017, arXiv:1712.00409; Kaplan
et al. 2020, arXiv:2001.08361): after n steps the loss is

    L(n) = a + (u - a) (1 + n / m)^-c

u is the loss of a model that knows only how frequent each token is. Any model reaches it within a
few steps, and it is measured, not fitted. From about m steps on the loss falls as a power of n,
towards a. A pure power law knows no beginning, and forecasts too much from short trainings.

Three trainings cannot tell three numbers apart. So all values on a grid are weighed by how well
they fit and by how usual they are. The forecast is the median of what they predict, and its
interval the middle 90 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preflight.corpus.shards import DataFolder, Split

SHARES = (64, 32, 16)  # of the run's steps
LEAST_FIRST_STEPS = 50  # of the shortest training, unless that were over a 16th of the run
LEAST_RUN_STEPS = 64
# How usual a value is: the exponent (log-normal), the floor as a share of the last loss
# (half-normal), and how far a training's loss lies from the law, as a share of it (normal). Chosen
# so that the interval held nine in ten of 21 forecasts, which share the runs of five tiny models.
_USUAL_EXPONENT, _EXPONENT_SPREAD, _FLOOR_SPREAD, _NOISE_SHARE = 0.2, 0.6, 0.25, 0.018
_TAIL = 0.05  # of the predictions, left out of the interval on each side
_COUNTED_TOKENS = 20_000_000


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


def measure_unigram_loss(data: DataFolder) -> float:
    """Nats per token of the validation part, for a model that knows the tokens' frequencies.

    The frequencies are those of the training part's beginning, with each token counted once more.
    """
    seen, expected = (_count_tokens(part, data.vocab_size) for part in (data.train, data.val))
    probabilities = (seen + 1) / (seen + 1).sum()
    return float(-(expected * np.log(probabilities)).sum() / expected.sum())


def _count_tokens(part: Split, vocab_size: int) -> np.ndarray:
    """(V,) how often each id comes, in at most the first 20 million tokens."""
    counts, left = np.zeros(vocab_size, np.int64), _COUNTED_TOKENS
    for shard in part.open():
        tokens = shard[:left]
        counts += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
        left -= len(tokens)
        if left <= 0:
            break
    return counts


def forecast_loss(
    steps: Sequence[int], losses: Sequence[float], total_steps: int, unigram_loss: float
) -> Prediction:
    """The loss after `total_steps`, from the losses that complete trainings of `steps` reached.

    Args:
        steps: lengths of the trainings, the longest last.
        losses: validation losses at their ends, in nats per token.
        total_steps: length of the run.
        unigram_loss: where the law begins; a higher loss among `losses` is taken instead.
    """
    start = max(unigram_loss, *losses)
    exponent, onset, floor = np.meshgrid(
        np.exp(np.linspace(math.log(0.03), math.log(1.2), 40)),
        np.exp(np.linspace(math.log(1e-3), math.log(50), 80)),  # as a share of the longest
        np.linspace(0, 0.9, 31) * losses[-1],
        indexing="ij",
    )

    def law(n: float) -> np.ndarray:
        return np.asarray(floor + (start - floor) * (1 + n / steps[-1] / onset) ** -exponent)

    log_weights = -0.5 * (np.log(exponent / _USUAL_EXPONENT) / _EXPONENT_SPREAD) ** 2
    log_weights -= 0.5 * (floor / losses[-1] / _FLOOR_SPREAD) ** 2
    for n, loss in zip(steps, losses, strict=True):
        log_weights -= 0.5 * ((law(n) / loss - 1) / _NOISE_SHARE) ** 2
    weights = np.exp(log_weights - log_weights.max()).ravel()
    predicted = law(total_steps).ravel()
    order = np.argsort(predicted)
    shares = np.cumsum(weights[order]) / weights.sum()
    places = np.searchsorted(shares, (0.5, _TAIL, 1 - _TAIL)).clip(max=len(order) - 1)
    loss, low, high = predicted[order][places].tolist()
    return Prediction(loss, low, high)
