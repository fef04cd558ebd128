"""Cross-entropy over a large vocabulary without holding all logits.

Shapes: N = B * T rows, C hidden size, V vocabulary, R rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from preflight.models.loss_fused import (
    BLOCK_ROWS,
    NO_TARGET,
    cross_entropy_,
    cross_entropy_by_blocks_,
)

# Rows of logits held at once by the loss (measured, benchmarks/LOG.md). On the CPU, GPT-2's are
# over the 32 MiB up to which malloc keeps freed blocks; on CUDA they fill the card.
LOSS_ROWS_CPU = 256
LOSS_ROWS_CUDA = 2048
# In bf16 a CPU is fastest with one large matmul, as CUDA is.
LOSS_ROWS_CPU_BF16 = 2048
_MAX_LOGITS_BYTES = 256 * 2**20  # of that matmul; a larger vocabulary gets fewer rows
_CAST_BYTES = (
    2 * 2**20
)  # of a gradient cast at once, so that it stays in a cache (benchmarks/LOG.md)
# Matrix units want every dimension to be a multiple of this; 50,257 is odd.
VOCAB_MULTIPLE = 64

# By output head, for as long as that lives: the buffer of its logits, while no loss uses it.
_kept_buffers = WeakTensorKeyDictionary()


class LossLayout(NamedTuple):
    """How a device computes the loss.

    Attributes:
        rows: of logits held at once.
        vocab_multiple: the vocabulary is padded to a multiple of this.
        weight_first: whether fp32 logits are V C times C R, and lie in columns: MKL is up to 1.7
            times faster so than with R C times C V.
        fused: whether logits are turned into their gradient in place, without a copy in fp32.
        keeps_logits: whether one buffer serves every chunk of every loss of a head: fresh memory
            costs a page fault every 4 KiB, and malloc may find a place for it elsewhere each time.
            A card's allocator keeps it by itself.
    """

    rows: int
    vocab_multiple: int
    weight_first: bool
    fused: bool = False
    keeps_logits: bool = False

    def count_rows(self, vocab_size: int) -> int:
        """`rows`, or fewer where the logits of so many would be too large to keep."""
        if not (self.fused and self.keeps_logits):
            return self.rows
        most = _MAX_LOGITS_BYTES // (2 * vocab_size) // BLOCK_ROWS * BLOCK_ROWS
        return min(self.rows, max(BLOCK_ROWS, most))


def loss_layout(device_type: str, dtype: torch.dtype = torch.float32) -> LossLayout:
    """What is fastest on that device, for logits of that type."""
    if device_type == "cuda":
        return LossLayout(LOSS_ROWS_CUDA, VOCAB_MULTIPLE, weight_first=False, fused=True)
    if device_type != "cpu":
        return LossLayout(LOSS_ROWS_CUDA, 1, weight_first=False)
    if dtype == torch.float32:
        return LossLayout(LOSS_ROWS_CPU, 1, weight_first=True, keeps_logits=True)
    return LossLayout(
        LOSS_ROWS_CPU_BF16, VOCAB_MULTIPLE, weight_first=False, fused=True, keeps_logits=True
    )


class TargetRows(NamedTuple):
    """The targets of a batch that has few: only their rows go through the output head.

    Attributes:
        rows: (N,) int64, where they stand in the flattened batch (B * T).
        ids: (N,) int64, the targets there.
        n_tokens: of the batch without padding.
    """

    rows: Tensor
    ids: Tensor
    n_tokens: int


Targets = Tensor | TargetRows  # ids (B T), in which -100 is no target; or the rows with one


def count_targets(targets: Targets) -> Tensor:
    """How many of these ids are targets; a scalar on their device, so that nobody waits for it."""
    if isinstance(targets, TargetRows):
        return targets.ids.new_full((), len(targets.ids))
    return (targets != NO_TARGET).sum()


def count_tokens(targets: Targets) -> int:
    """Tokens of a batch, padding left out."""
    return targets.n_tokens if isinstance(targets, TargetRows) else targets.numel()


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return softcap * torch.tanh(logits / softcap)


def compute_loss(x: Tensor, weight: Tensor, targets: Targets, softcap: float | None) -> Tensor:
    """`linear_cross_entropy` of vectors (B T C), or of those that a target follows."""
    hidden = x.flatten(0, 1)
    if isinstance(targets, TargetRows):
        hidden, ids = hidden.index_select(0, targets.rows), targets.ids
    else:
        ids = targets.flatten()
    return linear_cross_entropy(hidden, weight, ids, softcap)


def choose_loss_of_compiled(device_type: str) -> Callable[..., Tensor]:
    """`compute_loss` for a compiled model: left out of its graphs where a buffer is kept.

    It is faster so, and the rest takes less than half of the time to compile (benchmarks/LOG.md).
    """
    is_left_out = loss_layout(device_type).keeps_logits
    return torch.compiler.disable(compute_loss) if is_left_out else compute_loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T`` against `targets`, never holding all logits.

    Args:
        hidden: rows (N C), of which logits are made a few at a time.
        weight: the output head (V C).
        targets: ids (N,). A row whose target is -100 adds nothing to the loss or the gradients.
        softcap: of `cap_logits`, which the logits go through.

    Returns:
        A scalar in fp32. Its gradients are computed in the same pass, while the logits are at
        hand, so that nothing is computed twice (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        hidden = hidden.to(dtype)
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(hidden, weight, targets, softcap)
        layout = loss_layout(device, dtype)
        n_ids, head = len(weight), _cast_head(weight, dtype, layout)
        total = hidden.new_zeros((), dtype=torch.float32)
        buffer = _take_logits_buffer(weight, hidden, len(head))
        for rows in split_loss_rows(hidden, head):
            logits = _compute_logits(hidden[rows], head, buffer)
            if layout.fused:
                total += _score_fused(logits, targets[rows], n_ids, softcap, False)
                continue
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            total += _score_rows(logits, *_split_mask(targets[rows]), n_ids, buffer)[0]
        _keep_logits_buffer(weight, buffer)
        return total


def _cast_head(weight: Tensor, dtype: torch.dtype, layout: LossLayout) -> Tensor:
    """The head (V C) in `dtype`, with rows of zeros up to the layout's multiple."""
    n_ids, padding = len(weight), -len(weight) % layout.vocab_multiple
    if weight.dtype == dtype and not padding:
        return weight
    head = weight.new_empty((n_ids + padding, weight.shape[1]), dtype=dtype)
    head[:n_ids].copy_(weight)
    head[n_ids:].zero_()
    return head


