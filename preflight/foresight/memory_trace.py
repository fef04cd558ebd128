"""What the real training run holds in memory at each moment, traced on fake tensors.

`Trainer` runs on tensors that have shapes but no data, while a log notes when every storage is
allocated and freed. Against torch's profiler this is exact to the byte in eager mode on the CPU.
Deep models are traced at two small depths: each stretch of a step grows by the same bytes with each
layer, so the line through both is exact as well. For CUDA the same trace runs with what that
device does differently: its loss layout, fused dropout masks, flash attention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from generate import PREFILL_TOKENS
from preflight.decoding.choosing import choose_tokens
from preflight.device.runtime import Runtime
from preflight.foresight.absent_ranks import ONE_RANK, AbsentRanks, Sharing, pretend_ranks
from preflight.foresight.allocation_log import CUDA_BLOCK_BYTES, ITEMS, AllocationLog, Peaks
from preflight.foresight.memory_compiled import capture_graphs, trace_compiled_step
from preflight.models import loss as losses
from preflight.models import loss_fused
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.lora import add_adapters
from preflight.models.loss import TargetRows, Targets
from preflight.settings import ControlSettings, ModelConfig, SamplingConfig, TrainingSettings
from preflight.training import muon
from preflight.training.plan import build_plan
from trainer import Trainer, build_trainer
from transformer_model import Attention

# Deeper models are traced at these depths. Three: a first, a last, and one of those between.
DEPTHS = (3, 4)
_TRACED_MICRO_STEPS = 2
_LOSS_CHUNKS = 4  # that are traced: a first, two after another one, and a last, perhaps shorter


class _CudaDropout(nn.Module):
    """Dropout as CUDA does it: one kernel, and a mask of bytes."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


def _use_cuda_dropout(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.dropout = 0.0  # flash attention keeps a seed, not a mask
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, _CudaDropout(child.p))


@contextlib.contextmanager
def _pretend(device_type: str) -> Iterator[AllocationLog]:
    """Fake tensors on the CPU, with the kernels and the loss layout of `device_type`."""
    log = AllocationLog(device_type)
    with (
        _loss_of(device_type, whole=False),
        _muon_of(device_type),
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(),
        log,
        log.follow_resizes(),
    ):
        yield log


@contextlib.contextmanager
def _muon_of(device_type: str) -> Iterator[None]:
    """Muon's iteration in what that device computes it in: a card has bf16."""
    own = muon.choose_dtype
    if device_type != "cpu":
        muon.choose_dtype = lambda device: torch.bfloat16
    try:
        yield
    finally:
        muon.choose_dtype = own


@contextlib.contextmanager
def _loss_of(device_type: str, *, whole: bool) -> Iterator[None]:
    """The loss as that device computes it; unless `whole`, a few of its chunks, which are alike."""
    own_layout = losses.loss_layout
    own_chunks, own_blocks = losses.split_loss_rows, loss_fused.split_loss_blocks

    def cut(chunks: list[slice]) -> list[slice]:
        if whole or len(chunks) <= _LOSS_CHUNKS:
            return chunks
        return [*chunks[: _LOSS_CHUNKS - 1], chunks[-1]]

    def layout_there(_: str, dtype: torch.dtype = torch.float32) -> losses.LossLayout:
        return own_layout(device_type, dtype)

    losses.loss_layout = layout_there  # type: ignore[assignment]  # its first name does not matter
    losses.split_loss_rows = lambda hidden, weight: cut(own_chunks(hidden, weight))
    loss_fused.split_loss_blocks = lambda n_rows: cut(own_blocks(n_rows))
    try:
        yield
    finally:
        losses.loss_layout = own_layout
        losses.split_loss_rows, loss_fused.split_loss_blocks = own_chunks, own_blocks


