"""Predicted memory of a configuration, itemised: nothing is allocated, no device is needed.

The peaks come from `memory_trace`. This file turns them into the memory that a device, the host
and the disk must have. Whether that fits, and what would help, is in `fits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from preflight.device.runtime import Runtime
from preflight.foresight.absent_ranks import ONE_RANK, Sharing
from preflight.foresight.allocation_log import RANK_ITEMS
from preflight.foresight.memory_trace import Peaks, TraceCase, extend_peaks, trace_peaks
from preflight.models import loss as losses
from preflight.models.building import build_on_meta
from preflight.models.cost import count_layer_inputs, count_parameters
from preflight.models.lora import add_adapters
from preflight.models.protocol import ParameterKind
from preflight.settings import AdapterConfig, ModelConfig, TrainingSettings
from preflight.settings.kinds import OPTIMIZERS

MIB = 2**20
PHASES = ("training step", "optimizer step", "evaluation", "generation", "resume")
# What the driver keeps for a CUDA context with torch's kernels (about 300 to 550 MiB, by card).
CUDA_CONTEXT_BYTES = 500 * MIB
# cuBLAS keeps a workspace for each thread that runs matmuls: one for forward, one for backward.
# It is 32 MiB from Hopper on, 8 MiB and 128 KiB before (ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680
CUBLAS_WORKSPACE_BYTES_HOPPER = 2 * 32 * MIB
# Reserved beyond allocated: free pieces of blocks that are too small to use. Not yet measured.
CUDA_FRAGMENTATION = 0.05
# What NCCL keeps for the channels of its rings. A guess; several GPUs were never measured.
NCCL_BYTES = 400 * MIB
# Relative error of the peak, by (on CUDA, compiled). Tested on the CPU in tests/foresight; on CUDA
# it is a goal that is not measured yet.
_ERROR_SHARES = {(False, False): 0.01, (False, True): 0.05, (True, False): 0.03, (True, True): 0.1}
# Of one of several ranks on CUDA: its streams hold buffers that the trace does not know.
_RANK_ERROR_SHARE = 0.1
# Resident beside the allocated tensors: interpreter, libraries, and freed memory that malloc keeps.
# 330 to 420 MiB were measured on the CPU (benchmarks/RESULTS.md, where torch's compiler is in all
# figures); the value for CUDA is a guess.
HOST_BASE_BYTES = {"cpu": 380 * MIB, "cuda": 2500 * MIB}
# torch's compiler, which gradient checkpointing imports too: 576 MiB of a run against 506 without.
# FSDP2 imports it as well: 365 MiB of one of two ranks before its model against 291 (nano, torch
# 2.13).
COMPILER_IMPORT_BYTES = 70 * MIB
COMPILER_HOST_BYTES = 80 * MIB  # of compiling, besides its import (benchmarks/LOG.md)


@dataclass(frozen=True)
class MemoryOptions:
    """What an estimate depends on besides the model and the training settings.

    Attributes:
        dtype: what the matmuls compute in, as in `Runtime.dtype`.
        device_type: ``cpu`` or ``cuda``; the device need not be present.
        gradient_checkpointing: each block is recomputed in the backward pass.
        compile_model: the step goes through torch.compile.
        generation_batch_size: sequences generated at once; a training run generates one.
        window_tokens: tokens of a training window, where they are fewer than the context length.
        data_bytes: of training tokens that are kept in the device's memory.
        target_share: of the tokens of the largest micro-batch, those that are learned.
        hopper_or_newer: decides the size of the cuBLAS workspace. Unset: asks the card that is
            present, and assumes an older one where there is none.
        sharing: the ranks that share the model. The estimate is that of the first, which holds
            most. A compiled step of several is taken for an eager one.
    """

    dtype: torch.dtype
    device_type: str
    gradient_checkpointing: bool = False
    compile_model: bool = False
    generation_batch_size: int = 1
    window_tokens: int | None = None
    data_bytes: int = 0
    hopper_or_newer: bool | None = None
    target_share: float = 1.0
    sharing: Sharing = ONE_RANK

    @classmethod
    def of(
        cls,
        runtime: Runtime,
        gradient_checkpointing: bool,
        window_tokens: int | None = None,
        data_bytes: int = 0,
        target_share: float = 1.0,
        sharing: Sharing = ONE_RANK,
    ) -> MemoryOptions:
        """The options of a training run on a device that is present."""
        return cls(
            runtime.dtype,
            "cuda" if runtime.device.type == "cuda" else "cpu",
            gradient_checkpointing,
            runtime.compile_model,
            window_tokens=window_tokens,
            data_bytes=data_bytes,
            target_share=target_share,
            sharing=sharing,
        )

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS keeps for itself."""
        if self.device_type != "cuda":
            return 0
        hopper = self.hopper_or_newer
        if hopper is None:
            hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
        return CUBLAS_WORKSPACE_BYTES_HOPPER if hopper else CUBLAS_WORKSPACE_BYTES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. ``items`` adds up to ``needed_bytes``.

    Attributes:
        items: what the memory holds at the peak, by `memory_trace.ITEMS`, and the training data
            where it is kept there. The 16-bit copies of
            the weights that autocast makes count as activations kept.
        phases: the peak of allocated memory in each of `PHASES`; of several ranks also in
            ``building``, when each has the whole model for a moment.
        peak_bytes: the highest of these peaks; on CUDA it compares with
            ``torch.cuda.max_memory_allocated``.
        reserved_bytes: what the caching allocator holds then; on CUDA it compares with
            ``torch.cuda.max_memory_reserved``.
        needed_bytes: reserved memory and the CUDA context.
        host_bytes: resident memory of the process.
        disk_bytes: one checkpoint.
        error_share: relative error that the peak may have.
        device_type: ``cpu`` or ``cuda``.
    """

    items: dict[str, int]
    phases: dict[str, int]
    peak_bytes: int
    reserved_bytes: int
    needed_bytes: int
    host_bytes: int
    disk_bytes: int
    error_share: float
    device_type: str

    @property
    def required_bytes(self) -> int:
        """What counts against the device's limit.

        On the CPU that is the resident memory of the process; on CUDA it is the memory that the
        allocator reserves, and the context.
        """
        return self.needed_bytes if self.device_type == "cuda" else self.host_bytes


def estimate_memory(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
) -> MemoryEstimate:
    """Predict what a training run needs, from its first step through evaluation and samples."""
    case = _build_case(model_config, training, options)
    return _summarise(trace_peaks(case), case, options)


def _build_case(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
) -> TraceCase:
    return TraceCase(
        model_config,
        training,
        options.dtype,
        options.device_type,
        options.gradient_checkpointing,
        options.compile_model,
        options.generation_batch_size,
        options.window_tokens or model_config.context_length,
        options.target_share,
        options.sharing,
    )


def _summarise(peaks: Peaks, case: TraceCase, options: MemoryOptions) -> MemoryEstimate:
    totals = {region: sum(items.values()) for region, items in peaks.items()}
    if options.sharing.world == 1:  # a model alone needs less than a step with it
        totals = {region: total for region, total in totals.items() if region[0] != "building"}
    top = max(totals, key=lambda region: totals[region])
    weights, optimizer = peaks[top]["weights"], peaks[top]["optimizer"]
    on_cuda, several = case.device_type == "cuda", options.sharing.world > 1
    workspace, data = options.workspace_bytes, options.data_bytes
    phases = {
        phase: round(max(total for (name, _), total in totals.items() if name == phase))
        + workspace
        + data
        for phase in ("building",) * several + PHASES[:-1]
    }
    # Resuming holds the weights twice on the CPU, as read and in the model; on CUDA they are read
    # into the host's memory. The optimizer adopts the tensors of its state as they were read. The
    # training tokens come to the device after that.
    phases["resume"] = round(weights * (1 if on_cuda else 2) + optimizer) + workspace
    peak = max(phases.values())
    # One tensor that lasts as long as the run is not fragmented.
    reserved = round(peak + (peak - data) * CUDA_FRAGMENTATION) if on_cuda else peak
    context = CUDA_CONTEXT_BYTES + NCCL_BYTES * several if on_cuda else 0
    items = {
        item: round(size) for item, size in peaks[top].items() if several or item not in RANK_ITEMS
    }
    if data:
        items["training data"] = data
    items["context and workspace"] = context + workspace
    items["headroom"] = reserved + context - sum(items.values())
    host = HOST_BASE_BYTES["cuda" if on_cuda else "cpu"]
    if not on_cuda and (case.compile_model or case.gradient_checkpointing or several):
        host += COMPILER_IMPORT_BYTES
    if case.compile_model and not on_cuda:
        host += COMPILER_HOST_BYTES
    return MemoryEstimate(
        items=items,
        phases=phases,
        peak_bytes=peak,
        reserved_bytes=reserved,
        needed_bytes=reserved + context,
        host_bytes=host + (round(weights + optimizer) if on_cuda else peak),
        disk_bytes=estimate_checkpoint_bytes(case.model_config, case.training),
        error_share=(
            _RANK_ERROR_SHARE
            if on_cuda and several
            else _ERROR_SHARES[on_cuda, case.compile_model and not several]
        ),
        device_type="cuda" if on_cuda else "cpu",
    )


def estimate_checkpoint_bytes(model_config: ModelConfig, training: TrainingSettings) -> int:
    """Disk space of one checkpoint: weights and optimizer state in fp32, and their headers."""
    copies = OPTIMIZERS.load(training.optimizer).state_copies
    total = 0.0
    for kind, n_tensors, n_parameters in _count_by_kind(model_config, training.adapter):
        held = copies(training, kind)
        headers = 120 * n_tensors * (1 + 3 * held)  # names, shapes and alignment
        total += 4 * n_parameters * (1 + held) + headers
    return round(total)


@functools.lru_cache(maxsize=64)
def _count_by_kind(
    model_config: ModelConfig, adapter: AdapterConfig | None
) -> list[tuple[ParameterKind, int, int]]:
    """The kinds of trainable parameters, with the tensors and the numbers of each."""
    model = build_on_meta(model_config)
    if adapter is not None:
        add_adapters(model, adapter)
    groups = model.parameter_groups()
    return [(g.kind, len(g.parameters), sum(p.numel() for p in g.parameters)) for g in groups]


def estimate_least_bytes(model_config: ModelConfig, training: TrainingSettings) -> int:
    """A lower bound of a step in any precision: weights, gradients, and each layer's input."""
    tokens = training.batch_size * model_config.context_length
    inputs = 2 * tokens * count_layer_inputs(model_config)  # in 16 bit
    return 8 * count_parameters(model_config) + inputs


