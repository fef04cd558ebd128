"""How long a run takes, from what its parts take: measured ones, or an estimate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from generate import SAMPLE_TOKENS
from preflight.device.cards import Card
from preflight.foresight.memory import estimate_checkpoint_bytes
from preflight.foresight.step_parts import LocalEstimate
from preflight.models.cost import (
    count_parameters,
    estimate_adapter_flops_per_token,
    estimate_flops_per_token,
)
from preflight.settings import (
    ControlSettings,
    ModelConfig,
    TrainingSettings,
)
from preflight.training.curve import CURVE_EVERY_SECONDS
from preflight.training.plan import TrainingPlan
from preflight.training.schedules import find_extension_step

_CURVE_SECONDS = 0.6  # drawing the loss curve, on one CPU core; a guess

# Shares of the data sheet's rates that a training step reaches in its matmuls and in its memory
# traffic, each taken alone. They follow public runs of GPT-2 on A100 and H100; not measured here.
CUDA_MATMUL_SHARE, CUDA_BANDWIDTH_SHARE = 0.6, 0.7
_ASSUMED_DISK_BYTES_PER_SECOND = 500e6  # written, read back and hashed
_ASSUMED_COMPILE_SECONDS = 60.0
_LAUNCH_SECONDS = 5e-6  # of one CUDA kernel
_KERNELS_PER_BLOCK = {False: 60, True: 20}  # forward and backward, by compiled or not
# A block keeps about 17 values per token and unit of the hidden size (Korthikanti et al. 2022,
# arXiv:2205.05198, section 4.1). Each is written, read forward and backward, and gets a gradient.
_TRAFFIC_PER_BLOCK = 5 * 17
_TRAFFIC_OF_LOGITS_BYTES = 20  # per logit: written, normalised in fp32, turned into a gradient
_TRAFFIC_OF_UPDATE_BYTES = 40  # per parameter: clipping, and AdamW's seven reads and writes


@dataclass(frozen=True)
class RunCost:
    """What the parts of a run take, in seconds.

    Attributes:
        step_seconds: one update; when measured, the median.
        spread_share: slowest less fastest, as a share of the median.
        n_timed: steps that were timed; 0 for an estimate.
        basis: where the figures come from, in words.
        window_seconds: evaluation of one window.
        sample_seconds: the text generated at each evaluation.
        checkpoint_seconds: one checkpoint, written and read back.
        start_seconds: building the model, and what the first step takes longer than the others,
            compilation included.
        compile_seconds: the part of the start that is compilation.
        peak_bytes: most memory in use: allocated on CUDA, resident on the CPU.
        reserved_bytes: most memory held by CUDA's caching allocator.
    """

    step_seconds: float
    window_seconds: float
    sample_seconds: float
    checkpoint_seconds: float
    start_seconds: float
    basis: str
    spread_share: float = 0.0
    n_timed: int = 0
    compile_seconds: float = 0.0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class RunTime:
    """A run's time by its parts, in seconds, and how many evaluations and checkpoints it has."""

    start_seconds: float
    training_seconds: float
    evaluation_seconds: float
    checkpoint_seconds: float
    n_evaluations: int
    n_checkpoints: int

    @property
    def total_seconds(self) -> float:
        """All of it."""
        return (
            self.start_seconds
            + self.training_seconds
            + self.evaluation_seconds
            + self.checkpoint_seconds
        )


