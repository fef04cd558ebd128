"""Activation functions that torch does not offer by one name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`, from that of ``gelu_tanh(x)``."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`, from that of ``relu(x)``."""
    return torch.ops.aten.threshold_backward(grad, x, 0)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, "Primer", arXiv:2109.08668, section 3)."""
    return F.relu(x).square()
