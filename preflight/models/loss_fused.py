"""Cross-entropy and its gradient in the place of the logits, without a copy of them in fp32.

What it gains is memory traffic: bf16 logits are read twice and written once, where a copy in fp32,
log-softmax, exponential and the cast back move eight times as many bytes. On CUDA it is one kernel,
on a CPU a softmax of so few rows that they stay in its caches.

Shapes: R rows of one chunk, V columns of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:  # with torch for CUDA, on Linux
    from preflight.models.loss_kernel import launch
except ModuleNotFoundError:
    launch = None  # type: ignore[assignment]

# In the place of a target: nothing is predicted here. The same number as torch's `ignore_index`.
NO_TARGET = -100
BLOCK_ROWS = 64  # of logits that a CPU turns into their gradient at once (benchmarks/LOG.md)
_SMALLEST = torch.finfo(torch.float32).tiny


@torch.library.custom_op("preflight::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    """Cross-entropy of each row (R, fp32), and its gradient in the place of the logits.

    A compiler takes this as one operation. Without CUDA or Triton, torch's operations do the same.

    Args:
        logits: (R V); overwritten by d loss / d logits, unless `with_gradient` is False.
        targets: ids (R,). A row whose target is -100 has neither loss nor gradient. The loss of any
            other id outside the vocabulary is NaN.
        vocab_size: columns that mean something; those after it are padding.
        softcap: of `cap_logits`, which the logits go through first; 0: none.
        with_gradient: whether the gradient is wanted.
    """
    if logits.is_cuda and launch is not None:
        return launch(logits, targets, vocab_size, softcap, with_gradient)
    return cross_entropy_by_blocks_(logits, targets, vocab_size, softcap, with_gradient)


def cross_entropy_by_blocks_(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    """As `cross_entropy_`, by torch's operations on a few rows at a time.

    A row without a target has no loss; the caller drops its gradient. A loss of more than 87 counts
    as 87, where the probability is the smallest number of fp32; its gradient is right all the same.
    """
    masked = targets == NO_TARGET
    wrong = ~masked & ((targets < 0) | (targets >= vocab_size))
    ids = targets.masked_fill(masked | wrong, 0)[:, None]
    scratch = logits.new_empty((min(BLOCK_ROWS, len(logits)), logits.shape[1]), dtype=torch.float32)
    minus_one = scratch.new_full((), -1.0)
    losses = torch.empty_like(targets, dtype=torch.float32)
    for block in split_loss_blocks(len(logits)):
        scores = scratch[: len(ids[block])].copy_(logits[block])
        tanh = None
        if softcap:
            tanh = scores.div_(softcap).tanh_().clone()
            scores.mul_(softcap)
        scores[:, vocab_size:] = -torch.inf
        probabilities = torch.softmax(scores, 1, out=scores)
        chosen = probabilities.gather(1, ids[block]).clamp(min=_SMALLEST)
        losses[block] = chosen.log().neg()[:, 0]
        if with_gradient:  # d cap_logits(x) / d x = 1 - tanh(x / softcap)^2
            grad = probabilities.scatter_add_(1, ids[block], minus_one.expand(chosen.shape))
            logits[block] = grad if tanh is None else grad.mul_(1 - tanh.square())
    return losses.masked_fill(masked, 0.0).masked_fill(wrong, torch.nan)


def split_loss_blocks(n_rows: int) -> list[slice]:
    """The rows of logits, as many at a time as are turned into their gradient at once."""
    return [slice(start, start + BLOCK_ROWS) for start in range(0, n_rows, BLOCK_ROWS)]


@cross_entropy_.register_fake
def _(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    return torch.empty_like(targets, dtype=torch.float32)
