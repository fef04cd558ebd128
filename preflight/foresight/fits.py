"""What fits: the verdict on memory, the batch size that would fit, and the disk for checkpoints.

Every mode asks here, so that a report, a refusal and the message about a run that ran out of
memory suggest the same flags.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import free_bytes
from preflight.core.units import format_bytes
from preflight.device.host_memory import available_host_bytes, reachable_host_bytes
from preflight.device.runtime import Runtime, has_fast_bf16
from preflight.foresight.memory import (
    CUDA_CONTEXT_BYTES,
    MemoryOptions,
    build_batch_curve,
    estimate_checkpoint_bytes,
    estimate_least_bytes,
    estimate_memory,
    estimate_savings,
)
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings

# Share of the memory that stays free in a run that is said to fit.
MARGIN_SHARE = 0.15
# Memory slack: with 64 x the lower bound of a step available, the step fits and is not traced.
_SLACK = 64

Verdict = Literal["fits", "tight", "does not fit"]


# ---- memory -------------------------------------------------------------------------------------


def judge_fit(required_bytes: int, limit_bytes: int, margin_share: float = MARGIN_SHARE) -> Verdict:
    """Whether a run fits: with the margin to spare, only without it, or not at all."""
    if required_bytes <= limit_bytes * (1 - margin_share):
        return "fits"
    return "tight" if required_bytes <= limit_bytes else "does not fit"


def find_fitting_batch(
    model_config: ModelConfig,
    training: TrainingSettings,
    options: MemoryOptions,
    limit_bytes: int,
    *,
    margin_share: float = 0.0,
    below: int | None = None,
) -> tuple[int, int] | None:
    """The largest smaller micro-batch that fits and divides the update, and its accumulation.

    Their product is the present number of sequences per update.

    Args:
        model_config: the architecture.
        training: the present batch size and accumulation.
        options: the device and the step.
        limit_bytes: what the run may require, as `MemoryEstimate.required_bytes`.
        margin_share: share of the limit that has to stay free.
        below: the micro-batch is smaller than this; unset: than the present one.

    Returns:
        (batch size, accumulation), or ``None`` when not even one sequence fits.
    """
    n_sequences = training.batch_size * training.gradient_accumulation_steps
    # A smaller micro-batch accumulates, which keeps gradients between its micro-steps. Two
    # micro-steps need as much memory as any larger number of them.
    accumulating = replace(training, gradient_accumulation_steps=2)
    curve = build_batch_curve(model_config, accumulating, options)
    sizes = [n for n in range(1, below or training.batch_size) if n_sequences % n == 0]
    # Memory rises with the batch size, so that few of the divisors have to be traced.
    n_fitting = bisect_right(
        sizes, limit_bytes * (1 - margin_share), key=lambda n: curve(n).required_bytes
    )
    return (sizes[n_fitting - 1], n_sequences // sizes[n_fitting - 1]) if n_fitting else None


def suggest_fit(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions, limit_bytes: int
) -> str:
    """The flags of the same update that fit with the margin; gradient checkpointing comes last."""
    for checkpointing in (False, True):
        if options.gradient_checkpointing and not checkpointing:
            continue
        found = find_fitting_batch(
            model_config,
            training,
            replace(options, gradient_checkpointing=checkpointing),
            limit_bytes,
            margin_share=MARGIN_SHARE,
            # With checkpointing switched on, the present batch size may fit as well.
            below=training.batch_size + (checkpointing and not options.gradient_checkpointing),
        )
        if found:
            flags = "--gradient-checkpointing " * checkpointing
            return f"{flags}{format_batch_flags(*found)} fits"
    return "a smaller --model-size or --context-length; no batch size fits"


def format_batch_flags(batch_size: int, accumulation: int) -> str:
    """The two flags that make an update."""
    return f"--batch-size {batch_size} --gradient-accumulation-steps {accumulation}"


def measure_reachable_bytes(runtime: Runtime) -> int:
    """Memory that this process could have: what it holds, and what is free.

    On CUDA it includes our context, which counts as required in the prediction.
    """
    if runtime.device.type != "cuda":
        return reachable_host_bytes()
    free, total = torch.cuda.mem_get_info(runtime.device)
    ours = torch.cuda.memory_reserved(runtime.device) + CUDA_CONTEXT_BYTES
    return min(total, free + ours)


def _measure_share_bytes(runtime: Runtime, options: MemoryOptions) -> int:
    """What one rank could have of it: each has its own card, but on a CPU they share the host."""
    n_sharing = options.sharing.ranks_per_host if runtime.device.type == "cpu" else 1
    return measure_reachable_bytes(runtime) // n_sharing


def check_memory(
    model_config: ModelConfig,
    training: TrainingSettings,
    runtime: Runtime,
    options: MemoryOptions,
    last_checkpoint: Path | str,
) -> None:
    """Refuse a run that cannot fit before it starts; asked on the CPU only.

    There it would not fail but swap for hours. On a graphics card the first step fails at once.
    The ranks of a host share its memory.

    Raises:
        PreflightError: code OUT_OF_MEMORY.
    """
    reachable = _measure_share_bytes(runtime, options)
    least = estimate_least_bytes(model_config, training)
    if runtime.device.type != "cpu" or _SLACK * least < reachable:
        return
    required = estimate_memory(model_config, training, options).required_bytes
    if required > reachable:
        error = MemoryError(
            f"{format_bytes(required)} are needed, {format_bytes(reachable)} are available"
        )
        raise explain_out_of_memory(
            error, model_config, training, runtime, options, last_checkpoint
        )


def explain_out_of_memory(
    error: BaseException,
    model_config: ModelConfig,
    training: TrainingSettings,
    runtime: Runtime,
    options: MemoryOptions,
    last_checkpoint: Path | str,
) -> PreflightError:
    """What was tried, the flags that keep the tokens per step, and which checkpoint is safe."""
    batch, window = training.batch_size, options.window_tokens or model_config.context_length
    lines = [
        f"out of memory with {batch} sequences of {window} tokens: "
        f"{_describe_shortage(error, runtime)}"
    ]
    limit_bytes = _measure_share_bytes(runtime, options)
    found = _find_smaller_batch(model_config, training, options, limit_bytes)
    if found:
        lines.append(
            f"try {format_batch_flags(*found)}: the same update of {found[0] * found[1]} "
            "sequences, in less memory"
        )
    if not options.gradient_checkpointing:
        saved = estimate_savings(model_config, training, options).get("--gradient-checkpointing")
        lines.append(
            f"--gradient-checkpointing would save {format_bytes(saved)}"
            if saved
            else "--gradient-checkpointing would save nothing: the peak is not in the blocks"
        )
    lines.append(f"last checkpoint, safe: {last_checkpoint}")
    return PreflightError(ExitCode.OUT_OF_MEMORY, *lines)


def explain_rank_out_of_memory(
    error: BaseException,
    training: TrainingSettings,
    runtime: Runtime,
    rank: int,
    command: str,
    last_checkpoint: Path | str,
) -> PreflightError:
    """As `explain_out_of_memory`, told at once by one of several ranks, for which others wait.

    Args:
        error: the allocator's.
        training: of the run.
        runtime: of the rank.
        rank: its number.
        command: that predicts what a rank needs, and says what would save memory.
        last_checkpoint: of the run.
    """
    return PreflightError(
        ExitCode.OUT_OF_MEMORY,
        f"rank {rank}: out of memory with {training.batch_size} sequences: "
        f"{_describe_shortage(error, runtime)}",
        "a smaller --batch-size keeps the update; more --ranks need less memory each",
        f"what each rank needs, and what would save memory: {command}",
        f"last checkpoint, safe: {last_checkpoint}",
    )


def _find_smaller_batch(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions, limit_bytes: int
) -> tuple[int, int] | None:
    """What to try after the present batch size has failed: at least a single sequence."""
    batch, below = training.batch_size, None
    if batch == 1:
        return None
    if estimate_memory(model_config, training, options).required_bytes <= limit_bytes:
        # The prediction says that the present batch fits, and it did not. Where a prediction
        # has failed, only half of the batch that it allows is worth a try.
        below = batch // 2 + 1
    found = find_fitting_batch(model_config, training, options, limit_bytes, below=below)
    return found or (1, batch * training.gradient_accumulation_steps)


def _describe_shortage(error: BaseException, runtime: Runtime) -> str:
    """An allocator's message in few words: what was asked for, and what was free."""
    text = " ".join(str(error).split())
    tried = re.search(r"tried to allocate ([\d.]+ ?(?:[KMGT]iB|bytes))", text, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+ (?:[KMGT]iB|bytes)) is free", text)
    if not tried:
        return text[:150] or "no memory is left"
    amount = tried[1]
    if amount.endswith("bytes"):
        amount = format_bytes(int(float(amount.removesuffix("bytes"))))
    if free:
        return f"tried to allocate {amount}, {free[1]} were free"
    if runtime.device.type != "cuda":
        available = format_bytes(available_host_bytes())
        return f"tried to allocate {amount}, {available} are available"
    return f"tried to allocate {amount}"


