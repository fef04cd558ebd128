"""Seconds of real training steps, timed in the way in which a run waits for them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable

from torch import Tensor

from preflight.models.loss import TargetRows, Targets
from trainer import Trainer

Batch = tuple[Tensor, Targets]  # inputs (B T) and targets


def take_first_row(batch: Batch) -> Batch:
    """A batch of one sequence, which has a target; of chats, not necessarily its own."""
    inputs, targets = batch
    if isinstance(targets, TargetRows):
        first = targets.rows[:1].clamp(max=inputs.shape[1] - 1)
        return inputs[:1], TargetRows(first, targets.ids[:1], inputs.shape[1])
    return inputs[:1], targets[:1]


def iterate_step_seconds(
    trainer: Trainer, next_batches: Callable[[], Iterable[Batch]], lag: int = 0
) -> Generator[float]:
    """Train without end, and give the seconds of one step after another.

    A step ends when its loss is read. With a lag of 1 that happens while the next step is under
    way, as in a run on CUDA, so that the device never waits for Python. The first figure then
    holds the launch of two steps.

    Args:
        trainer: whose `train_step` is timed.
        next_batches: the batches of one step.
        lag: steps that are under way when a loss is read.
    """
    pending: deque[Tensor] = deque()
    trainer.runtime.synchronize()
    before = time.perf_counter()
    try:
        for step in itertools.count():
            pending.append(trainer.train_step(step, next_batches()).loss)
            if len(pending) > lag:
                float(pending.popleft())  # waits for the step on the device
                now = time.perf_counter()
                yield now - before
                before = now
    finally:
        trainer.runtime.synchronize()  # what comes next is not charged for a step under way


def choose_lag(trainer: Trainer) -> int:
    """Steps under way when a run reads a loss: 1 on CUDA, where steps are launched ahead."""
    return 1 if trainer.runtime.device.type == "cuda" else 0


def time_steps(
    trainer: Trainer, next_batches: Callable[[], Iterable[Batch]], count: int
) -> list[float]:
    """Seconds of `count` steps; a single one is timed from its launch to its end."""
    lag = choose_lag(trainer) if count > 1 else 0
    with contextlib.closing(iterate_step_seconds(trainer, next_batches, lag)) as seconds:
        return list(itertools.islice(seconds, lag, lag + count))
