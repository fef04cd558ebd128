"""Weight-only int8 for inference: each row of a matrix is int8 with one scale, activations are not.

A token of one sequence reads every weight once, so that a quarter of fp32's bytes means less time.
On a CPU the product is torch's own `_weight_int8pack_mm`. It is private and may change: it is used
only where it is there and agrees with the plain product. Elsewhere, and for many rows at once, the
weights are converted part by part and multiplied in a floating-point type.

Shapes: N rows of a matrix (outputs), K columns (inputs), C hidden size, V vocabulary.

The scale, the largest absolute value of a row over 127, is that of Dettmers et al. 2022
(arXiv:2208.07339, section 2), without the outliers: here the inputs keep their precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from preflight.models.base import TokenModel

_LARGEST = 127
# Rows of inputs up to which torch's kernel is faster: its time grows with each row, and to convert
# the weights takes as long as 16 rows of it (benchmarks/LOG.md).
_KERNEL_ROWS = 16
_PART_ROWS = 4096  # of a matrix that are converted at once: they stay in the cache
_TOLERANCE = 0.02  # of the largest result; bf16 rounds to 0.004
_Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N K) as int8 (N K), and a scale for each row (N) in fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / _LARGEST
    divisor = torch.where(scale > 0, scale, 1.0)
    return (weight / divisor[:, None]).round().to(torch.int8), scale


class Int8Matrix(nn.Module):
    """A matrix (N K) in int8 that multiplies vectors, and whose rows can be looked up.

    Args:
        weight: the matrix, in any floating-point type.
        wide_dtype: in which many rows of inputs are multiplied: bf16 where the hardware has it.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, wide_dtype: torch.dtype) -> None:
        super().__init__()
        values, scale = quantize_rows(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.wide_dtype = wide_dtype
        self._kernel = find_kernel(values, self.scale)

    def multiply(self, x: Tensor) -> Tensor:
        """(... K) -> (... N), in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if self._kernel is not None and len(rows) <= _KERNEL_ROWS:
            product = self._kernel(rows.to(torch.bfloat16), self.values, self.scale)
        else:
            product = self._multiply_wide(rows)
        return product.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _multiply_wide(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.wide_dtype)
        # int8 is exact in every floating-point type: only the scale is rounded.
        parts = [rows @ part.to(self.wide_dtype).T for part in self.values.split(_PART_ROWS)]
        product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return product.mul_(self.scale.to(self.wide_dtype))

    def read_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (... K) of `ids` (...)."""
        return self.values[ids].to(dtype) * self.scale[ids].to(dtype)[..., None]

    def dequantize(self) -> Tensor:
        """The matrix (N K) in `wide_dtype`."""
        return self.values.to(self.wide_dtype) * self.scale.to(self.wide_dtype)[:, None]


class Int8Linear(nn.Module):
    """`nn.Linear` with an int8 weight; the bias keeps its type."""

    def __init__(self, linear: nn.Linear, wide_dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = Int8Matrix(linear.weight, wide_dtype)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight (N K), converted anew at each call."""
        return self.matrix.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(... K) -> (... N)."""
        product = self.matrix.multiply(x)
        return product if self.bias is None else product.add_(self.bias)


class Int8Embedding(nn.Module):
    """`nn.Embedding` whose table (V C) is int8; a tied output head shares it."""

    def __init__(self, embedding: nn.Embedding, wide_dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = Int8Matrix(embedding.weight, wide_dtype)
        self.dtype = embedding.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The table (V C), converted anew at each call."""
        return self.matrix.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (... C)."""
        return self.matrix.read_rows(ids, self.dtype)


def quantize_model(model: TokenModel, wide_dtype: torch.dtype = torch.float32) -> None:
    """Turn the matrices of a model into int8, in place: linear layers, the table of tokens, the
    output head. Norms, biases and positions stay as they are. Such a model only generates.

    Args:
        model: on its device, in the type in which its activations shall be.
        wide_dtype: see `Int8Matrix`.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child, wide_dtype))
    model.embed_tokens = cast(nn.Embedding, Int8Embedding(model.embed_tokens, wide_dtype))
    head = model.embed_tokens if model.config.tied else model.lm_head
    model.bind_head(cast(Int8Linear | Int8Embedding, head).matrix.multiply)


def find_kernel(values: Tensor, scale: Tensor) -> _Kernel | None:
    """torch's int8 product for this matrix (N K), if it has one here that computes what we mean."""
    kernel = load_kernel()
    if kernel is None or values.device.type != "cpu":
        return None
    some = values[:_PART_ROWS]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, values.shape[1], generator=generator).to(torch.bfloat16)
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
        found = kernel(x, some, scale[:_PART_ROWS]).float()
        meant = (x.float() @ some.float().T) * scale[:_PART_ROWS].float()
        if (found - meant).abs().max() <= _TOLERANCE * meant.abs().max():
            return kernel
    return None


def load_kernel() -> _Kernel | None:
    """torch's int8 product, if this torch has it: inputs (M K), int8 (N K), scales (N)."""
    kernel: _Kernel | None = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    return kernel
