"""Predicted memory of a configuration, itemised: nothing is allocated, no device is needed.

The peaks come from `memory_trace`; here they become what a person asks: does it fit, what would
help, how much does each batch size need, how much disk and host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from preflight.foresight.memory_trace import Peaks, TraceCase, extend_peaks, trace_peaks
from preflight.models import loss as losses
from preflight.models.cost import count_parameters
from preflight.settings import ModelConfig, TrainingSettings

MIB = 2**20
PHASES = ("training step", "optimizer step", "evaluation", "generation", "resume")
# What the driver keeps for a CUDA context with torch's kernels (about 300 to 550 MiB, by card).
CUDA_CONTEXT_BYTES = 500 * MIB
# cuBLAS keeps a workspace for each thread that multiplies, here forward and backward; from
# Hopper on 32 MiB, before it 8 MiB and 128 KiB (torch/aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680
CUBLAS_WORKSPACE_BYTES_HOPPER = 2 * 32 * MIB
# Reserved beyond allocated: pieces of blocks too small for what is asked. Not yet measured.
CUDA_FRAGMENTATION = 0.05
# Share that the peak may be off, by (on CUDA, compiled). On the CPU measured, tests/test_memory.py.
_ERROR_SHARES = {(False, False): 0.01, (False, True): 0.05, (True, False): 0.03, (True, True): 0.1}
# Resident beside what is allocated: interpreter, libraries, and what malloc does not give back;
# on the CPU 400 to 490 MiB were seen (benchmarks/RESULTS.md), with CUDA it is a guess.
HOST_BASE_BYTES = {"cpu": 450 * MIB, "cuda": 2500 * MIB}

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. ``items`` adds up to ``needed_bytes``.

    Attributes:
        items: what the memory holds at the highest moment, by `memory_trace.ITEMS`. 16-bit copies
            of weights, which autocast makes, count as activations kept.
        phases: the highest allocation in each of `PHASES`.
        peak_bytes: the highest allocation of all; on CUDA to compare with
            ``torch.cuda.max_memory_allocated``.
        reserved_bytes: what the caching allocator holds then; ``max_memory_reserved``.
        needed_bytes: all that the device must have: reserved, and the CUDA context.
        host_bytes: resident memory of the process.
        disk_bytes: one checkpoint.
        error_share: how far off the peak may be; on the CPU as tested in tests/test_memory.py, on
            CUDA a goal that is not measured yet.
    """

    items: dict[str, int]
    phases: dict[str, int]
    peak_bytes: int
    reserved_bytes: int
    needed_bytes: int
    host_bytes: int
    disk_bytes: int
    error_share: float


def estimate_memory(
    model_config: ModelConfig,
    training: TrainingSettings,
    *,
    dtype: torch.dtype,
    device_type: str,
    gradient_checkpointing: bool = False,
    compile_model: bool = False,
    generation_batch_size: int = 1,
    hopper_or_newer: bool | None = None,
) -> MemoryEstimate:
    """Predict what a training run needs, from its first step through evaluation and samples.

    Args:
        model_config: the architecture.
        training: batch size, accumulation and optimizer count.
        dtype: what the products compute in, as in `Runtime.dtype`.
        device_type: ``cpu`` or ``cuda``; present or not.
        gradient_checkpointing: blocks are recomputed in the backward pass.
        compile_model: through torch.compile.
        generation_batch_size: texts written at once; the samples of a run are one.
        hopper_or_newer: which cuBLAS workspace; unset: the present card's, else the smaller.
    """
    case = TraceCase(
        model_config,
        training,
        dtype,
        device_type,
        gradient_checkpointing,
        compile_model,
        generation_batch_size,
    )
    return _summarise(trace_peaks(case), case, _estimate_workspace(device_type, hopper_or_newer))


def _summarise(peaks: Peaks, case: TraceCase, workspace: int) -> MemoryEstimate:
    totals = {region: sum(items.values()) for region, items in peaks.items()}
    top = max(totals, key=lambda region: totals[region])
    weights, optimizer = peaks[top]["weights"], peaks[top]["optimizer"]
    on_cuda = case.device_type == "cuda"
    phases = {
        phase: round(max(total for (name, _), total in totals.items() if name == phase)) + workspace
        for phase in PHASES[:-1]
    }
    # The weights are read to the host and copied; on the CPU the optimizer's state is used as read.
    phases["resume"] = round(weights * (1 if on_cuda else 2) + optimizer) + workspace
    peak = max(phases.values())
    reserved = round(peak * (1 + CUDA_FRAGMENTATION)) if on_cuda else peak
    context = CUDA_CONTEXT_BYTES if on_cuda else 0
    items = {item: round(size) for item, size in peaks[top].items()}
    items["context and workspace"] = context + workspace
    items["headroom"] = reserved + context - sum(items.values())
    host = HOST_BASE_BYTES["cuda" if on_cuda else "cpu"]
    return MemoryEstimate(
        items=items,
        phases=phases,
        peak_bytes=peak,
        reserved_bytes=reserved,
        needed_bytes=reserved + context,
        host_bytes=host + (round(weights + optimizer) if on_cuda else peak),
        disk_bytes=estimate_checkpoint_bytes(case.model_config, case.training),
        error_share=_ERROR_SHARES[on_cuda, case.compile_model],
    )