@dataclass(frozen=True)
class TraceCase:
    """All that a trace depends on; hashable."""

    model_config: ModelConfig
    training: TrainingSettings
    dtype: torch.dtype
    device_type: str
    gradient_checkpointing: bool
    compile_model: bool
    generation_batch_size: int
    window_tokens: int
    target_share: float = 1.0
    sharing: Sharing = ONE_RANK

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Sequences of a micro-step, and tokens in each."""
        return self.training.batch_size, self.window_tokens

    @property
    def batch_bytes(self) -> int:
        """Inputs and targets of one micro-step, 8 bytes an id."""
        inputs, targets = self.build_batch(*self.batch_shape)
        tensors = [inputs, *([targets] if isinstance(targets, Tensor) else targets[:2])]
        block = CUDA_BLOCK_BYTES if self.device_type == "cuda" else 1
        return sum(-(-tensor.nbytes // block) * block for tensor in tensors)

    def build_batch(self, batch_size: int, n_tokens: int) -> tuple[Tensor, Targets]:
        """Inputs and targets of a micro-step of this shape."""
        shape = (batch_size, n_tokens)
        inputs = torch.zeros(shape, dtype=torch.long)
        if self.target_share == 1.0:
            return inputs, torch.zeros(shape, dtype=torch.long)
        n_targets = max(1, round(self.target_share * inputs.numel()))
        return inputs, _repeat_target(n_targets, inputs.numel())

    def build_first_batch(self) -> tuple[Tensor, Targets]:
        """One token, followed by as many targets as a micro-step has."""
        _, targets = self.build_batch(*self.batch_shape)
        n_targets = targets.numel() if isinstance(targets, Tensor) else len(targets.ids)
        return torch.zeros((1, 1), dtype=torch.long), _repeat_target(n_targets, 1)


def _repeat_target(n_targets: int, n_tokens: int) -> TargetRows:
    rows, ids = (torch.zeros(n_targets, dtype=torch.long) for _ in range(2))
    return TargetRows(rows, ids, n_tokens)


@functools.lru_cache(maxsize=64)
def trace_peaks(case: TraceCase) -> Peaks:
    """Peaks by tracing at full depth, or the line through two small depths.

    The third micro-step and those after it are like the second: only their batches are added.
    """
    n_more = case.training.gradient_accumulation_steps - _TRACED_MICRO_STEPS
    if n_more > 0:
        training = replace(case.training, gradient_accumulation_steps=_TRACED_MICRO_STEPS)
        return _add_batches(
            trace_peaks(replace(case, training=training)), n_more * case.batch_bytes
        )
    depth = case.model_config.n_layers
    if depth <= max(DEPTHS):
        return trace_whole(case)
    low, high = (
        trace_whole(replace(case, model_config=replace(case.model_config, n_layers=n)))
        for n in DEPTHS
    )
    return extend_peaks(low, high, (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def extend_peaks(low: Peaks, high: Peaks, share: float) -> Peaks:
    """Stretch by stretch and item by item, the line through `low` (0) and `high` (1)."""
    return {
        region: {
            item: low[region][item] + share * (high[region][item] - low[region][item])
            for item in ITEMS
        }
        for region in high
    }


def _add_batches(peaks: Peaks, n_bytes: int) -> Peaks:
    """An update holds the batches of all its micro-steps from its start to its end."""
    return {
        region: items | {"temporary": items["temporary"] + n_bytes}
        if region[0] in ("training step", "optimizer step")
        else items
        for region, items in peaks.items()
    }


def trace_whole(case: TraceCase) -> Peaks:
    """Peaks by tracing every layer of every micro-step."""
    config, training = case.model_config, case.training
    runtime = Runtime(torch.device("cpu"), case.dtype, False, ())
    plan = build_plan(training, ControlSettings(), case.window_tokens, 1, 1)
    # The ranks come first: they know each other by real numbers, not by fake tensors.
    with (
        pretend_ranks(case.sharing) as ranks,
        _pretend(case.device_type) as log,
        log.leave_out_shapes() if case.sharing.world > 1 else contextlib.nullcontext(),
    ):
        log.mark("building", "model")
        if isinstance(ranks, AbsentRanks):
            ranks.before_shard = lambda: log.mark("building", "sharding")
        trainer = build_trainer(
            *(config, training, plan, runtime),
            gradient_checkpointing=case.gradient_checkpointing,
            ranks=ranks,
        )
        log.mark("", "")
        if case.device_type != "cpu":
            assert isinstance(trainer.model, TokenModel)
            _use_cuda_dropout(trainer.model)
        run_phases(log, trainer, case)
    peaks = log.peaks()
    # Of a step that is compiled among ranks nothing is known but that the eager one holds more.
    is_alone = case.sharing.world == 1
    return _replace_step(peaks, case) if case.compile_model and is_alone else peaks


def run_phases(log: AllocationLog, trainer: Trainer, case: TraceCase) -> None:
    """What a run does after its first step: another one, an evaluation, the generation of text.

    On fake tensors this is the trace; on real ones, what a trace is compared with.
    """
    model, optimizer = trainer.model, trainer.optimizer
    assert isinstance(model, TokenModel)
    log.label(list(model.parameters()), "weights")
    # The optimizer's state and the buffer of the logits are there from the second step on. A first
    # one makes them: one token, that as many targets follow as there will be.
    before_first = log.clock
    trainer.train_step(0, [case.build_first_batch()])
    states = [tree_leaves(state) for state in optimizer.state.values()]
    log.label([x for state in states for x in state if isinstance(x, Tensor)], "optimizer")
    log.label_since(before_first, "logits and loss")  # the buffer: nothing else is left
    _StepWatcher(log, model).watch(optimizer)
    n_micro_steps = case.training.gradient_accumulation_steps
    batches = (case.build_batch(*case.batch_shape) for _ in range(n_micro_steps))
    log.mark("training step", "start")
    trainer.train_step(1, batches)
    log.mark("evaluation", "all")
    trainer.evaluate((case.build_batch(*case.batch_shape) for _ in range(2)), 1.0)
    log.mark("generation", "all")
    with trainer.runtime.autocast():
        generate_longest(model, case)
    log.mark("", "")


def _replace_step(peaks: Peaks, case: TraceCase) -> Peaks:
    """The stretches of the compiled step in place of those of the eager one.

    The compiler's graphs tell what one forward and backward pass allocates. What lives longer than
    that is taken from the eager trace: weights, optimizer state, gradients and batches; on a CPU
    also the loss, which is not compiled there.
    """
    config, training = case.model_config, case.training
    runtime = Runtime(torch.device("cpu"), case.dtype, False, ())
    # The compiler joins chunks, and lets some of their gradients live longer: all are needed.
    with (
        _loss_of(case.device_type, whole=True),
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model = build_model(config, gradient_checkpointing=case.gradient_checkpointing)
        if training.adapter is not None:
            add_adapters(model, training.adapter)
        if case.device_type != "cpu":
            _use_cuda_dropout(model)
        graphs = capture_graphs(model, runtime, case.build_batch(*case.batch_shape))
    start = peaks["training step", "start"]
    # From the second micro-step on, the gradients are there throughout.
    several = training.gradient_accumulation_steps > 1
    held = {
        "weights": start["weights"],
        "optimizer": start["optimizer"],
        "gradients": start["weights"] if several else 0.0,
        "activations kept": float(training.gradient_accumulation_steps * case.batch_bytes),
    }
    result = {region: items for region, items in peaks.items() if region[0] != "training step"}
    for stretch, moments in trace_compiled_step(*graphs).items():
        top = max(moments, key=lambda items: sum(items.values()))
        of_loss = _find_eager_loss(peaks, stretch, several) if case.device_type == "cpu" else {}
        result["training step", stretch] = {
            item: held.get(item, 0.0) + top.get(item, 0) + of_loss.get(item, 0.0) for item in ITEMS
        }
    return result


def _find_eager_loss(peaks: Peaks, stretch: str, several: bool) -> dict[str, float]:
    """What an eager loss holds in a stretch of a step that is compiled otherwise."""
    again = ", again" if several else ""
    if stretch == "loss":
        items = peaks["training step", f"loss{again}"]
        return {item: items[item] for item in ("logits and loss", "temporary")}
    same = "start" if stretch == "forward" else f"backward last block{again}"
    return {"logits and loss": peaks["training step", same]["logits and loss"]}


class _StepWatcher:
    """Marks the stretches of a step, and labels storages at the moments that tell their use.

    The marks of the forward pass come from hooks of the modules. Those of the backward pass come
    from hooks of the tensors between two stretches: when the gradient of a block's input is there,
    the backward pass has left that block and enters the one before.
    """

    def __init__(self, log: AllocationLog, model: TokenModel) -> None:
        self.log, self.model = log, model
        self._in_forward = False  # of training; not of an evaluation, nor of a recomputation
        self._forward_began = self._loss_began = self._n_begun = 0
        n_layers = len(model.layers)
        # Of the blocks between the first and the last, the highest stands for all.
        names = {0: "first block", n_layers - 1: "last block"}
        self._names = [names.get(index, "block") for index in range(n_layers)]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Set all hooks."""
        self.model.register_forward_pre_hook(self._before_model)
        for index, block in enumerate(self.model.layers):
            block.register_forward_pre_hook(functools.partial(self._before_block, index))
        self.model.norm.register_forward_pre_hook(self._before_norm)
        self.model.norm.register_forward_hook(self._after_norm)
        self.model.register_forward_hook(self._after_model)
        optimizer.register_step_pre_hook(self._before_update)

    def _mark_when_backward_leaves(self, tensor: Tensor, entered: str) -> None:
        if not tensor.requires_grad:  # frozen: the backward pass does not go on from here
            return
        tensor.register_hook(lambda _: self._mark(f"backward {entered}"))

    def _mark(self, stretch: str) -> None:
        # The gradients grow over the first micro-step, and are reduced over the last one: in each
        # of them a stretch grows with the layers along a line, in both together it does not.
        self.log.mark("training step", f"{stretch}, again" if self._n_begun > 1 else stretch)

    def _before_model(self, *_: Any) -> None:
        self._in_forward = torch.is_grad_enabled()
        self.log.in_backward = False
        if self._in_forward:
            self._forward_began = self.log.clock
            self._n_begun += 1
            self._mark("embedding")

    def _before_block(self, index: int, _: Any, inputs: tuple[Any, ...]) -> None:
        if self._in_forward:
            self._mark(self._names[index])
            before = self._names[index - 1] if index else "embedding"
            self._mark_when_backward_leaves(inputs[0], before)

    def _before_norm(self, _: Any, inputs: tuple[Tensor]) -> None:
        if self._in_forward:
            self._mark("loss")
            self._mark_when_backward_leaves(inputs[0], self._names[-1])

    def _after_norm(self, *_: Any) -> None:
        self._loss_began = self.log.clock

    def _after_model(self, *_: Any) -> None:
        if self._in_forward:
            self._in_forward, self.log.in_backward = False, True
            # The later ones first: a label, once given, stays.
            self.log.label_since(self._loss_began, "logits and loss")
            self.log.label_since(self._forward_began, "activations kept")
            self._mark("backward loss")

    def _before_update(self, *_: Any) -> None:
        self.log.in_backward = False
        self.log.mark("optimizer step", "all")
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.log.label(gradients, "gradients")


def generate_longest(model: TokenModel, case: TraceCase) -> None:
    """Prefill windows as long as the context, then decode one more token in every row."""
    rows, context = case.generation_batch_size, case.model_config.context_length
    n_prefilled = max(1, min(rows, PREFILL_TOKENS // context))
    model.eval()
    with torch.no_grad():
        cache = model.build_cache(rows, torch.device("cpu"), case.dtype)
        windows = torch.zeros((n_prefilled, context - 1), dtype=torch.long)
        model.prefill(windows, cache, list(range(n_prefilled)), [context - 1] * n_prefilled)
        del windows
        # Rows of different lengths need a mask.
        cache.lengths = [context - 1, *[max(0, context - 2)] * (rows - 1)]
        logits = model.decode(torch.zeros(rows, dtype=torch.long), cache)
        choose_tokens(logits, SamplingConfig(), torch.zeros(rows))
