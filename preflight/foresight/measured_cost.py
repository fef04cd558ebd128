"""What a run's parts take on the device at hand: real steps, timed.

Everything goes through `Trainer` and `BatchLoader`, as in a run. Where a step takes long, a smaller
one is timed and scaled by its floating-point operations, and the report says so.
"""

from __future__ import annotations

import dataclasses
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
from preflight.device.runtime import Runtime
from preflight.device.token_store import measure_free_bytes
from preflight.foresight.chat_time import measure_chat_steps
from preflight.foresight.memory import estimate_checkpoint_bytes
from preflight.foresight.run_time import RunCost
from preflight.foresight.timing import Batch, time_steps
from preflight.models.cost import (
    estimate_flops_per_token,
)
from preflight.settings import (
    ModelConfig,
    RunConfig,
    SamplingConfig,
)
from preflight.tokenization import Tokenizer
from preflight.training.plan import TrainingPlan
from train_utils import Loader, choose_data_place, iterate_windows, open_training_loader
from trainer import Trainer, build_trainer

TIMED_STEPS = 5
LONG_SECONDS = 3.0  # a step longer than this is timed fewer times, or in part
_SHORT_TOTAL_SECONDS, _LONG_TOTAL_SECONDS = 1.0, 15.0  # time spent on quick and on long steps
_SAMPLE_BYTES = 64 * 2**20  # of a checkpoint, to time writing and reading back


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
    for _ in range(2 if whole else 1):  # the first pass warms up
        seconds = _time_evaluation(trainer, data, rows, config.context_length, n_windows, load.cut)
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
    return _time_evaluation(trainer, chats, rows, plan.window_tokens, n_chats) / n_chats


def _time_evaluation(
    trainer: Trainer,
    data: DataFolder,
    rows: int,
    n_tokens: int,
    n_windows: int,
    cut: Callable[[Batch], Batch] = lambda batch: batch,
) -> float:
    """Seconds of evaluating `n_windows`, `rows` at a time; of each batch what `cut` leaves."""
    windows = iterate_windows(
        data,
        "val",
        batch_size=rows,
        context_length=n_tokens,
        n_windows=n_windows,
        device=trainer.runtime.device,
    )
    began = time.perf_counter()
    trainer.evaluate(map(cut, windows), 1.0)
    return time.perf_counter() - began


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
