"""The trial of the ways to compute a step: what it may cost, and that it measures each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preflight.device.runtime import Runtime, find_missing_compiler
from preflight.device.ways import Way
from preflight.foresight import way_trial
from preflight.foresight.way_trial import (
    COMPILE_SECONDS,
    LEAST_ROUNDS,
    START_SECONDS,
    TRIAL_SHARE,
    WARM_UP_STEPS,
    WaySpec,
    may_be_long,
    measure_ways,
    pick_affordable,
)
from preflight.models.cost import estimate_flops_per_token
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.training.plan import build_plan

MODEL = ModelConfig(
    vocab_size=97, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
)
BF16, FP32 = Way(precision="bfloat16"), Way(precision="float32")
COMPILED = Way(precision="bfloat16", compiled=True)
WAYS = [BF16, FP32, COMPILED]


@given(st.integers(1, 10**6), st.floats(1e-4, 1e3))
def test_a_trial_costs_at_most_its_share_of_the_run(n_steps: int, seconds: float) -> None:
    affordable = pick_affordable(WAYS, n_steps, seconds)
    assert affordable == WAYS[: len(affordable)]
    assert len(affordable) != 1
    if affordable:
        cost = START_SECONDS + len(affordable) * (WARM_UP_STEPS + LEAST_ROUNDS) * seconds
        cost += COMPILE_SECONDS * (COMPILED in affordable)
        assert cost <= TRIAL_SHARE * n_steps * seconds * (1 + 1e-9)
    assert len(pick_affordable(WAYS, 2 * n_steps, seconds)) >= len(affordable)


@pytest.mark.parametrize(
    ("minutes", "expected"), [(1, []), (3, []), (4, WAYS[:2]), (20, WAYS[:2]), (22, WAYS)]
)
def test_what_runs_of_many_minutes_try(minutes: int, expected: list[Way]) -> None:
    assert pick_affordable(WAYS, minutes * 600, 0.1) == expected


def build_spec(accumulation: int = 1, **changes: object) -> WaySpec:
    training = TrainingSettings(
        batch_size=4, max_steps=10**6, gradient_accumulation_steps=accumulation, learning_rate=1e-3
    )
    plan = build_plan(training, ControlSettings(), MODEL.context_length, 10**6, 100)
    runtime = Runtime(torch.device("cpu"), torch.float32, False, ())
    spec = WaySpec(MODEL, training, plan, runtime, [FP32, BF16], 10**6, False)
    return replace(spec, **changes)  # type: ignore[arg-type]


def test_a_run_that_is_short_on_any_processor_is_not_looked_at() -> None:
    spec = build_spec()
    flops = estimate_flops_per_token(MODEL) * spec.plan.tokens_per_step
    least = START_SECONDS / TRIAL_SHARE * 10e9 * torch.get_num_threads() / flops
    assert not may_be_long(MODEL, spec.plan, int(least * 0.99))
    assert may_be_long(MODEL, spec.plan, int(least * 1.01))


def test_each_way_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake clock gives each way its own seconds; a neighbour makes one round ten times slower."""
    calls: list[torch.dtype] = []

    def take(trainer: object, batches: object, count: int) -> list[float]:
        dtype = trainer.runtime.dtype  # type: ignore[attr-defined]
        calls.append(dtype)
        is_disturbed = len(calls) in (5, 6)
        return [(3.0 if dtype == torch.bfloat16 else 2.0) * (10 if is_disturbed else 1)]

    monkeypatch.setattr(way_trial, "time_steps", take)
    found = measure_ways(build_spec(accumulation=4), lambda message: None)
    assert [(f.way, f.step_seconds) for f in found.figures] == [(FP32, 8.0), (BF16, 12.0)]
    assert len(calls) == 2 + 2 * way_trial.MOST_ROUNDS
    assert calls[::2] == [torch.float32] * (len(calls) // 2)


def test_real_steps_are_timed() -> None:
    found = measure_ways(build_spec(), lambda message: None)
    assert [figure.way for figure in found.figures] == [FP32, BF16]
    assert all(0 < figure.step_seconds < 10 for figure in found.figures)
    assert all(figure.compile_seconds == 0 for figure in found.figures)


def test_a_compilation_that_a_real_step_shows_too_expensive_is_left_out() -> None:
    """By the estimate the run was long; its steps take a millisecond or so."""
    spec = build_spec(ways=WAYS, n_steps=1000)
    found = measure_ways(spec, lambda message: None)
    assert [figure.way for figure in found.figures] == [BF16, FP32]


@pytest.mark.slow
@pytest.mark.skipif(bool(find_missing_compiler(torch.device("cpu"))), reason="needs a compiler")
def test_a_compiled_way_is_timed_with_its_compilation() -> None:
    spec = build_spec(ways=[FP32, Way(precision="float32", compiled=True)], n_steps=10**9)
    eager, compiled = measure_ways(spec, lambda message: None).figures
    assert eager.compile_seconds == 0
    assert compiled.compile_seconds > 20 * compiled.step_seconds
