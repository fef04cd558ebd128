"""How long steps on chats take: their batches differ in length, so that some stand for all."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from preflight.corpus.chats.data import ChatData
from preflight.foresight.timing import Batch, take_first_row, time_steps
from preflight.settings import TrainingSettings
from train_utils import Loader
from trainer import Trainer

TIMED_STEPS, LONG_TOTAL_SECONDS = 7, 15.0


def measure_chat_steps(
    trainer: Trainer, loader: Loader, chats: ChatData, training: TrainingSettings
) -> tuple[float, list[float], float]:
    """Seconds of the first step, of each timed one, and of a step of mean length.

    Steps of an epoch are sorted by their tokens, padding included, and some at even distances are
    timed. Together they give the seconds of a token.
    """
    micro_steps = training.gradient_accumulation_steps
    micro = chats.count_padded_tokens(training)
    n_steps = max(1, len(micro) // micro_steps)
    tokens = np.resize(micro, n_steps * micro_steps).reshape(n_steps, micro_steps).sum(axis=1)

    def feed(step: int) -> Iterator[Batch]:
        loader.cursor = step * micro_steps * training.batch_size
        return (loader.next_batch() for _ in range(micro_steps))

    # It allocates the optimizer's state, and what the libraries keep.
    loader.cursor = 0
    first = time_steps(trainer, lambda: [take_first_row(loader.next_batch())], 1)[0]
    by_tokens = np.argsort(tokens, kind="stable")
    count = min(TIMED_STEPS, n_steps)
    places = ((np.arange(count) + 0.5) / count * n_steps).astype(np.int64)
    # From the middle outwards: those that are timed stand for all, however few they are.
    places = places[np.argsort(abs(places - n_steps // 2), kind="stable")]
    chosen = by_tokens[places]
    seconds: list[float] = []
    for step in chosen.tolist():
        seconds += time_steps(trainer, functools.partial(feed, step), 1)
        if sum(seconds) > LONG_TOTAL_SECONDS:
            break
    per_token = sum(seconds) / float(tokens[chosen[: len(seconds)]].sum())
    return first, seconds, per_token * float(tokens.mean())
