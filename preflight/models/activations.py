"""Activation functions that torch does not offer by one name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")