def build_batch_curve(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
) -> Callable[[int], MemoryEstimate]:
    """`estimate_memory` as a function of the batch size, cheap enough for a search.

    From some batch size on, the loss goes through its rows in several chunks. From there each
    stretch of a step grows by the same bytes with each sequence, so that two traces give a line
    for every larger batch. Smaller batches are traced one by one.
    """
    layout = losses.loss_layout(options.device_type, options.dtype)
    rows = layout.count_rows(model_config.vocab_size)
    first = -(-4 * rows // (options.window_tokens or model_config.context_length))

    def build_case(batch_size: int) -> TraceCase:
        return _build_case(model_config, replace(training, batch_size=batch_size), options)

    def estimate(batch_size: int) -> MemoryEstimate:
        case = build_case(batch_size)
        if batch_size <= 2 * first:
            return _summarise(trace_peaks(case), case, options)
        low, high = trace_peaks(build_case(first)), trace_peaks(build_case(2 * first))
        return _summarise(extend_peaks(low, high, (batch_size - first) / first), case, options)

    return estimate


def estimate_savings(
    model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
) -> dict[str, int]:
    """Bytes that each change would save, by the flags that make the change; from 1 % on."""
    variants: dict[str, tuple[TrainingSettings, MemoryOptions]] = {}
    if not options.gradient_checkpointing:
        changed = replace(options, gradient_checkpointing=True)
        variants["--gradient-checkpointing"] = training, changed
    if training.batch_size > 1:
        half = training.batch_size // 2
        steps = -(-training.batch_size * training.gradient_accumulation_steps // half)
        smaller = replace(training, batch_size=half, gradient_accumulation_steps=steps)
        flags = f"--batch-size {half} --gradient-accumulation-steps {steps}"
        variants[flags] = smaller, options
    if options.dtype == torch.float32:
        variants["--mixed-precision"] = training, replace(options, dtype=torch.bfloat16)
    before = estimate_memory(model_config, training, options).needed_bytes
    saved = {
        flags: before - estimate_memory(model_config, *variant).needed_bytes
        for flags, variant in variants.items()
    }
    return {flags: size for flags, size in saved.items() if size >= before / 100}
