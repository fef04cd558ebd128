"""Products of floating-point rows with an int8 matrix, as fast as torch has them on this CPU.

Both are torch's own and private, and may change: each is used only where it is there and agrees
with the plain product. Measured in benchmarks/LOG.md.

Shapes: M rows of inputs, N rows of a matrix (outputs), K columns (inputs).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
_LEAST_BLOCK, _MOST_BLOCK = 16, 64
_ROWS_AT_ONCE = 256  # of inputs: their sums of products over a vocabulary take 50 MB
_TOLERANCE = 0.02  # of the largest result; bf16 rounds to 0.004
_TRIED_ROWS = 4096  # of the matrix


@dataclass(frozen=True)
class Kernel:
    """A product of rows with an int8 matrix.

    Attributes:
        multiply: inputs (M K), int8 (N K), scales (N) -> (M N).
        dtype: of inputs and scales.
        max_rows: M up to which it is faster than a product in floating point.
    """

    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype
    max_rows: float


def multiply_integers(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Inputs (M K) by int8 (N K) with scales (N), in integers: (M N) in fp32.

    Each row of inputs is rounded to int8 with one step, for which it is to be rotated first: a few
    large values would leave too little for the others.
    """
    if len(x) > _ROWS_AT_ONCE:
        parts = x.split(_ROWS_AT_ONCE)
        return torch.cat([multiply_integers(part, values, scale) for part in parts])
    step = x.abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_(min=1e-30)  # M 1
    rounded = (x / step).round_().to(torch.int8)
    return torch._int_mm(rounded, values.T).float().mul_(scale).mul_(step)


@functools.cache
def has_exact_products() -> bool:
    """Whether this CPU sums up products of int8 quickly and without saturation: by VNNI or AMX."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    values = torch.full((64, 256), LARGEST, dtype=torch.int8)
    values[1::2] = -LARGEST
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError, AttributeError):
        return all(
            torch.equal(torch._int_mm(x, values.T), x.int() @ values.int().T)
            for x in (values[:1], values[1:2], values[:4])
        )
    return False


def find_block(weight: Tensor) -> int:
    """Of how many columns each block of `rotate` is for this matrix (N K); 1 where it is not
    multiplied in integers, and needs no rotation.
    """
    block = math.gcd(weight.shape[1], _MOST_BLOCK)
    rotates = weight.device.type == "cpu" and block >= _LEAST_BLOCK and has_exact_products()
    return block if rotates else 1


def rotate(x: Tensor, block: int) -> Tensor:
    """Vectors (... K) in fp32, each block of columns times a Hadamard matrix, which spreads a large
    value over its block. Twice is the same as not at all, and products of vectors stay.

    Ashkboos et al. 2024, QuaRot (arXiv:2404.00456).
    """
    if block == 1:
        return x
    return (x.reshape(-1, block) @ build_hadamard(block)).reshape(x.shape)


@functools.cache
def build_hadamard(size: int) -> Tensor:
    """The orthogonal matrix of +-1 / sqrt(size), symmetric, for a power of two (Sylvester)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / math.sqrt(size)


def list_kernels(block: int) -> list[Kernel]:
    """What may be there on this CPU, the fastest first; `block` of the matrix."""
    kernels = [Kernel(multiply_integers, torch.float32, math.inf)] if block > 1 else []
    packed = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    if packed is not None:
        # Its time grows with each row; to convert the weights takes as long as 16 rows of it.
        kernels.append(Kernel(packed, torch.bfloat16, 16))
    return kernels


def find_kernel(values: Tensor, scale: Tensor, block: int) -> Kernel | None:
    """The fastest for this matrix (N K), with scales (N), that computes what we mean."""
    if values.device.type != "cpu":
        return None
    some, scale = values[:_TRIED_ROWS], scale[:_TRIED_ROWS].float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, values.shape[1], generator=generator).to(torch.bfloat16).float()
    meant = (x @ some.float().T) * scale
    for kernel in list_kernels(block):
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
            found = kernel.multiply(x.to(kernel.dtype), some, scale.to(kernel.dtype)).float()
            if (found - meant).abs().max() <= _TOLERANCE * meant.abs().max():
                return kernel
    return None
