"""The Triton kernel of `cross_entropy_`; imported where a CUDA device computes it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time
_NO_TARGET = tl.constexpr(-100)


@triton.jit
def _read_scores(row, columns, vocab_size, softcap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Capped logits and their tanh; minus infinity past the vocabulary."""
    inside = columns < vocab_size
    scores = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    tanh = scores
    if HAS_CAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        tanh = 2 * tl.sigmoid(2 * scores / softcap) - 1
        scores = softcap * tanh
    return tl.where(inside, scores, -float("inf")), tanh


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    n_columns: tl.constexpr,
    vocab_size,
    softcap,
    HAS_CAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. First the logarithm of the sum of exponentials, by a running maximum (Milakov and
    Gimelshein 2018, arXiv:1805.02867, algorithm 3), then softmax - one-hot in the place of the row.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * n_columns
    target = tl.load(targets + index)
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    chosen = tl.full((), 0.0, tl.float32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scores, _ = _read_scores(row, columns, vocab_size, softcap, HAS_CAP)
        new = tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(scores - new), 0)
        largest = new
        chosen += tl.sum(tl.where(columns == target, scores, 0.0), 0)
    log_sum = largest + tl.log(total)
    masked = target == _NO_TARGET
    wrong = ((target < 0) | (target >= vocab_size)) & (target != _NO_TARGET)
    loss = tl.where(masked, 0.0, log_sum - chosen)
    tl.store(losses + index, tl.where(wrong, float("nan"), loss))
    if WITH_GRADIENT:
        for start in range(0, n_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            scores, tanh = _read_scores(row, columns, vocab_size, softcap, HAS_CAP)
            grad = tl.exp(scores - log_sum) - tl.where(columns == target, 1.0, 0.0)
            if HAS_CAP:  # d cap_logits(x) / d x = 1 - tanh(x / softcap)^2
                grad = grad * (1 - tanh * tanh)
            grad = tl.where(masked | (columns >= vocab_size), 0.0, grad)
            tl.store(row + columns, grad.to(logits.dtype.element_ty), mask=columns < n_columns)


def launch(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    """As `cross_entropy_`."""
    assert logits.is_contiguous()
    n_rows, n_columns = logits.shape
    losses = torch.empty(n_rows, device=logits.device, dtype=torch.float32)
    _cross_entropy[(n_rows,)](
        logits,
        targets.contiguous(),
        losses,
        n_columns,
        vocab_size,
        softcap,
        HAS_CAP=softcap != 0,
        WITH_GRADIENT=with_gradient,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return losses
