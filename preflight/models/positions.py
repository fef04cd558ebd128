"""How a transformer knows where a token stands: a learned table, or rotations of query and key.

Both have the same three methods, so that the model need not ask which of them it has. Shapes: B
sequences, T tokens, C hidden size, H heads (of queries or keys), D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from preflight.settings import ModelConfig

Angles = tuple[Tensor, Tensor]  # cosines and sines, broadcast against B T H D / 2


class LearnedPositions(nn.Embedding):
    """A vector for each position, added to the token's (Radford et al. 2018)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.context_length, config.n_embeddings)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors of tokens (B T C), with those of their positions (T, or B T)."""
        return x + self(positions)

    def compute_angles(self, positions: Tensor) -> None:
        """No rotation."""

    @staticmethod
    def rotate(q: Tensor, k: Tensor, v: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as they are."""
        return q, k, v


class RotaryPositions(nn.Module):
    """Rotates pairs of channels of each query and key by angles that grow with the position, so
    that their product depends on the distance (Su et al. 2021, arXiv:2104.09864, section 3.4.2).

    A pair is a channel of the first half and its counterpart in the second, as in Llama's weights
    at Hugging Face. Nothing is kept in a table: positions have no end, and a model built on the
    meta device has no buffer that a checkpoint would have to fill.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta, self.divisor = _SCALINGS[config.rope_scaling](config)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """The tokens' vectors as they are."""
        return x

    def compute_angles(self, positions: Tensor) -> Angles:
        """Cosines and sines of positions (T,) or (B T), each (... T 1 D/2) in fp32."""
        pairs = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        # In this form, since `theta ** -(i / D)` differs from Hugging Face's in the last digits,
        # which a thousand positions turn into a difference of 1e-4 in the logits.
        frequencies = 1 / self.theta ** (pairs / self.head_dim)
        angles = (positions / self.divisor)[..., None, None] * frequencies
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B T H D) rotated. The values are copied, which frees the tensor that
        all three are views of: what is kept for the backward pass is then as large as GPT-2's.
        """
        cos, sin = (angle.to(q.dtype) for angle in angles)
        # A fused kernel of the compiler reads the views; its graph keeps no copy for nothing.
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin), v.contiguous()


class _Rotation(torch.autograd.Function):
    """Keeps the angles alone: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = x * torch.cat((cos, cos), dim=-1)
    rotated.chunk(2, dim=-1)[0].addcmul_(second, sin, value=-1)
    rotated.chunk(2, dim=-1)[1].addcmul_(first, sin)
    return rotated


def _scale_linearly(config: ModelConfig) -> tuple[float, float]:
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595, equation 4)."""
    return config.rope_theta, config.rope_factor


def _scale_ntk(config: ModelConfig) -> tuple[float, float]:
    """A larger theta, so that the slowest pair turns as if positions were divided by the factor,
    and the fastest pair as before ("NTK-aware"; Peng et al. 2023, arXiv:2309.00071, section 3.1).
    """
    exponent = config.head_dim / (config.head_dim - 2)
    return config.rope_theta * config.rope_factor**exponent, 1.0


# Theta, and what positions are divided by.
_SCALINGS = {
    "none": lambda config: (config.rope_theta, 1.0),
    "linear": _scale_linearly,
    "ntk": _scale_ntk,
}