def estimate_run_time(
    cost: RunCost, plan: TrainingPlan, control: ControlSettings, done_steps: int = 0
) -> RunTime:
    """Time of the rest of `plan` after `done_steps`, with evaluations and checkpoints.

    An upper bound where `find_earliest_stop` is a step.
    """
    n_steps = max(0, plan.total_steps - done_steps)
    training = n_steps * cost.step_seconds
    by_clock = math.ceil(control.checkpoint_minutes * 60 / max(cost.step_seconds, 1e-9))
    n_checkpoints = math.ceil(n_steps / min(plan.checkpoint_every, by_clock))
    n_checkpoints = min(n_steps, n_checkpoints + _count_special_checkpoints(plan, done_steps))
    n_evaluations = plan.total_steps // plan.eval_every - done_steps // plan.eval_every
    n_evaluations += plan.total_steps % plan.eval_every != 0
    n_curves = 1 + min(n_evaluations, training // CURVE_EVERY_SECONDS)
    evaluation = n_evaluations * (plan.eval_windows * cost.window_seconds + cost.sample_seconds)
    return RunTime(
        cost.start_seconds,
        training,
        evaluation + n_curves * _CURVE_SECONDS,
        n_checkpoints * cost.checkpoint_seconds,
        n_evaluations,
        n_checkpoints,
    )


def _count_special_checkpoints(plan: TrainingPlan, done_steps: int) -> int:
    """Checkpoints at other steps than the interval's: see `CheckpointSaver` and `Evaluator`.

    That before the decay of `wsd`, and with a patience the best models, one at each evaluation.
    """
    every, last = plan.checkpoint_every, plan.total_steps - 1  # the end has one in any case
    count = 0
    if plan.patience is not None and last > done_steps:
        for interval, sign in ((plan.eval_every, 1), (math.lcm(plan.eval_every, every), -1)):
            count += sign * (last // interval - done_steps // interval)
    start = find_extension_step(plan)
    if start is not None and done_steps < start <= last and start % every:
        count += plan.patience is None or start % plan.eval_every != 0
    return count


def find_earliest_stop(plan: TrainingPlan, done_steps: int = 0) -> int | None:
    """The first step after `done_steps` at which early stopping can end the run.

    The first evaluation of all is the best so far, and the patience begins after it. ``None``
    where no evaluation before the end can stop the run.
    """
    if plan.patience is None:
        return None
    n_evaluations = max(plan.patience + 1, done_steps // plan.eval_every + 1)
    step = n_evaluations * plan.eval_every
    return step if step < plan.total_steps else None


def estimate_cost(
    model_config: ModelConfig,
    training: TrainingSettings,
    *,
    dtype: torch.dtype,
    card: Card | None = None,
    here: LocalEstimate | None = None,
    gradient_checkpointing: bool = False,
    compile_model: bool = False,
    window_tokens: int | None = None,
) -> RunCost:
    """Seconds without the run's own steps: for a card by formula, from its matmul rate and traffic.

    Args:
        model_config: the architecture.
        training: batch size and accumulation count.
        dtype: what the matmuls compute in.
        card: rates of a graphics card, present or not.
        here: without a card, what `estimate_step` says of the device at hand.
        gradient_checkpointing: a third more work in the blocks (Chen et al. 2016).
        compile_model: fused kernels move less memory and need fewer launches.
        window_tokens: tokens of a training window, where they are fewer than the context length.
    """
    model_config = dataclasses.replace(
        model_config, context_length=window_tokens or model_config.context_length
    )
    samples = training.batch_size * training.gradient_accumulation_steps
    again = 4 / 3 if gradient_checkpointing else 1.0
    compile_seconds = _ASSUMED_COMPILE_SECONDS if compile_model else 0.0
    if card is None:
        assert here is not None
        step, token_seconds, basis = here.step_seconds, here.token_seconds, here.basis
    else:
        step, token_seconds, basis = _estimate_on_card(
            model_config, training, again, card, dtype, compile_model
        )
    return RunCost(
        step_seconds=step,
        window_seconds=step / samples / again / 3,  # a forward pass is a third of a step
        sample_seconds=SAMPLE_TOKENS * token_seconds,
        checkpoint_seconds=(
            estimate_checkpoint_bytes(model_config, training) / _ASSUMED_DISK_BYTES_PER_SECOND
        ),
        start_seconds=compile_seconds,
        basis=basis,
        compile_seconds=compile_seconds,
    )


def count_training_flops(model_config: ModelConfig, training: TrainingSettings) -> int:
    """Floating-point operations of a training step per token; frozen weights need no gradient."""
    if training.adapter is not None:
        return estimate_adapter_flops_per_token(model_config, training.adapter)
    return estimate_flops_per_token(model_config)


def _estimate_on_card(
    model_config: ModelConfig,
    training: TrainingSettings,
    again: float,
    card: Card,
    dtype: torch.dtype,
    compile_model: bool,
) -> tuple[float, float, str]:
    """Seconds of a step and of a generated token on a graphics card, and where they come from."""
    name, accumulation = str(dtype).removeprefix("torch."), training.gradient_accumulation_steps
    tokens = training.batch_size * accumulation * model_config.context_length
    parameters = count_parameters(model_config)
    flops = count_training_flops(model_config, training) * tokens * again
    rate = card.rate_tflops(name) * 1e12 * CUDA_MATMUL_SHARE
    bandwidth = card.bandwidth_gb_per_second * 1e9 * CUDA_BANDWIDTH_SHARE
    # Each micro-step reads the weights, and reads and writes the gradients: 12 bytes in fp32.
    moved = _estimate_traffic_bytes(model_config, tokens, dtype, compile_model) * again
    moved += parameters * (_TRAFFIC_OF_UPDATE_BYTES + 12 * accumulation)
    kernels = model_config.n_layers * _KERNELS_PER_BLOCK[compile_model] * again * accumulation
    # A small model's step is as long as Python takes to launch its kernels.
    step = max(flops / rate + moved / bandwidth, kernels * _LAUNCH_SECONDS)
    token_seconds = max(4 * parameters / bandwidth, model_config.n_layers * 20 * _LAUNCH_SECONDS)
    basis = (
        f"assumes {CUDA_MATMUL_SHARE:.0%} of the {name} rate and "
        f"{CUDA_BANDWIDTH_SHARE:.0%} of the bandwidth of the {card.name} ({card.source})"
    )
    return step, token_seconds, basis


def _estimate_traffic_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, compile_model: bool
) -> float:
    """Bytes between the card's memory and its processors in a step's forward and backward pass."""
    block = _TRAFFIC_PER_BLOCK * config.n_embeddings * dtype.itemsize
    if not compile_model:
        block = block * 3 // 2
    return tokens * (config.n_layers * block + config.vocab_size * _TRAFFIC_OF_LOGITS_BYTES)
