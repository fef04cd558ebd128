"""`Trainer`: set-up, the training step and evaluation; the plan and the learning rate.

Every mode that measures goes through `Trainer`, so that it measures the real thing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preflight.core.console import say
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device.runtime import Runtime, is_out_of_memory
from preflight.settings.config import ControlSettings, ModelConfig, TrainingSettings
from transformer_model import DecoderOnlyTransformer

COSINE_FLOOR = 0.1  # share of the peak rate at the end (Brown et al. 2020, appendix B)
# One-cycle's start and end as shares of the peak: torch's OneCycleLR (Smith & Topin 2017).
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4
EVAL_SHARE_OF_TRAINING = 0.05


@dataclass(frozen=True)
class TrainingPlan:
    """A run in numbers, all choices made. Steps are updates of the weights."""

    total_steps: int
    steps_per_epoch: float
    warmup_steps: int
    checkpoint_every: int
    eval_every: int
    log_every: int
    eval_windows: int
    samples_per_step: int
    tokens_per_step: int


@dataclass
class TrainState:
    """Where a run stands; saved and restored as a whole.

    `cursor` is the number of training samples handed out since the first step.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    evaluated_step: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    eval_windows: int = 0


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


def build_plan(
    training: TrainingSettings,
    control: ControlSettings,
    context_length: int,
    n_train_windows: int,
    n_val_windows: int,
    state: TrainState | None = None,
) -> TrainingPlan:
    """Fill in what was left unset: intervals and warm-up are shares of the run.

    `state` is where a resumed run stands: what is left of the epochs is counted from there.
    """
    state = state or TrainState()
    samples = training.batch_size * training.gradient_accumulation_steps
    epochs = training.num_epochs or (math.inf if training.max_steps else 3.0)
    total = training.max_steps or sys.maxsize
    if math.isfinite(epochs):
        left = max(0.0, epochs * n_train_windows - state.cursor)
        total = min(total, state.step + math.ceil(left / samples))
    total = max(total, 1)
    warmup = training.warmup_steps
    if warmup is None:
        share = 0.3 if training.scheduler == "onecycle" else 0.05
        warmup = min(math.ceil(share * total), 2000 if share == 0.05 else total)
    # One interval follows the other, so that checkpoints carry a validation loss.
    tenth = max(1, math.ceil(total / 10))
    checkpoint_every = control.checkpoint_every or control.eval_every or tenth
    eval_every = control.eval_every or checkpoint_every
    evaluations = max(1, total // eval_every)
    # A forward pass costs a third of a step.
    affordable = EVAL_SHARE_OF_TRAINING * 3 * total * samples / evaluations
    eval_windows = state.eval_windows or min(n_val_windows, max(8, round(affordable)))
    return TrainingPlan(
        total_steps=total,
        steps_per_epoch=n_train_windows / samples,
        warmup_steps=warmup,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        log_every=control.log_every or max(1, total // 100),
        eval_windows=eval_windows,
        samples_per_step=samples,
        tokens_per_step=samples * context_length,
    )


def learning_rate_at(step: int, plan: TrainingPlan, scheduler: str, peak: float) -> float:
    """The rate of update `step`, counted from 0: linear warm-up, then the schedule.

    Cosine follows Loshchilov & Hutter 2017 (arXiv:1608.03983, eq. 5) down to a tenth of the peak;
    onecycle follows torch's OneCycleLR; linear falls to zero at the end.
    """
    warmup, total = plan.warmup_steps, plan.total_steps
    if scheduler == "onecycle":
        return _onecycle_rate(step, warmup, total, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if scheduler == "cosine":
        return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress) if scheduler == "linear" else peak


def _onecycle_rate(step: int, warmup: int, total: int, peak: float) -> float:
    def anneal(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))

    top = max(warmup - 1, 1)
    if step <= top:
        return anneal(peak * ONECYCLE_START, peak, step / top)
    return anneal(peak, peak * ONECYCLE_END, (step - top) / max(1, total - 1 - top))


def build_optimizer(
    model: torch.nn.Module, training: TrainingSettings, peak_rate: float
) -> torch.optim.Optimizer:
    """The optimizer, in two groups: weight matrices decay; norms, biases and embeddings do not.

    Fused kernels update all weights in one pass, and skip the update on the device itself when
    its gradients are not finite.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decaying = [p for n, p in named if p.dim() >= 2 and "embedding" not in n]
    others = [p for n, p in named if p.dim() < 2 or "embedding" in n]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=peak_rate, momentum=training.beta1, fused=True)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    betas = (training.beta1, training.beta2)
    return kind(groups, lr=peak_rate, betas=betas, eps=training.eps, fused=True)


class Trainer:
    """Model, optimizer and scaler, and the one training step everything goes through.

    Args:
        model_config: the architecture.
        training: how to update.
        runtime: device, precision and compilation, decided once.
        plan: the run's length, for the learning rate.
        peak_rate: the highest learning rate.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        training: TrainingSettings,
        runtime: Runtime,
        plan: TrainingPlan,
        peak_rate: float,
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.training, self.runtime, self.plan, self.peak_rate = training, runtime, plan, peak_rate
        torch.manual_seed(training.seed)
        with runtime.device:
            self.model = DecoderOnlyTransformer(
                model_config, gradient_checkpointing=gradient_checkpointing
            )
        self.optimizer = build_optimizer(self.model, training, peak_rate)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.needs_scaler)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._forward = torch.compile(self.model) if runtime.compile_model else self.model

    def train_step(self, step: int, batches: Iterable[tuple[Tensor, Tensor]]) -> StepResult:
        """One update from `gradient_accumulation_steps` batches of (inputs, targets), each (B T).

        Nothing here waits for the device.
        """
        rate = learning_rate_at(step, self.plan, self.training.scheduler, self.peak_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        accumulation = self.training.gradient_accumulation_steps
        total = torch.zeros((), device=self.runtime.device)
        for inputs, targets in batches:
            loss = self._compute_loss(inputs, targets) / accumulation
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        # An infinite limit measures the norm and changes nothing.
        limit = self.training.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        self._step_if_finite(norm + total)
        # Freed, not zeroed: the next backward pass writes instead of adding.
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(step + 1, self.plan.tokens_per_step, rate, total, norm)

    def _compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        try:
            with self.runtime.autocast():
                return self._forward(inputs, targets)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self._forward is self.model or is_out_of_memory(error.__cause__ or error):
                raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            say(f"torch.compile failed ({reason[:120]}); going on without it", "warning")
            self._forward = self.model
            with self.runtime.autocast():
                return self.model(inputs, targets)

    def _step_if_finite(self, witness: Tensor) -> None:
        """Update the weights unless `witness` is not finite; decided on the device.

        The fused kernels read `found_inf` as they do for a gradient scaler, which sets its own.
        """
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = (~torch.isfinite(witness)).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[tuple[Tensor, Tensor]], tokens_per_byte: float,
        stop: StopFlag | None = None,
    ) -> Evaluation | None:
        """Mean loss over (inputs, targets) batches; ``None`` when `stop` came in between."""
        self.model.eval()
        total = torch.zeros((), device=self.runtime.device, dtype=torch.float64)
        count = 0
        for inputs, targets in batches:
            with self.runtime.autocast():
                total += self.model(inputs, targets).double() * targets.numel()
            count += targets.numel()
            if stop is not None and stop.stopping:
                break
        self.model.train()
        if stop is not None and stop.stopping:
            return None
        loss = float(total) / count
        return Evaluation(loss, loss / math.log(2) * tokens_per_byte)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scaler and random state: all of a step's memory besides the weights."""
        rng = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "device": self.runtime.device.type,
        }

    def load_state_dict(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, and the weights.

        Raises:
            PreflightError: code CHECKPOINT, when the state belongs to another optimizer.
        """
        self.model.load_state_dict(weights, strict=True)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.runtime.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.runtime.device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"checkpoint.pt does not fit this run: {str(error)[:150]}",
                "continue with the optimizer it was trained with",
            ) from None
        if state.get("device") != self.runtime.device.type:
            say(f"note: trained on {state.get('device')}, going on on {self.runtime.device.type}: "
                 "equal samples, not equal bits")
