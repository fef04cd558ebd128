"""Int8 weights for inference: each row of a matrix is int8 with one scale.

A token of one sequence reads every weight once, so that a quarter of fp32's bytes means less time.
On a CPU one of torch's own products does it (int8_kernels.py). Where there is none, or it is slow
for so many rows, the weights are converted part by part and multiplied in a floating-point type.
A matrix that is multiplied in integers is kept rotated, as its inputs are before each product.

Shapes: N rows of a matrix (outputs), K columns (inputs), C hidden size, V vocabulary.

The scale, the largest absolute value of a row over 127, is that of Dettmers et al. 2022
(arXiv:2208.07339, section 2), without the outliers: a rotation spreads those of the inputs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from preflight.models.base import TokenModel
from preflight.models.int8_kernels import (
    LARGEST,
    find_block,
    find_kernel,
    multiply_integers,
    rotate,
)

_PART_ROWS = 4096  # of a matrix that are converted at once: they stay in the cache


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N K) as int8 (N K), and a scale for each row (N) in fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / LARGEST
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
        self.block = find_block(weight)
        values, scale = quantize_rows(rotate(weight.detach().float(), self.block))
        self.register_buffer("values", values)
        self._kernel = find_kernel(values, scale, self.block)
        dtype = torch.bfloat16 if self._kernel is None else self._kernel.dtype
        self.register_buffer("scale", scale.to(dtype))
        self.wide_dtype = wide_dtype

    @property
    def is_integer(self) -> bool:
        """Whether inputs are rounded to int8 too."""
        return self._kernel is not None and self._kernel.multiply is multiply_integers

    def multiply(self, x: Tensor) -> Tensor:
        """(... K) -> (... N), in the type of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if self.block > 1:
            rows = rotate(rows.float(), self.block)
        kernel = self._kernel
        if kernel is not None and len(rows) <= kernel.max_rows:
            product = kernel.multiply(rows.to(kernel.dtype), self.values, self.scale)
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
        found = self.values[ids].float() * self.scale[ids].float()[..., None]
        return rotate(found, self.block).to(dtype)

    def dequantize(self) -> Tensor:
        """The matrix (N K) in `wide_dtype`."""
        return self.read_rows(
            torch.arange(len(self.values), device=self.values.device), self.wide_dtype
        )


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
