"""The feed-forward parts of a block. Shapes: B sequences, T tokens, C hidden size, F d_ff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preflight.models.activations import gelu_tanh, gelu_tanh_backward, relu_backward
from preflight.models.base import ResidualLinear
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS

_aten = torch.ops.aten


class _Gate(NamedTuple):
    """An activation, and the gradient of its input from that of its output and the input."""

    activate: Callable[[Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor], Tensor]


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embeddings, config.ffn_hid_dim, config.bias)
        self.activation = ACTIVATIONS.load(config.activation)
        self.down_proj = ResidualLinear(config.ffn_hid_dim, config.n_embeddings, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B T C) -> (B T C)."""
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6).

    Gate and up are one matmul: rows 0 to F of its weight are the gate's, the others are up's.
    """

    gate: ClassVar[_Gate]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.n_embeddings, 2 * config.ffn_hid_dim, config.bias)
        self.down_proj = ResidualLinear(config.ffn_hid_dim, config.n_embeddings, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B T C) -> (B T C)."""
        gate_up = self.gate_up_proj(x)  # B T 2F
        return self.down_proj(_GatedProduct.apply(gate_up, *self.gate))


class SwiGLU(GatedMLP):
    """Gated by SiLU, as Llama is."""

    gate = _Gate(F.silu, _aten.silu_backward)


class GeGLU(GatedMLP):
    """Gated by GELU in its tanh approximation, as Gemma is."""

    gate = _Gate(gelu_tanh, gelu_tanh_backward)


class ReGLU(GatedMLP):
    """Gated by ReLU."""

    gate = _Gate(F.relu, relu_backward)


class _GatedProduct(torch.autograd.Function):
    """activation(gate) * up. Keeps gate and up alone, and computes the activation again."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, activate: Callable[..., Tensor], differentiate: Any
    ) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gate = _Gate(activate, differentiate)
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        [gate_up] = ctx.saved_tensors
        [grad] = grad_outputs
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        grad_up.copy_(ctx.gate.activate(gate)).mul_(grad)
        grad_gate.copy_(ctx.gate.differentiate(grad * up, gate))
        return result, None, None
