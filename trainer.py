"""`Trainer`: set-up, the training step and evaluation; the plan and the learning rate.

Every mode that measures goes through `Trainer`, so that it measures the real thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.rows import wrap_rows
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.host_memory import release_freed_memory
from preflight.device.ranks import Ranks, local_ranks
from preflight.device.runtime import Runtime, is_out_of_memory
from preflight.models.building import build_model
from preflight.models.lora import add_adapters, list_trained_weights, load_trained_weights
from preflight.models.loss import Targets, count_targets, count_tokens
from preflight.models.protocol import LanguageModel
from preflight.settings import ModelConfig, TrainingSettings
from preflight.settings.kinds import OPTIMIZERS
from preflight.training.evaluating import Evaluator
from preflight.training.optimizer_state import list_optimizer_tensors, load_optimizer_tensors
from preflight.training.optimizers import build_optimizer
from preflight.training.plan import TrainingPlan
from preflight.training.recording import StepRecorder
from preflight.training.saving import CheckpointSaver
from preflight.training.schedules import learning_rate_at
from preflight.training.state import Evaluation, StepResult, TrainState, convert_to_bits_per_byte
from train_utils import Loader


def build_trainer(
    model_config: ModelConfig,
    training: TrainingSettings,
    plan: TrainingPlan,
    runtime: Runtime,
    *,
    gradient_checkpointing: bool = False,
    weights: dict[str, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """A trainer of a new model: initialised from the seed, with the optimizer of the flags.

    Args:
        model_config: the architecture.
        training: the optimizer's settings; with an `adapter`, only adapters are trained.
        plan: as in `Trainer`.
        runtime: as in `Trainer`.
        gradient_checkpointing: recompute each block in the backward pass.
        weights: that the model begins with; unset: random ones.
        ranks: as in `Trainer`; the model is sharded over them.

    Raises:
        PreflightError: code FLAGS, when several ranks cannot train so.
    """
    ranks = ranks or local_ranks()
    refuse_unshared(training, ranks)
    torch.manual_seed(training.seed)
    with runtime.device:
        model = build_model(model_config, gradient_checkpointing=gradient_checkpointing)
        if weights is not None:
            model.load_state_dict(weights)
        if training.adapter is not None:
            add_adapters(model, training.adapter)
    ranks.shard(model)
    optimizer = build_optimizer(model, training, plan.peak_learning_rate)
    skips_on_device = OPTIMIZERS.load(training.optimizer).skips_on_device
    return Trainer(model, optimizer, plan, runtime, skips_on_device=skips_on_device, ranks=ranks)


def refuse_unshared(training: TrainingSettings, ranks: Ranks) -> None:
    """Refuse what cannot be computed on the parts of matrices that several ranks hold.

    Raises:
        PreflightError: code FLAGS.
    """
    if ranks.world > 1 and not OPTIMIZERS.load(training.optimizer).knows_shards:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--optimizer {training.optimizer}: not on {ranks.world} ranks, each of which holds a "
            "part of each matrix",
            f"use --optimizer {TrainingSettings().optimizer}, or --ranks 1",
        )


class Trainer:
    """Model, optimizer and scaler, and the one training step everything goes through.

    Args:
        model: on the runtime's device, in fp32.
        optimizer: over the model's parameters.
        plan: the run's length, for the learning rate, and how an update is made.
        runtime: device, precision and compilation, decided once.
        skips_on_device: as in `OptimizerSpec`.
        ranks: the processes over which the model is sharded; unset: this one alone.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        plan: TrainingPlan,
        runtime: Runtime,
        *,
        skips_on_device: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.plan, self.runtime = model, optimizer, plan, runtime
        self.skips_on_device = skips_on_device
        self.ranks = ranks or local_ranks()
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.needs_scaler)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._forward = model.compile_for_training() if runtime.compile_model else model

    def train_step(self, step: int, batches: Iterable[tuple[Tensor, Targets]]) -> StepResult:
        """One update from `plan.accumulation_steps` batches of inputs (B T) and targets.

        The loss is the mean over all targets of the update, however batches and ranks share them.
        An update without any target has no loss (NaN) and changes nothing. Nothing here waits for
        the device, unless the optimizer cannot skip an update by itself.
        """
        learning_rate = learning_rate_at(step, self.plan)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batches = list(batches)  # all of them, since each loss is divided by the targets of all
        counts = torch.stack([count_targets(targets) for _, targets in batches])
        (n_targets,) = self.ranks.total(counts.sum())
        total = torch.zeros((), device=self.runtime.device)
        for number, (inputs, targets) in enumerate(batches, 1):
            self.ranks.sync(self.model, last=number == len(batches))
            loss = self._compute_loss(inputs, targets) / n_targets
            self.scaler.scale(loss).backward()
            total += loss.detach()
        # Before the norm is taken, since a limit means unscaled gradients.
        self.scaler.unscale_(self.optimizer)
        total, norm = self.ranks.sum_up(total, self._parameters)
        # An infinite limit changes nothing.
        limit = self.plan.max_grad_norm or math.inf
        torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        self._step_if_finite(norm + total)
        # Freed, not zeroed: the next backward pass writes instead of adding. Those of the model,
        # since a gradient that is not finite must not stay where the optimizer has no part.
        self.model.zero_grad(set_to_none=True)
        n_tokens = self.ranks.add(sum(count_tokens(targets) for _, targets in batches))
        return StepResult(step + 1, n_tokens, learning_rate, total, norm)

    def train(
        self,
        state: TrainState,
        loader: Loader,
        recorder: StepRecorder,
        saver: CheckpointSaver,
        evaluator: Evaluator,
        stop: StopFlag,
    ) -> None:
        """Train to the end of the plan, or until a signal or the end of the patience.

        What was earned is saved before anything else can fail: step, log, save, evaluate, sample.
        """
        saver.retire()  # for a run cut between a save and the deletion of older checkpoints
        evaluator.evaluate_if_due()  # for a run cut between a save and its evaluation
        n_steps_before = state.step
        while self._goes_on(state) and not stop.agree():
            if state.step - n_steps_before < 2:
                # Loading, an evaluation and the first step leave holes between the tensors that
                # stay (the optimizer's state is new), too small for those of a step.
                release_freed_memory()
            self.ranks.seed_step(state.step)
            batches = [loader.next_batch() for _ in range(self.plan.accumulation_steps)]
            with self.ranks.watched_step(may_compile=self.runtime.compile_model):
                result = self.train_step(state.step, batches)
            state.advance(result, loader.cursor)
            recorder.record(result)
            saver.save_if_due()
            evaluator.evaluate_if_due()
        recorder.flush()
        saver.save()

    def _goes_on(self, state: TrainState) -> bool:
        patience = self.plan.patience
        is_patient = patience is None or state.stale_evaluations < patience
        return is_patient and state.step < self.plan.total_steps

    def _compute_loss(self, inputs: Tensor, targets: Targets) -> Tensor:
        try:
            with self.runtime.autocast():
                return self._forward(inputs, targets)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self._forward is self.model or is_out_of_memory(error.__cause__ or error):
                raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            log.warning(f"torch.compile failed ({reason[:120]}); continuing without it")
            self._forward = self.model
            with self.runtime.autocast():
                return self.model(inputs, targets)

    def _step_if_finite(self, finite_check: Tensor) -> None:
        """Update the weights unless `finite_check`, which loss and gradients enter, is not finite.

        An optimizer that skips on the device reads `found_inf`, which a gradient scaler sets by
        itself. Any other is not called at all.
        """
        if self.skips_on_device:
            if not self.scaler.is_enabled():
                is_bad = ~torch.isfinite(finite_check)
                self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            self.scaler.step(self.optimizer)
        elif torch.isfinite(finite_check):
            self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[tuple[Tensor, Targets]],
        tokens_per_byte: float,
        stop: StopFlag | None = None,
    ) -> Evaluation | None:
        """Mean loss over the targets of all batches; ``None`` when `stop` came in between."""
        self.model.eval()
        means: list[Tensor] = []
        counts: list[Tensor] = []
        for inputs, targets in batches:
            counts.append(count_targets(targets))
            with self.runtime.autocast():
                means.append(self.model(inputs, targets) / counts[-1].clamp(min=1))
            if stop is not None and stop.agree():
                break
        self.model.train()
        if stop is not None and stop.stopping:
            return None
        # Means in fp32, then a sum in fp64, here: some devices have no fp64 (Apple's mps). Read
        # after the last batch, so that no batch waits for the one before it.
        total, n_targets = 0.0, 0
        for mean, count in zip(means, counts, strict=True):
            total += float(mean) * int(count)
            n_targets += int(count)
        total, n_targets = self.ranks.add(total), self.ranks.add(n_targets)
        loss = total / n_targets if n_targets else math.nan
        return Evaluation(loss, convert_to_bits_per_byte(loss, tokens_per_byte))

    def list_weights(self) -> dict[str, Tensor]:
        """What training changes: all weights, or those of the adapters; sharded over the ranks."""
        return list_trained_weights(self.model)

    def list_optimizer_tensors(self) -> dict[str, Tensor]:
        """What the optimizer remembers of the steps, by ``<parameter>.<key>``."""
        return list_optimizer_tensors(self.model, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Scaler and random state: a step's memory besides the weights and the optimizer's."""
        rng = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        return {
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "device": self.runtime.device.type,
        }

    def load_state_dict(
        self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Restore what `list_weights`, `list_optimizer_tensors` and `state_dict` gave.

        Raises:
            PreflightError: code CHECKPOINT, when the state belongs to another optimizer.
        """
        own = self.list_weights()
        weights = {name: wrap_rows(w, own.get(name, w)) for name, w in weights.items()}
        load_trained_weights(self.model, weights)
        try:
            load_optimizer_tensors(self.model, self.optimizer, optimizer)
            if self.scaler.is_enabled() and state["scaler"]:
                found = {name: state["scaler"][name] for name in ("scale", "_growth_tracker")}
                self.scaler.load_state_dict(self.scaler.state_dict() | found)
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
            log.info(
                f"note: trained on {state.get('device')}, continuing on "
                f"{self.runtime.device.type}: same data order, but not bit-identical"
            )
