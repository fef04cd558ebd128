"""Muon: weight matrices move by their orthogonalised momentum, everything else by AdamW.

The numbers are those of `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``, which always
computes in bf16. Without bf16 in the hardware that took 0.74 s a step for twelve matrices of width
128 on two cores, against 0.02 s here: in fp32, several matrices of a shape at once.

Of a matrix that several ranks share, one computes the whole update: the iteration needs all rows.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon); Liu et al. 2025, arXiv:2502.16982, for the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from preflight.device.ranks import get_local
from preflight.device.runtime import has_fast_bf16
from preflight.training.uncompiled import leave_compiler_out

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
        adamw = leave_compiler_out(torch.optim.AdamW)
        self._adamw = adamw(rest, lr=learning_rate, betas=betas, eps=eps, fused=True)
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
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for alike in by_shape.values():
            stacks = [alike[at : at + _STACKED] for at in range(0, len(alike), _STACKED)]
            owners = count_shards(alike[0])  # so many stacks are computed at once, one on each
            for at in range(0, len(stacks), owners):
                self._update(stacks[at : at + owners])
        self._adamw.step()

    def _update(self, stacks: list[list[nn.Parameter]]) -> None:
        """Update a stack of matrices on each rank, or one; all matrices are of one shape."""
        group, like = self.param_groups[0], stacks[0][0]
        scale = _ADAMW_RMS * math.sqrt(max(like.shape))
        momenta = [self._advance_momentum(stack) for stack in stacks]
        if count_shards(like) == 1:
            directions = [orthogonalise(momentum) for momentum in momenta]
        else:
            directions = orthogonalise_shards(momenta, like)
        for stack, stacked in zip(stacks, directions, strict=True):
            for parameter, direction in zip(stack, stacked, strict=True):
                own = get_local(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(direction, alpha=-group["lr"] * scale)

    def _advance_momentum(self, parameters: list[nn.Parameter]) -> Tensor:
        """Nesterov's momentum of each, stacked: (N, rows, columns), of this rank's rows."""
        result = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient = get_local(parameter.grad)
            momentum = get_local(state["momentum_buffer"]).lerp_(gradient, 1 - MOMENTUM)
            result.append(gradient.lerp(momentum, MOMENTUM))
        return torch.stack(result)


def orthogonalise_shards(momenta: list[Tensor], like: nn.Parameter) -> list[Tensor]:
    """`orthogonalise` for matrices of which each rank has some rows: a stack is put together on
    one rank, its owner, computed there as one process would, and cut again.

    Args:
        momenta: stack i (N, own rows, columns), whose owner is rank i; no more than there are ranks
            among which a matrix is shared.
        like: one of the matrices.

    Returns:
        The direction of each stack, in the rows of `momenta`.
    """
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    group, rank = mesh.get_group("shard"), mesh.get_local_rank("shard")
    columns = like.shape[1]
    n_rows = [len(chunk) for chunk in torch.empty(len(like), 0).chunk(count_shards(like))]
    n_rows += [0] * (count_shards(like) - len(n_rows))  # there may be more ranks than rows
    n_stacked = len(momenta[rank]) if rank < len(momenta) else 0
    theirs = [n_stacked * rows * columns for rows in n_rows]
    ours = [momentum.numel() for momentum in momenta]
    ours += [0] * (count_shards(like) - len(ours))
    whole = _exchange(torch.cat([m.flatten() for m in momenta]), ours, theirs, group)
    if n_stacked:
        parts = zip(whole.split(theirs), n_rows, strict=True)
        stack = [part.view(n_stacked, rows, columns) for part, rows in parts]
        direction = orthogonalise(torch.cat(stack, 1))
        whole = torch.cat([part.flatten() for part in direction.split(n_rows, 1)])
    else:
        whole = whole.to(choose_dtype(whole.device))
    own = _exchange(whole, theirs, ours, group).split(ours[: len(momenta)])
    return [part.view(momentum.shape) for part, momentum in zip(own, momenta, strict=True)]


def _exchange(values: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """`sent[i]` of the values to rank i of the group, and `received[i]` from it, in that order."""
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values, received, sent, group=group)
    return result


def count_shards(parameter: nn.Parameter) -> int:
    """The ranks among which the rows of `parameter` are shared."""
    mesh = getattr(parameter, "device_mesh", None)
    return 1 if mesh is None else int(mesh["shard"].size())


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
