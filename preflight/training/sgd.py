"""SGD with momentum, fused, whose parameters ranks may share.

torch's own (2.13) does not know matrices of which each rank has a part. And where its first update
is skipped, it keeps a momentum that was never written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from preflight.device.ranks import get_local


class SharedSGD(torch.optim.SGD):
    """`torch.optim.SGD` with ``fused=True``; an update is elementwise, so that each part has its
    own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            sgd(
                [get_local(p) for p in trained],
                [get_local(p.grad) for p in trained],
                [self._find_momentum(p) if group["momentum"] else None for p in trained],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),  # as a gradient scaler sets them
                found_inf=getattr(self, "found_inf", None),
            )

    def _find_momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return get_local(state["momentum_buffer"])