def _estimate_workspace(device_type: str, hopper_or_newer: bool | None) -> int:
    if device_type != "cuda":
        return 0
    if hopper_or_newer is None:
        hopper_or_newer = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return CUBLAS_WORKSPACE_BYTES_HOPPER if hopper_or_newer else CUBLAS_WORKSPACE_BYTES


def estimate_checkpoint_bytes(model_config: ModelConfig, training: TrainingSettings) -> int:
    """Disk space of one checkpoint: weights and optimizer state in fp32, and what frames them."""
    copies = {"adamw": 2, "adam": 2, "sgd": 1 if training.beta1 else 0}[training.optimizer]
    n_tensors = 4 + 12 * model_config.n_layers
    framing = 120 * n_tensors * (1 + 3 * copies)  # names, shapes and alignment
    return 4 * count_parameters(model_config) * (1 + copies) + framing


def estimate_least_bytes(model_config: ModelConfig, training: TrainingSettings) -> int:
    """What any step holds in any precision: weights, gradients, each block's input."""
    tokens = training.batch_size * model_config.context_length
    inputs = 2 * tokens * model_config.n_embeddings * model_config.n_layers  # in 16 bit
    return 8 * count_parameters(model_config) + inputs


def build_batch_curve(
    model_config: ModelConfig, training: TrainingSettings, **options: Any
) -> Callable[[int], MemoryEstimate]:
    """`estimate_memory` as a function of the batch size, for a search: two traces, then lines.

    Each stretch of a step grows by the same bytes with each sequence once the loss goes through
    its rows in several chunks; smaller batches are traced one by one. `options` are those of
    `estimate_memory`.
    """
    device_type = options["device_type"]
    rows = losses.loss_layout(device_type).rows
    first = -(-4 * rows // model_config.context_length)
    workspace = _estimate_workspace(device_type, options.pop("hopper_or_newer", None))
    base = TraceCase(
        model_config,
        training,
        **{
            "gradient_checkpointing": False,
            "compile_model": False,
            "generation_batch_size": 1,
            **options,
        },
    )

    def estimate(batch_size: int) -> MemoryEstimate:
        def at(size: int) -> TraceCase:
            return replace(base, training=replace(training, batch_size=size))

        if batch_size <= 2 * first:
            return _summarise(trace_peaks(at(batch_size)), at(batch_size), workspace)
        low, high = trace_peaks(at(first)), trace_peaks(at(2 * first))
        peaks = extend_peaks(low, high, (batch_size - first) / first)
        return _summarise(peaks, at(batch_size), workspace)

    return estimate


def judge_fit(needed_bytes: int, limit_bytes: int, margin: float = 0.15) -> Verdict:
    """Whether that much fits: with `margin` (a share of it) to spare, only without, or not."""
    if needed_bytes <= limit_bytes * (1 - margin):
        return "fits"
    return "tight" if needed_bytes <= limit_bytes else "does not fit"


def estimate_savings(
    model_config: ModelConfig, training: TrainingSettings, **options: Any
) -> dict[str, int]:
    """Bytes less needed by each change that could help, by the flags that make it.

    `options` are those of `estimate_memory`. Changes that save nothing are left out.
    """
    variants: dict[str, tuple[TrainingSettings, dict[str, Any]]] = {}
    if not options.get("gradient_checkpointing"):
        variants["--gradient-checkpointing"] = training, {"gradient_checkpointing": True}
    if training.batch_size > 1:
        half = training.batch_size // 2
        steps = -(-training.batch_size * training.gradient_accumulation_steps // half)
        variants[f"--batch-size {half} --gradient-accumulation-steps {steps}"] = (
            replace(training, batch_size=half, gradient_accumulation_steps=steps),
            {},
        )
    if options["dtype"] == torch.float32:
        variants["--mixed-precision"] = training, {"dtype": torch.bfloat16}
    before = estimate_memory(model_config, training, **options).needed_bytes
    saved = {
        flags: before - estimate_memory(model_config, changed, **{**options, **others}).needed_bytes
        for flags, (changed, others) in variants.items()
    }
    return {flags: size for flags, size in saved.items() if size > 0}
