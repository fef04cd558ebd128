"""Learning rates against torch's own schedules."""

from __future__ import annotations

import pytest
import torch

from preflight.settings import ControlSettings, TrainingSettings
from preflight.settings.kinds import SCHEDULES
from preflight.training.plan import build_plan
from preflight.training.schedules import learning_rate_at


def torch_rates(scheduler: str, total: int, warmup: int, peak: float) -> list[float]:
    """The same schedule from torch.optim.lr_scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedules = torch.optim.lr_scheduler
    if scheduler == "onecycle":
        # OneCycleLR ends its rise at pct_start * total - 1.
        chain: object = schedules.OneCycleLR(
            optimizer, peak, total_steps=total, pct_start=warmup / total, cycle_momentum=False
        )
    else:
        rise = schedules.LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        fall = {
            "cosine": lambda: schedules.CosineAnnealingLR(optimizer, total - warmup, 0.1 * peak),
            "linear": lambda: schedules.LinearLR(optimizer, 1.0, 0.0, total - warmup),
            "none": lambda: schedules.ConstantLR(optimizer, 1.0),
        }[scheduler]()
        chain = schedules.SequentialLR(optimizer, [rise, fall], [warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()  # type: ignore[attr-defined]
    return rates


@pytest.mark.parametrize("scheduler", SCHEDULES.names())
def test_learning_rates_equal_torchs_schedules(scheduler: str) -> None:
    training = TrainingSettings(
        max_steps=50, warmup_steps=10, scheduler=scheduler, learning_rate=3e-3
    )
    plan = build_plan(training, ControlSettings(), 16, 1000, 20)
    ours = [learning_rate_at(step, plan) for step in range(50)]
    assert ours == pytest.approx(torch_rates(scheduler, 50, 10, 3e-3), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("scheduler", SCHEDULES.names())
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_learning_rate_is_sane_for_the_shortest_runs(scheduler: str, steps: int) -> None:
    training = TrainingSettings(max_steps=steps, scheduler=scheduler, learning_rate=1.0)
    plan = build_plan(training, ControlSettings(), 16, 1000, 20)
    for step in range(steps):
        assert 0 <= learning_rate_at(step, plan) <= 1.0
    assert max(learning_rate_at(step, plan) for step in range(steps)) > 0
