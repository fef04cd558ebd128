"""The plan of a run: its length, its intervals, and how an update is made."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from preflight.settings import MODEL_PRESETS, ControlSettings, TrainingSettings
from preflight.training.state import TrainState

EVAL_SHARE_OF_TRAINING = 0.05  # of the run's time, at most, for its evaluations
DEFAULT_LEARNING_RATE = MODEL_PRESETS["micro"].learning_rate


@dataclass(frozen=True)
class TrainingPlan:
    """A run in numbers, all choices made.

    A step is one update of the weights, from `accumulation_steps` micro-batches. A sample is one
    window of `window_tokens`: the context length or `--window`, or less where the text is shorter.
    Windows of the training part begin `stride_tokens` apart. Evaluations
    read `eval_windows` of the validation part; after `patience` of them in a row without a lower
    loss the run stops.
    """

    total_steps: int
    steps_per_epoch: float
    warmup_steps: int
    checkpoint_every: int
    eval_every: int
    log_every: int
    eval_windows: int
    patience: int | None
    samples_per_step: int
    tokens_per_step: int
    window_tokens: int
    stride_tokens: int
    accumulation_steps: int
    peak_learning_rate: float
    scheduler: str
    max_grad_norm: float

    @property
    def epochs(self) -> float:
        """Passes over the windows of the training part."""
        return self.total_steps / self.steps_per_epoch

    @property
    def text_reads(self) -> float:
        """How often the run reads each token of the training part: more where windows overlap."""
        return self.epochs * self.window_tokens / self.stride_tokens


def describe_windows(training: TrainingSettings, plan: TrainingPlan, context_length: int) -> str:
    """What `--window` and `--overlap` do; empty where they do nothing."""
    window, stride = plan.window_tokens, plan.stride_tokens
    if not training.window and stride == window:
        return ""
    text = f"{window:,} tokens each"
    if window < context_length:
        text += f"; the context's positions from {window:,} on are not trained"
    if stride < window:
        text += (
            f"; one begins every {stride:,} tokens, so that an epoch reads the text "
            f"{window / stride:.2f} times; validation windows do not overlap"
        )
    return text


def build_plan(
    training: TrainingSettings,
    control: ControlSettings,
    window_tokens: int,
    n_train_windows: int,
    n_val_windows: int,
    state: TrainState | None = None,
    *,
    stride_tokens: int | None = None,
    tokens_per_sample: float | None = None,
    samples_per_step: int | None = None,
) -> TrainingPlan:
    """Choose what the flags leave unset: intervals and warm-up are shares of the run.

    Args:
        training: batch size, accumulation, length, schedule.
        control: intervals.
        window_tokens: tokens of a training window.
        n_train_windows: training windows of one epoch.
        n_val_windows: windows of the validation part.
        state: where a resumed run stands; the rest of its epochs is counted from there.
        stride_tokens: from one training window to the next; unset: they do not overlap.
        tokens_per_sample: their mean, where samples differ in length; unset: `window_tokens`.
        samples_per_step: of all ranks; unset: those of one.
    """
    state = state or TrainState()
    samples = samples_per_step or training.batch_size * training.gradient_accumulation_steps
    epochs = training.num_epochs or (math.inf if training.max_steps else 3.0)
    total = training.max_steps or sys.maxsize
    if math.isfinite(epochs):
        left = max(0.0, epochs * n_train_windows - state.cursor)
        total = min(total, state.step + math.ceil(left / samples))
    total = max(total, 1)
    # Evaluation and checkpoint coincide unless set, so that checkpoints have a validation loss.
    tenth = max(1, math.ceil(total / 10))
    checkpoint_every = control.checkpoint_every or control.eval_every or tenth
    eval_every = control.eval_every or checkpoint_every
    evaluations = max(1, total // eval_every)
    # A forward pass takes about a third of a training step.
    affordable = EVAL_SHARE_OF_TRAINING * 3 * total * samples / evaluations
    eval_windows = min(n_val_windows, state.eval_windows or max(8, round(affordable)))
    return TrainingPlan(
        total_steps=total,
        steps_per_epoch=n_train_windows / samples,
        warmup_steps=_choose_warmup(training, total),
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        log_every=control.log_every or max(1, total // 100),
        eval_windows=eval_windows,
        patience=control.early_stopping_patience,
        samples_per_step=samples,
        tokens_per_step=round(samples * (tokens_per_sample or window_tokens)),
        window_tokens=window_tokens,
        stride_tokens=stride_tokens or window_tokens,
        accumulation_steps=training.gradient_accumulation_steps,
        peak_learning_rate=training.learning_rate or DEFAULT_LEARNING_RATE,
        scheduler=training.scheduler,
        max_grad_norm=training.max_grad_norm,
    )


def _choose_warmup(training: TrainingSettings, total_steps: int) -> int:
    """The steps of warm-up that the flags ask for; unset, a share of the run."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    if training.scheduler == "onecycle":
        return math.ceil(0.3 * total_steps)  # torch's OneCycleLR: pct_start
    return min(math.ceil(0.05 * total_steps), 2000)
