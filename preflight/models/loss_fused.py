"""Cross-entropy and its gradient in the place of the logits, for CUDA: one kernel, no copy in fp32.

Its gain over torch's operations is memory traffic: bf16 logits are read twice and written once,
where a copy in fp32, log-softmax, exponential and the cast back move eight times as many bytes.

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


@torch.library.custom_op("preflight::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    """Cross-entropy of each row (R, fp32), and its gradient in the place of the logits.

    A compiler takes this as one operation. Where Triton is missing, torch's operations do the same.

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
    scores = logits[:, :vocab_size].float()
    tanh = torch.tanh(scores / softcap) if softcap else None
    log_p = torch.log_softmax(scores if tanh is None else tanh * softcap, dim=1)
    masked = targets == NO_TARGET
    wrong = ~masked & ((targets < 0) | (targets >= vocab_size))
    ids = targets.masked_fill(masked | wrong, 0)[:, None]
    losses = -log_p.gather(1, ids)[:, 0]
    if with_gradient:
        grad = log_p.exp_().scatter_add_(1, ids, log_p.new_full((), -1.0).expand(ids.shape))
        if tanh is not None:  # d cap_logits(x) / d x = 1 - tanh(x / softcap)^2
            grad.mul_(1 - tanh.square())
        logits.zero_()[:, :vocab_size] = grad.masked_fill_(masked[:, None], 0.0)
    return losses.masked_fill(masked, 0.0).masked_fill(wrong, torch.nan)


@cross_entropy_.register_fake
def _(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, with_gradient: bool
) -> Tensor:
    return torch.empty_like(targets, dtype=torch.float32)
