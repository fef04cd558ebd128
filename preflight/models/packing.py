"""Weights in the layout of oneDNN's products, for generation on a CPU.

A product with few rows of inputs reads every weight once, and in the order in which oneDNN wants
them two to four times as fast as torch's own products (benchmarks/LOG.md). torch has these
operations for models that its compiler freezes. They are private, and may change: they are used
only where they are there and agree with the plain product.

Shapes: N rows of a matrix (outputs), K columns (inputs).
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn

from preflight.models.base import TokenModel

_ROWS = 8  # of inputs, for which oneDNN chooses the layout; others are computed as well
_TOLERANCE = 0.02  # of the largest result; bf16 rounds to 0.004


class PackedLinear(nn.Module):
    """`nn.Linear` whose weight is packed; its memory is that of the weight.

    Args:
        weight: the matrix (N K), on the CPU; it is copied.
        bias: (N,), or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.n_bytes = weight.nbytes
        # Opaque to torch: no parameter or buffer, which would be converted and copied.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(... K) -> (... N)."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return product


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether there are such products in this type here, and compute what they should."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((33, 64), 33, (3, 64)))
    try:
        found = PackedLinear(weight.to(dtype), bias.to(dtype))(x.to(dtype))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    meant = nn.functional.linear(x, weight, bias)
    return bool((found.float() - meant).abs().max() <= _TOLERANCE * meant.abs().max())


@torch.no_grad()
def pack_model(model: TokenModel) -> None:
    """Pack the matrices of a model on the CPU, in place. Such a model only generates.

    A tied table of tokens stays as well, since its rows are looked up.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    head = PackedLinear(model.head_weight, None) if model.config.tied else model.lm_head
    model.lm_head = cast(nn.Linear, head)
    model.bind_head(model.lm_head.forward)


def count_packed_bytes(model: nn.Module) -> int:
    """Of the weights that are packed."""
    return sum(each.n_bytes for each in model.modules() if isinstance(each, PackedLinear))
