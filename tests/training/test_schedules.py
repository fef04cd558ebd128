"""Learning rates against torch's own schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from preflight.settings import ControlSettings, TrainingSettings
from preflight.settings.kinds import SCHEDULES
from preflight.training.changes import describe_schedule
from preflight.training.plan import TrainingPlan, build_plan
from preflight.training.schedules import find_extension_step, learning_rate_at


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
            "wsd": lambda: schedules.LambdaLR(
                optimizer,
                lambda step: 1 - max(0.0, (warmup + step) / total - 0.8) ** 0.5 / 0.2**0.5,
            ),
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


def build_wsd(steps: int) -> TrainingPlan:
    training = TrainingSettings(max_steps=steps, warmup_steps=10, scheduler="wsd")
    return build_plan(training, ControlSettings(), 16, 1000, 20)


def test_a_stable_run_is_made_longer_without_a_jump() -> None:
    short, long = build_wsd(100), build_wsd(200)
    start = find_extension_step(short)
    assert start == 80
    rates = [[learning_rate_at(step, plan) for step in range(start + 1)] for plan in (short, long)]
    assert rates[0] == rates[1]
    assert learning_rate_at(start + 1, short) < learning_rate_at(start, short)
    assert "jump" not in describe_schedule(start, short, long)
    assert find_extension_step(replace(short, scheduler="cosine")) is None


@pytest.mark.parametrize("step", [82, 100])
def test_a_decayed_run_that_is_made_longer_is_told_where_it_jumps(step: int) -> None:
    text = describe_schedule(step, build_wsd(100), build_wsd(200))
    assert f"in step {step} and is 1.00e-03 in the next" in text
    assert "without this jump the run is made longer from step 80 or before" in text
    assert "jump" not in describe_schedule(
        step, build_wsd(100), replace(build_wsd(100), scheduler="linear", peak_learning_rate=1e-9)
    )
