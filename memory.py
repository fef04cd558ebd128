"""Predicted peak memory of a configuration, itemised: nothing is allocated, no device is needed.

The real `Trainer` runs on fake tensors (shapes without data) while a log notes the birth and the
death of every storage. Against torch's profiler this is exact to the byte in eager mode on the
CPU. Deep models are traced at two small depths: each stretch of a step grows by the same bytes
with each layer, so the line through both depths is exact as well. For CUDA the same trace runs
with the kernels of that device: its loss layout, fused dropout masks, flash attention.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import transformer_model
from config import ControlSettings, ModelConfig, SamplingConfig, TrainingSettings
from runtime import Runtime
from sampling import FILL_TOKENS, choose_tokens
from trainer import Trainer, build_plan
from transformer_model import KVCache, count_parameters

MIB = 2**20
ITEMS = ("weights", "gradients", "optimizer", "activations kept", "logits and loss", "temporary",
         "context and workspace", "headroom")
PHASES = ("training step", "optimizer step", "evaluation", "generation", "resume")
# Deeper models are traced at these depths. Three: a first, a last, and one of those between.
_DEPTHS = (3, 4)
# What the driver keeps for a CUDA context with torch's kernels (about 300 to 550 MiB, by card).
CUDA_CONTEXT_BYTES = 500 * MIB
# cuBLAS keeps a workspace for each thread that multiplies, here forward and backward; from
# Hopper on 32 MiB, before it 8 MiB and 128 KiB (torch/aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680
CUBLAS_WORKSPACE_BYTES_HOPPER = 2 * 32 * MIB
CUDA_BLOCK_BYTES = 512  # every CUDA allocation is a multiple of it
# Reserved beyond allocated: pieces of blocks too small for what is asked. Not yet measured.
CUDA_FRAGMENTATION = 0.05
# Share that the peak may be off, by (on CUDA, compiled). On the CPU measured, tests/test_memory.py.
_ERROR_SHARES = {(False, False): 0.01, (False, True): 0.05, (True, False): 0.03, (True, True): 0.1}
# Resident before anything is allocated: interpreter and libraries; with CUDA its libraries too.
HOST_BASE_BYTES = {"cpu": 450 * MIB, "cuda": 2500 * MIB}

Verdict = Literal["fits", "tight", "does not fit"]
_Region = tuple[str, str]  # phase, stretch of it
_Peaks = dict[_Region, dict[str, float]]  # bytes of each item at a stretch's highest moment


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. ``items`` adds up to ``needed_bytes``.

    Attributes:
        items: what the memory holds at the highest moment, by `ITEMS`. Low-precision copies of
            weights, which autocast makes, count as activations kept.
        phases: the highest allocation in each of `PHASES`.
        peak_bytes: the highest allocation of all; on CUDA to compare with
            ``torch.cuda.max_memory_allocated``.
        reserved_bytes: what the caching allocator holds then; ``max_memory_reserved``.
        needed_bytes: all that the device must have: reserved, and the CUDA context.
        host_bytes: resident memory of the process.
        disk_bytes: one checkpoint.
        error_share: how far off the peak may be, as measured (see tests/test_memory.py).
    """

    items: dict[str, int]
    phases: dict[str, int]
    peak_bytes: int
    reserved_bytes: int
    needed_bytes: int
    host_bytes: int
    disk_bytes: int
    error_share: float


@dataclass(eq=False)
class _Storage:
    size_bytes: int
    born: int
    died: int | None = None
    item: str = "temporary"
    ref: Any = None