def _split_mask(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that can be looked up, and which rows have no target; both (R 1)."""
    masked = targets[:, None] == NO_TARGET
    return targets[:, None].masked_fill(masked, 0), masked


def split_loss_rows(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The rows of the loss (N C), as many at a time as `loss_layout` says."""
    rows = loss_layout(hidden.device.type, hidden.dtype).count_rows(len(weight))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _take_logits_buffer(weight: Tensor, hidden: Tensor, n_columns: int) -> Tensor | None:
    """Room for one chunk's logits (R V): what the last loss of this head kept, where that is large
    enough. ``None`` where the layout has no buffer.
    """
    layout = loss_layout(hidden.device.type, hidden.dtype)
    if not layout.keeps_logits:
        return None
    size = n_columns * min(layout.count_rows(n_columns), len(hidden))
    kept = _kept_buffers.pop(weight, None)  # taken out: two threads never write into one
    if kept is not None and kept.dtype == hidden.dtype and kept.numel() >= size:
        return kept
    del kept  # before there is another
    return hidden.new_empty(size)


def _keep_logits_buffer(weight: Tensor, buffer: Tensor | None) -> None:
    """Put a buffer of `_take_logits_buffer` back for the next loss of this head."""
    if buffer is not None and not buffer.is_inference():  # no training step could write into that
        _kept_buffers[weight] = buffer


def _compute_logits(hidden: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """Logits (R V) of rows (R C), where there is a buffer in it: fp32 in columns, bf16 in rows."""
    if buffer is None:
        return hidden @ weight.T
    if not loss_layout(hidden.device.type, hidden.dtype).weight_first:
        out = buffer[: len(weight) * len(hidden)].view(len(hidden), len(weight))
        return torch.mm(hidden, weight.T, out=out)
    columns = buffer[: len(weight) * len(hidden)].view(len(weight), len(hidden))  # V R
    return torch.mm(weight, hidden.T, out=columns).T


def _score_fused(
    logits: Tensor, targets: Tensor, n_ids: int, softcap: float | None, with_gradient: bool
) -> Tensor:
    """One chunk's summed cross-entropy (scalar, fp32); its gradient takes the place of `logits`.

    On a card it is one operation. On a CPU torch's own are seen one by one, as the memory estimate
    wants them.
    """
    keeps_logits = loss_layout(logits.device.type, logits.dtype).keeps_logits
    score = cross_entropy_by_blocks_ if keeps_logits else cross_entropy_
    return score(logits, targets, n_ids, softcap or 0.0, with_gradient).sum()


def _score_rows(
    logits: Tensor, ids: Tensor, masked: Tensor, n_ids: int, buffer: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One chunk's summed cross-entropy (scalar) and its softmax (R V), both in fp32.

    Args:
        logits: of `_compute_logits` (R V); overwritten.
        ids: the targets (R 1).
        masked: rows (R 1) that have no target; their softmax is computed like any other's.
        n_ids: columns that mean something; those after it are padding.
        buffer: of `_take_logits_buffer`; the softmax returned lies there.
    """
    logits[:, n_ids:] = -math.inf
    if buffer is None:
        log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        return -log_p.gather(1, ids).masked_fill_(masked, 0.0).sum(), log_p.exp_()
    # Step by step and in place: torch's softmax would copy columns into rows.
    largest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, ids)
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    losses = (largest + sums.log() - chosen).masked_fill_(masked, 0.0)  # R 1
    return losses.sum(), exponentials.div_(sums)


def _differentiate_rows(
    logits: Tensor,
    ids: Tensor,
    masked: Tensor,
    n_ids: int,
    buffer: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `_score_rows`, with the gradient (R V) of capped logits, in their dtype."""
    dtype = logits.dtype
    if softcap is not None:
        tanh = logits.div_(softcap).tanh_()
        logits = tanh * softcap
    loss, grad = _score_rows(logits, ids, masked, n_ids, buffer)
    grad.scatter_add_(1, ids, grad.new_full((), -1.0).expand(ids.shape))
    if softcap is not None:  # d cap_logits(x) / d x = 1 - tanh(x / softcap)^2
        grad.mul_(tanh.square_().neg_().add_(1))
    return loss, grad.to(dtype)


def _accumulate(total: Tensor, part: Tensor) -> None:
    """Add `part` (V C), in a smaller type, to `total`: a few rows at a time on a CPU, where torch
    would first copy all of it in the type of `total`.
    """
    if total.device.type != "cpu" or torch.compiler.is_compiling():
        total += part
        return
    n_rows = max(1, _CAST_BYTES // (total.element_size() * total.shape[1]))
    for rows, more in zip(total.split(n_rows), part.split(n_rows), strict=True):
        rows += more.to(rows.dtype)  # as torch would, but seen by the memory estimate


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `linear_cross_entropy`, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        layout = loss_layout(hidden.device.type, hidden.dtype)
        n_ids, head = len(weight), _cast_head(weight, hidden.dtype, layout)
        # Summed over chunks in fp32: in bf16 the later chunks would be rounded away. A frozen head
        # has none.
        grad_head: Tensor | None = None
        if ctx.needs_input_grad[1] and (head.dtype == torch.float32 or not len(hidden)):
            grad_head = torch.zeros_like(weight, dtype=torch.float32)
        buffer = _take_logits_buffer(weight, hidden, len(head))
        for rows in split_loss_rows(hidden, head):
            ids, masked = _split_mask(targets[rows])
            logits = _compute_logits(hidden[rows], head, buffer)
            # d loss / d logits = softmax - one-hot. What the loss is divided by comes in with the
            # backward pass, as a gradient scaler's factor does: in fp16 it would underflow here.
            if layout.fused:
                loss = _score_fused(logits, targets[rows], n_ids, softcap, True)
                grad = logits
            else:
                loss, grad = _differentiate_rows(logits, ids, masked, n_ids, buffer, softcap)
            total = total + loss  # not in place: compiled by torch 2.11, all gradients became 0
            # A masked row's gradient is dropped from what is C wide, on either side of the
            # matmuls: zeroing it in `grad` would be one more pass over R V.
            torch.mm(grad, head, out=grad_hidden[rows])
            grad_hidden[rows].masked_fill_(masked, 0.0)
            if not ctx.needs_input_grad[1]:
                continue
            unmasked = hidden[rows].masked_fill(masked, 0.0)  # R C
            if head.dtype == torch.float32:
                assert grad_head is not None
                grad_head.addmm_(grad[:, :n_ids].T, unmasked)
                continue
            # Sliced afterwards: a product of so many rows as there are ids is slower.
            if grad_head is None:
                grad_head = (grad.T @ unmasked)[:n_ids].float()
            else:
                _accumulate(grad_head, (grad.T @ unmasked)[:n_ids])
        _keep_logits_buffer(weight, buffer)
        ctx.save_for_backward(grad_hidden, *([] if grad_head is None else [grad_head]))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the embedding's gradient is the largest tensor there is.
        gradients = [gradient.mul_(grad_outputs[0]) for gradient in ctx.saved_tensors]
        return gradients[0], gradients[1] if len(gradients) > 1 else None, None, None
