"""How long a run takes: real steps timed on the present device, or an estimate for an absent one.

Everything that is timed goes through `Trainer` and `BatchLoader`, as in a run. Where a step takes
long, a smaller one is timed and scaled by its floating-point operations, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.storage import TEMPORARY_PREFIX
from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import choose_window, count_windows
from preflight.device.cards import Card
from preflight.device.runtime import Runtime
from preflight.device.token_store import measure_free_bytes
from preflight.foresight.chat_time import measure_chat_steps
from preflight.foresight.memory import estimate_checkpoint_bytes
from preflight.foresight.step_parts import LocalEstimate
from preflight.foresight.timing import Batch, time_steps
from preflight.models.cost import (
    count_parameters,
    estimate_adapter_flops_per_token,
    estimate_flops_per_token,
)
from preflight.settings import (
    ControlSettings,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TrainingSettings,
)
from preflight.tokenization import Tokenizer
from preflight.training.curve import CURVE_EVERY_SECONDS
from preflight.training.plan import TrainingPlan
from preflight.training.schedules import find_extension_step
from train_utils import Loader, choose_data_place, iterate_windows, open_training_loader
from trainer import Trainer, build_trainer

TIMED_STEPS = 5
LONG_SECONDS = 3.0  # a step longer than this is timed fewer times, or in part
_SHORT_TOTAL_SECONDS, _LONG_TOTAL_SECONDS = 1.0, 15.0  # time spent on quick and on long steps
_SAMPLE_BYTES = 64 * 2**20  # of a checkpoint, to time writing and reading back
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


# ---- without the device -------------------------------------------------------------------------


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


# ---- on the device ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Load:
    """The work of one timed step: micro-steps of sequences of tokens."""

    micro_steps: int
    sequences: int
    tokens: int

    def count_flops(self, config: ModelConfig) -> float:
        """Floating-point operations of a training step."""
        shorter = dataclasses.replace(config, context_length=self.tokens)
        return estimate_flops_per_token(shorter) * self.micro_steps * self.sequences * self.tokens

    def cut(self, batch: Batch) -> Batch:
        """The first sequences of a batch, and of these the first tokens."""
        inputs, targets = batch
        assert isinstance(targets, Tensor)  # of windows, which are alike
        rows, columns = slice(self.sequences), slice(self.tokens)
        return inputs[rows, columns].contiguous(), targets[rows, columns].contiguous()


def _choose_loads(
    full: _Load, expected_seconds: float, may_shrink: bool
) -> tuple[_Load | None, _Load]:
    """What to time: (None, the whole step), or a small and a larger part of a long step.

    Two parts give a line, and the whole step lies on it. A compiled step keeps its shapes, so that
    only micro-steps may be left out of it.
    """
    if expected_seconds <= LONG_SECONDS:
        return None, full
    micro_seconds = expected_seconds / full.micro_steps
    micro_steps = min(full.micro_steps, max(1, int(LONG_SECONDS / micro_seconds)))
    if not may_shrink:
        if full.micro_steps <= 2:
            return None, full
        part = dataclasses.replace(full, micro_steps=max(2, micro_steps))
        return (None, full) if part == full else (dataclasses.replace(full, micro_steps=1), part)
    sequences = min(full.sequences, max(1, int(full.sequences * LONG_SECONDS / micro_seconds)))
    share = LONG_SECONDS / (micro_seconds / full.sequences)
    tokens = min(full.tokens, max(32, int(full.tokens * share)))
    return _Load(1, 1, min(8, tokens)), _Load(micro_steps, sequences, tokens)


def measure_cost(
    config: RunConfig,
    model_config: ModelConfig,
    plan: TrainingPlan,
    runtime: Runtime,
    data: DataFolder,
    tokenizer: Tokenizer,
    expected_seconds: float,
) -> RunCost:
    """Time real steps, an evaluation, a sample and a checkpoint; nothing of it stays.

    Args:
        config: the run; the output folder's disk is the one that is timed.
        model_config: the architecture.
        plan: the run's numbers.
        runtime: a device that is present.
        data: prepared shards.
        tokenizer: theirs.
        expected_seconds: of a step by `estimate_cost`: whether it can be timed whole.

    Raises:
        PreflightError: the data or the disk fails.
        RuntimeError: out of memory; see `runtime.is_out_of_memory`.
    """
    full = _Load(
        config.training.gradient_accumulation_steps,
        config.training.batch_size,
        plan.window_tokens,
    )
    may_shrink = runtime.device.type == "cpu" and not runtime.compile_model
    loads = _choose_loads(full, expected_seconds, may_shrink)
    runtime.reset_peak_memory()
    cost = _measure_training(config, model_config, plan, runtime, data, tokenizer, full, *loads)
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # the trainer is gone
    seconds = _measure_checkpoint(config, model_config, runtime)
    return dataclasses.replace(cost, checkpoint_seconds=seconds)


def _measure_training(
    config: RunConfig,
    model_config: ModelConfig,
    plan: TrainingPlan,
    runtime: Runtime,
    data: DataFolder,
    tokenizer: Tokenizer,
    full: _Load,
    low: _Load | None,
    high: _Load,
) -> RunCost:
    """Everything but the checkpoint."""
    training, checkpointing = config.training, config.system.gradient_checkpointing
    context = model_config.context_length
    free_bytes = measure_free_bytes(runtime.device)
    place = choose_data_place(
        data, training, config.system, context, runtime.device.type, free_bytes
    )
    began = time.perf_counter()
    trainer = build_trainer(
        model_config, training, plan, runtime, gradient_checkpointing=checkpointing
    )
    runtime.synchronize()
    build_seconds = time.perf_counter() - began
    with open_training_loader(
        data, training, context, runtime.device, on_device=place.on_device
    ) as loader:
        if isinstance(data, ChatData):
            low = None
            first, times, step = measure_chat_steps(trainer, loader, data, training)
            window = _measure_chat_evaluation(trainer, data, plan)
        else:
            first, times, step = _measure_steps(trainer, loader, model_config, low, high, full)
            window_tokens = training.choose_window(context)
            windowed = dataclasses.replace(model_config, context_length=window_tokens)
            window = _measure_evaluation(trainer, data, plan, windowed, high)
        sample = _measure_sample(trainer, tokenizer)
    median = statistics.median(times)
    warm_up = max(0.0, first - median)
    cost = RunCost(
        step,
        window,
        sample,
        checkpoint_seconds=0.0,
        start_seconds=build_seconds + warm_up,
        basis=f"measured: median of {len(times)} steps{_describe_part(low, high, full)}",
        spread_share=(max(times) - min(times)) / median,
        n_timed=len(times),
        compile_seconds=warm_up if runtime.compile_model else 0.0,
    )
    if low is not None:
        return cost  # the peak of a part is not that of a step
    cuda = runtime.device if runtime.device.type == "cuda" else None
    reserved = torch.cuda.max_memory_reserved(cuda) if cuda else None
    return dataclasses.replace(
        cost, peak_bytes=runtime.peak_memory_bytes(), reserved_bytes=reserved
    )


def _describe_part(low: _Load | None, high: _Load, full: _Load) -> str:
    """What was timed instead of the whole step, for the report."""
    if low is None:
        return ""
    return (
        f", each {high.micro_steps} x {high.sequences} x {high.tokens} of {full.micro_steps} x "
        f"{full.sequences} x {full.tokens} tokens, scaled by FLOPs"
    )


def _measure_steps(
    trainer: Trainer,
    loader: Loader,
    config: ModelConfig,
    low: _Load | None,
    high: _Load,
    full: _Load,
) -> tuple[float, list[float], float]:
    """Seconds of the first step, of each timed one, and of a whole step."""

    def feed(load: _Load) -> Callable[[], Iterator[Batch]]:
        return lambda: (load.cut(loader.next_batch()) for _ in range(load.micro_steps))

    first = time_steps(trainer, feed(low or high), 1)[
        0
    ]  # compiles, allocates the optimizer's state
    second = time_steps(trainer, feed(high), 1)[0]
    count = TIMED_STEPS
    if second > LONG_SECONDS:
        count = max(1, min(TIMED_STEPS, int(_LONG_TOTAL_SECONDS / second)))
    elif second * TIMED_STEPS < _SHORT_TOTAL_SECONDS:
        count = min(200, int(_SHORT_TOTAL_SECONDS / second))
    times = time_steps(trainer, feed(high), count)
    step = statistics.median(times)
    if low is not None:
        # The line through both parts: what a step costs besides its FLOPs is in each of them.
        least = min(time_steps(trainer, feed(low), 3))
        done, more = (load.count_flops(config) for load in (low, high))
        step = least + (step - least) * (full.count_flops(config) - done) / (more - done)
    return first, times, step


def _measure_evaluation(
    trainer: Trainer, data: DataFolder, plan: TrainingPlan, config: ModelConfig, load: _Load
) -> float:
    """Seconds of evaluating one whole window."""
    rows = trainer.plan.samples_per_step // trainer.plan.accumulation_steps
    tokens = choose_window(data.val.n_tokens, config.context_length)
    whole = load.sequences == rows and load.tokens >= tokens
    n_windows = min(plan.eval_windows, 4 * rows) if whole else rows
    n_windows = min(n_windows, count_windows(data.val.n_tokens, config.context_length))
    seconds = 0.0
    for _ in range(2 if whole else 1):  # the first pass warms up
        batches = (
            load.cut(batch)
            for batch in iterate_windows(
                data,
                "val",
                batch_size=rows,
                context_length=config.context_length,
                n_windows=n_windows,
                device=trainer.runtime.device,
            )
        )
        began = time.perf_counter()
        trainer.evaluate(batches, 1.0)
        seconds = time.perf_counter() - began
    if whole:
        return seconds / n_windows
    part, window = (
        _Load(1, min(load.sequences, n_windows), min(load.tokens, tokens)),
        _Load(1, 1, tokens),
    )
    return seconds * window.count_flops(config) / part.count_flops(config)


def _measure_chat_evaluation(trainer: Trainer, chats: ChatData, plan: TrainingPlan) -> float:
    """Seconds of evaluating one chat."""
    rows = plan.samples_per_step // plan.accumulation_steps
    n_chats = min(plan.eval_windows, chats.val.n_documents, 2 * rows)
    batches = iterate_windows(
        chats,
        "val",
        batch_size=rows,
        context_length=plan.window_tokens,
        n_windows=n_chats,
        device=trainer.runtime.device,
    )
    began = time.perf_counter()
    trainer.evaluate(batches, 1.0)
    return (time.perf_counter() - began) / n_chats


def _measure_sample(trainer: Trainer, tokenizer: Tokenizer) -> float:
    """Seconds of the text that a run generates at each evaluation, from a third of it."""
    trainer.model.eval()
    n_tokens = SAMPLE_TOKENS // 3
    with trainer.runtime.autocast():
        generate_text(trainer.model, tokenizer, "", SamplingConfig(max_new_tokens=2))
        began = time.perf_counter()
        generate_text(trainer.model, tokenizer, "", SamplingConfig(max_new_tokens=n_tokens))
    trainer.model.train()
    return (time.perf_counter() - began) * SAMPLE_TOKENS / n_tokens


def _measure_checkpoint(config: RunConfig, model_config: ModelConfig, runtime: Runtime) -> float:
    """Seconds of one checkpoint, from saving one of at most 64 MiB beside the real ones."""
    whole = estimate_checkpoint_bytes(model_config, config.training)
    size = min(whole, _SAMPLE_BYTES)
    third = torch.zeros(size // 12, device=runtime.device)
    folder = Path(config.control.output_dir)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}check-", dir=folder) as name:
        began = time.perf_counter()
        save_checkpoint(
            Path(name),
            1,
            {"sample": third},
            {},
            {"model": dataclasses.asdict(model_config)},
            {"val_loss": None},
            optimizer={"sample.first": third, "sample.second": third.clone()},
        )
        seconds = time.perf_counter() - began
    return seconds * whole / size