# ---- disk ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskSpace:
    """Room for a run's checkpoints.

    Attributes:
        needed_bytes: the checkpoints at their largest number.
        free_bytes: free on the disk.
        kept_bytes: held by checkpoints that are there already and will be replaced.
        fault: what is wrong and the flags that fix it; ``None`` when there is room.
    """

    needed_bytes: int
    free_bytes: int
    kept_bytes: int
    fault: tuple[str, str] | None


def estimate_disk_bytes(
    model_config: ModelConfig,
    training: TrainingSettings,
    control: ControlSettings,
    total_steps: int | None = None,
) -> int:
    """Disk space of the checkpoints: the newest, the best, and the one that is being written.

    And the one from which a run with `wsd` can be made longer.
    """
    count = control.max_checkpoints + (3 if training.scheduler == "wsd" else 2)
    count = min(count, total_steps or count)
    return count * estimate_checkpoint_bytes(model_config, training)


def check_disk(
    output_dir: Path,
    model_config: ModelConfig,
    training: TrainingSettings,
    control: ControlSettings,
    total_steps: int | None,
) -> DiskSpace:
    """Whether the disk has room for the checkpoints of a run of `total_steps`."""
    needed = estimate_disk_bytes(model_config, training, control, total_steps)
    free, kept = free_bytes(output_dir), 0
    for path in (output_dir / "milestones").rglob("*"):
        with contextlib.suppress(OSError):  # a run may be deleting it at this moment
            kept += path.stat().st_size if path.is_file() else 0
    fault = None
    if needed > free + kept:
        fault = (
            f"disk: {format_bytes(needed)} needed for checkpoints in {output_dir}, "
            f"{format_bytes(free)} free",
            "choose another --output-dir, or fewer --max-checkpoints "
            f"(now {control.max_checkpoints})",
        )
    return DiskSpace(needed, free, kept, fault)


# ---- precision ----------------------------------------------------------------------------------


def find_bf16_fault(runtime: Runtime, asked: bool | None) -> tuple[str, str] | None:
    """What is wrong and its fix, when mixed precision is asked for and the device has no bf16."""
    if not asked or has_fast_bf16(runtime.device):
        return None
    return (
        f"mixed precision was asked for, and {runtime.device} has no bf16 in hardware: "
        f"{str(runtime.dtype).removeprefix('torch.')} is used",
        "leave --mixed-precision out, or use --no-mixed-precision",
    )
