"""Norms: each is built from (size, eps, bias), as `nn.LayerNorm` is.

Shapes: N rows, C channels of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from preflight.settings import ModelConfig
from preflight.settings.kinds import NORMS


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm that the configuration asks for, of `size` channels."""
    norm: nn.Module = NORMS.load(config.norm)(size, eps=config.norm_eps, bias=config.bias)
    return norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    It has no bias, whatever `bias` says.
    """

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(... C) -> (... C), in the dtype of `x`; computed in fp32."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row. torch's composite on the CPU keeps the normalised
    rows too, and passes over them three times as often.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # ... 1
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            C = x.shape[-1]
            dtype = scale.dtype  # fp32, or fp64 where the input is
            wide, grad = (t.to(dtype).reshape(-1, C) for t in (x, grad_outputs[0]))  # N C
            scale, gain = scale.reshape(-1, 1), weight.to(dtype)  # N 1, C
            product = grad * wide
            grad_weight = product.T @ scale[:, 0]  # C
            shrink = (product @ gain)[:, None] * scale.pow(3).div_(-C)  # N 1
            grad_x = product.copy_(grad).mul_(gain).mul_(scale).addcmul_(wide, shrink)
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None
