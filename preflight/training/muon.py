"""Muon: weight matrices move by their orthogonalised momentum, everything else by AdamW.

The numbers are those of `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``, which always
computes in bf16. Without bf16 in the hardware that took 0.74 s a step for twelve matrices of width
128 on two cores, against 0.02 s here: in fp32, several matrices of a shape at once.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon); Liu et al. 2025, arXiv:2502.16982, for the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from preflight.device.runtime import has_fast_bf16

MOMENTUM = 0.95  # Nesterov's; Jordan et al. 2024
# A quintic polynomial whose slope at zero is steep: small singular values need few iterations.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
# An update of this root mean square is about AdamW's, so that its learning rates can be used (Liu
# et al. 2025, section 2.2).
_ADAMW_RMS = 0.2
# Matrices of one shape that are orthogonalised at once. No more, so that their temporary copies
# stay small beside the weights of a deep model.
_STACKED = 3


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimizer.

    Args:
        matrices: parameters of two dimensions, the first of the two parameter groups.
        others: the second group, for AdamW without weight decay.
        learning_rate: of both.
        weight_decay: of the matrices.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        rest = [{"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=betas, eps=eps, fused=True)
        group = {"params": matrices, "weight_decay": weight_decay}
        super().__init__([group, *self._adamw.param_groups], {"lr": learning_rate})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """AdamW reads the learning rate, and keeps its state, where this optimizer has them."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not called."""
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for alike in by_shape.values():
            for start in range(0, len(alike), _STACKED):
                self._update(alike[start : start + _STACKED], group["lr"], group["weight_decay"])
        self._adamw.step()

    def _update(
        self, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> None:
        """Update a few matrices of one shape."""
        scale = _ADAMW_RMS * math.sqrt(max(parameters[0].shape))
        directions = orthogonalise(self._advance_momentum(parameters))
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - learning_rate * weight_decay)
            parameter.add_(direction, alpha=-learning_rate * scale)

    def _advance_momentum(self, parameters: list[nn.Parameter]) -> Tensor:
        """Nesterov's momentum of each, stacked: (N, rows, columns)."""
        result = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            result.append(parameter.grad.lerp(momentum, MOMENTUM))
        return torch.stack(result)


def choose_dtype(device: torch.device) -> torch.dtype:
    """What the iteration computes in: bf16 where the hardware has it, as torch's does."""
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def orthogonalise(matrices: Tensor) -> Tensor:
    """Each of the matrices (N, rows, columns) with all its singular values near one.

    Newton-Schulz: X <- P X with P = a I + b X X^T + c (X X^T)^2, on matrices that are not taller
    than wide. Singular values end between about 0.5 and 1.5, which serves as well as exactly one.
    """
    x = matrices.to(choose_dtype(matrices.device))
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)  # no singular value is above one
    # In bf16 the square of a small singular value would be lost.
    is_wide = x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]
    x = _iterate_gram(x) if is_wide else _iterate(x)
    return x.mT if is_tall else x


def _build_step(gram: Tensor) -> Tensor:
    """b G + c G^2 of Newton-Schulz; a I is missing."""
    _, b, c = _COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _iterate(x: Tensor) -> Tensor:
    for _ in range(_ITERATIONS):
        x = torch.baddbmm(x, _build_step(x @ x.mT), x, beta=_COEFFICIENTS[0])
    return x


def _iterate_gram(x: Tensor) -> Tensor:
    """`_iterate` on X X^T alone, which is small where X is wide: half the work at 1 to 4.

    All polynomials of X X^T commute, so that X X^T <- P P X X^T, and X is multiplied once, by the
    product of all P.
    """
    gram = x @ x.mT
    product = step = _add_identity(_build_step(gram))
    for _ in range(_ITERATIONS - 1):
        gram = step @ (step @ gram)
        step = _add_identity(_build_step(gram))
        product = step @ product
    return product @ x


def _add_identity(step: Tensor) -> Tensor:
    step.diagonal(dim1=1, dim2=2).add_(_COEFFICIENTS[0])
    return step