class _AllocationLog(TorchDispatchMode):
    """Notes when each storage comes and goes; time is the count of operations."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.on_cuda = device_type == "cuda"
        self.clock = 0
        self.in_backward = False
        self.storages: list[_Storage] = []
        self.marks: list[tuple[int, _Region]] = []
        self._living: dict[int, _Storage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.clock += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # fake tensors hold no number to read
        if self.on_cuda and "flash_attention" in func.__name__ and "backward" in func.__name__:
            # FlashAttention-2 sums the query's gradient in fp32, and keeps a number a row.
            query = args[1]
            self._add(4 * query.numel() + 4 * query[..., 0].numel()).died = self.clock
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                record = self.find(leaf)
                # Autograd adds up real gradients in place, but not those of tensor subclasses
                # (torch/csrc/autograd/input_buffer.cpp): the sum takes over what a term had.
                if (self.in_backward and func is torch.ops.aten.add.Tensor
                        and not torch.is_grad_enabled()):
                    record.born = self.clock + 1
        return result

    def find(self, tensor: Tensor) -> _Storage:
        """The record of a tensor's storage, made when it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._living:
            self._living[key] = record = self._add(storage.nbytes())
            record.ref = weakref.ref(storage, lambda _: self._bury(key))
        return self._living[key]

    def _add(self, size_bytes: int) -> _Storage:
        if self.on_cuda:
            size_bytes = -(-size_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        self.storages.append(_Storage(size_bytes, self.clock))
        return self.storages[-1]

    def _bury(self, key: int) -> None:
        self._living.pop(key).died = self.clock

    def mark(self, phase: str, stretch: str) -> None:
        """From the next operation on, time belongs to this stretch."""
        self.marks.append((self.clock + 1, (phase, stretch)))

    def label(self, tensors: list[Tensor], item: str) -> None:
        """Say what some tensors are for."""
        for tensor in tensors:
            self.find(tensor).item = item

    def label_born(self, since: int, item: str) -> None:
        """Say what all living storages born after `since` and without a label are for."""
        for record in self._living.values():
            if record.born > since and record.item == "temporary":
                record.item = item

    def peaks(self) -> _Peaks:
        """The highest moment of each stretch; of stretches that repeat, the highest one."""
        change = [0] * (self.clock + 2)
        for record in self.storages:
            change[record.born] += record.size_bytes
            if record.died is not None:
                change[record.died + 1] -= record.size_bytes
        best: dict[_Region, tuple[int, int]] = {}
        marks = iter([*self.marks, (self.clock + 2, ("", ""))])
        start, region = 0, ("", "")
        following, upcoming = next(marks)
        total = 0
        for time in range(self.clock + 1):
            while time >= following:
                start, region = following, upcoming
                following, upcoming = next(marks)
            total += change[time]
            if time >= start and region[0]:
                best[region] = max(best.get(region, (-1, 0)), (total, time))
        return {region: self._itemise(time) for region, (_, time) in best.items()}

    def _itemise(self, time: int) -> dict[str, float]:
        items = dict.fromkeys(ITEMS, 0.0)
        for record in self.storages:
            if record.born <= time and (record.died is None or record.died >= time):
                items[record.item] += record.size_bytes
        return items


class _CudaKernels(TorchFunctionMode):
    """Where CUDA keeps other tensors than the CPU: the kernels it would choose, in CPU terms."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # Flash attention draws its dropout within the kernel and keeps a seed, not a mask.
            kwargs = {**kwargs, "dropout_p": 0.0}
        elif func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]  # its mask is of bytes
        elif func is torch.log_softmax and args[0].dtype != kwargs.get("dtype"):
            return torch.empty_like(args[0], dtype=kwargs["dtype"])  # no copy of the logits
        return func(*args, **kwargs)


@contextlib.contextmanager
def _pretend(device_type: str) -> Iterator[_AllocationLog]:
    """Fake tensors on the CPU, with the kernels and the loss layout of `device_type`."""
    layout = transformer_model.loss_layout
    transformer_model.loss_layout = lambda device_type=device_type: layout(device_type)
    log = _AllocationLog(device_type)
    kernels = contextlib.nullcontext() if device_type == "cpu" else _CudaKernels()
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(), kernels, log:
            yield log
    finally:
        transformer_model.loss_layout = layout


@dataclass(frozen=True)
class _Case:
    """All that a trace depends on; hashable."""

    model_config: ModelConfig
    training: TrainingSettings
    dtype: torch.dtype
    device_type: str
    gradient_checkpointing: bool
    compile_model: bool
    generation_batch_size: int


@functools.lru_cache(maxsize=64)
def _trace(case: _Case) -> _Peaks:
    """Peaks by tracing at full depth, or the line through two small depths."""
    depth = case.model_config.n_layers
    if depth <= max(_DEPTHS):
        return _trace_whole(case)
    low, high = (
        _trace_whole(replace(case, model_config=replace(case.model_config, n_layers=n)))
        for n in _DEPTHS
    )
    return _extend(low, high, (depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))


def _extend(low: _Peaks, high: _Peaks, share: float) -> _Peaks:
    """Stretch by stretch and item by item, the line through `low` (0) and `high` (1)."""
    return {
        region: {item: low[region][item] + share * (high[region][item] - low[region][item])
                 for item in ITEMS}
        for region in high
    }


def _trace_whole(case: _Case) -> _Peaks:
    config, training = case.model_config, case.training
    # The third micro-step and those after it are like the second.
    training = replace(training, gradient_accumulation_steps=min(
        2, training.gradient_accumulation_steps))
    runtime = Runtime(torch.device("cpu"), case.dtype, False, ())
    plan = build_plan(training, ControlSettings(), config.context_length, 1, 1)
    with _pretend(case.device_type) as log:
        trainer = Trainer(config, training, runtime, plan, 1e-3,
                          gradient_checkpointing=case.gradient_checkpointing)
        model, optimizer = trainer.model, trainer.optimizer
        log.label(list(model.parameters()), "weights")
        # The optimizer's state is there from the second step on; a tiny first one makes it.
        trainer.train_step(0, [_build_batch(1, 1)])
        states = [tree_leaves(state) for state in optimizer.state.values()]
        log.label([x for state in states for x in state if isinstance(x, Tensor)], "optimizer")
        _watch_step(log, trainer)
        batches = (_build_batch(training.batch_size, config.context_length)
                   for _ in range(training.gradient_accumulation_steps))
        log.mark("training step", "start")
        trainer.train_step(1, batches)
        log.mark("evaluation", "all")
        trainer.evaluate((_build_batch(training.batch_size, config.context_length)
                          for _ in range(2)), 1.0)
        log.mark("generation", "all")
        with runtime.autocast():
            _generate(model, case)
        log.mark("", "")
    return log.peaks()


def _build_batch(batch_size: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    shape = (batch_size, n_tokens)
    return torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)


def _watch_step(log: _AllocationLog, trainer: Trainer) -> None:
    """Mark the stretches of a step, and label storages at the moments that tell their use."""
    model, blocks = trainer.model, list(trainer.model.blocks)
    names = {0: "first block", len(blocks) - 1: "last block"}
    times = {"forward": 0, "loss": 0}
    forward = False

    def backward_of(stretch: str) -> Callable[[Tensor], None]:
        return lambda _: log.mark("training step", f"backward {stretch}")

    def before_model(*_: Any) -> None:
        nonlocal forward
        forward = torch.is_grad_enabled()  # else it is an evaluation
        log.in_backward = False
        if forward:
            times["forward"] = log.clock
            log.mark("training step", "embedding")

    def before_block(index: int, _: Any, inputs: tuple[Any, ...]) -> None:
        if forward:  # not recomputed in the backward pass
            log.mark("training step", names.get(index, "block"))
            stretch = "embedding" if index == 0 else names.get(index - 1, "block")
            inputs[0].register_hook(backward_of(stretch))

    def before_norm(_: Any, inputs: tuple[Tensor]) -> None:
        if forward:
            log.mark("training step", "loss")
            inputs[0].register_hook(backward_of(names[len(blocks) - 1]))

    def after_norm(*_: Any) -> None:
        times["loss"] = log.clock

    def after_model(*_: Any) -> None:
        nonlocal forward
        if forward:
            forward, log.in_backward = False, True
            log.label_born(times["loss"], "logits and loss")
            log.label_born(times["forward"], "activations kept")
            log.mark("training step", "backward loss")

    def before_update(*_: Any) -> None:
        log.in_backward = False
        log.mark("optimizer step", "all")
        log.label([p.grad for p in model.parameters() if p.grad is not None], "gradients")

    model.register_forward_pre_hook(before_model)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(functools.partial(before_block, index))
    model.final_norm.register_forward_pre_hook(before_norm)
    model.final_norm.register_forward_hook(after_norm)
    model.register_forward_hook(after_model)
    trainer.optimizer.register_step_pre_hook(before_update)


def _generate(model: transformer_model.DecoderOnlyTransformer, case: _Case) -> None:
    """Read windows as long as the context, then one token more in every row."""
    rows, context = case.generation_batch_size, case.model_config.context_length
    n_filled = max(1, min(rows, FILL_TOKENS // context))
    model.eval()
    with torch.no_grad():
        cache = KVCache(case.model_config, rows, torch.device("cpu"), case.dtype)
        windows = torch.zeros((n_filled, context - 1), dtype=torch.long)
        model.fill(windows, cache, list(range(n_filled)), [context - 1] * n_filled)
        del windows
        # Rows of different lengths need a mask.
        cache.lengths = [context - 1, *[max(0, context - 2)] * (rows - 1)]
        logits = model.read(torch.zeros(rows, dtype=torch.long), cache)
        choose_tokens(logits, SamplingConfig(), torch.zeros(rows))


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
    case = _Case(model_config, training, dtype, device_type, gradient_checkpointing,
                 compile_model, generation_batch_size)
    return _summarise(_trace(case), case, _estimate_workspace(device_type, hopper_or_newer))


def _summarise(peaks: _Peaks, case: _Case, workspace: int) -> MemoryEstimate:
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
        items=items, phases=phases, peak_bytes=peak, reserved_bytes=reserved,
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


def build_batch_curve(
    model_config: ModelConfig, training: TrainingSettings, **options: Any
) -> Callable[[int], MemoryEstimate]:
    """`estimate_memory` as a function of the batch size, for a search: two traces, then lines.

    Each stretch of a step grows by the same bytes with each sequence once the loss goes through
    its rows in several chunks; smaller batches are traced one by one. `options` are those of
    `estimate_memory`.
    """
    device_type = options["device_type"]
    rows, _ = transformer_model.loss_layout(device_type)
    first = -(-4 * rows // model_config.context_length)
    workspace = _estimate_workspace(device_type, options.pop("hopper_or_newer", None))
    base = _Case(model_config, training, **{
        "gradient_checkpointing": False, "compile_model": False, "generation_batch_size": 1,
        **options})

    def estimate(batch_size: int) -> MemoryEstimate:
        def at(size: int) -> _Case:
            return replace(base, training=replace(training, batch_size=size))

        if batch_size <= 2 * first:
            return _summarise(_trace(at(batch_size)), at(batch_size), workspace)
        low, high = _trace(at(first)), _trace(at(2 * first))
        peaks = _extend(low, high, (batch_size - first) / first)
        return _summarise(peaks, at(batch_size), workspace)

    return estimate


def judge_fit(needed_bytes: int, limit_bytes: int, margin: float = 0.15) -> Verdict:
    """Whether that much fits: with `margin` (a share of the limit) to spare, only without, or not.
    """
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
        variants[f"--batch-size {half} --gradient-accumulation-steps {steps}"] = replace(
            training, batch_size=half, gradient_accumulation_steps=steps), {}
    if options["dtype"] == torch.float32:
        variants["--mixed-precision"] = training, {"dtype": torch.bfloat16}
    before = estimate_memory(model_config, training, **options).needed_bytes
    saved = {
        flags: before - estimate_memory(
            model_config, changed, **{**options, **others}).needed_bytes
        for flags, (changed, others) in variants.items()
    }
    return {flags: size for flags, size in saved.items() if size > 0}
