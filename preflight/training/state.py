"""Where a run stands, and what its steps and evaluations give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class TrainState:
    """Where a run stands; saved and restored as a whole.

    `cursor` is the number of training samples handed out since the first step. `stale_evaluations`
    is the number of evaluations since the one of `best_val_loss`.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    evaluated_step: int = 0
    eval_windows: int = 0
    stale_evaluations: int = 0

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> TrainState:
        """What a checkpoint holds; fields of older or newer versions are left out."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def advance(self, result: StepResult, cursor: int) -> None:
        """Count one more update, made from the samples before `cursor`."""
        self.step, self.cursor = result.step, cursor
        self.tokens += result.tokens


def convert_to_bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A loss in nats per token as bits per byte of text, which any two tokenizers share."""
    return loss / math.log(2) * tokens_per_byte


@dataclass(frozen=True)
class StepResult:
    """What one update gave; loss and gradient norm stay on the device until they are read."""

    step: int
    tokens: int
    learning_rate: float
    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Validation figures; `loss` in nats per token."""

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))
