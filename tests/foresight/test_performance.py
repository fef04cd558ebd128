"""The time of a run: estimates, parts scaled to the whole, and how the parts add up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeConfig, build
from preflight.corpus.build import prepare_data
from preflight.device.cards import find_card
from preflight.device.runtime import build_runtime
from preflight.foresight import measured_cost
from preflight.foresight.measured_cost import _choose_loads, _Load
from preflight.foresight.run_time import (
    RunCost,
    estimate_cost,
    estimate_run_time,
    find_earliest_stop,
)
from preflight.settings import ModelConfig, TrainingSettings
from preflight.tokenization import load_tokenizer
from preflight.training.plan import build_plan

MODEL = ModelConfig(1000, 64, 64, 4, 3, 256)


def test_a_run_adds_up() -> None:
    cost = RunCost(2.0, 0.1, 1.0, 5.0, 30.0, "test")
    config = build(
        {"max_steps": 100, "checkpoint_every": 30, "eval_every": 25, "checkpoint_minutes": 1.0}
    )
    plan = build_plan(config.training, config.control, 256, 10_000, 50)
    found = estimate_run_time(cost, plan, config.control)
    assert (found.n_checkpoints, found.n_evaluations) == (4, 4)
    assert found.training_seconds == 200
    assert found.checkpoint_seconds == 20
    assert found.evaluation_seconds == pytest.approx(4 * (plan.eval_windows * 0.1 + 1), abs=4)
    assert found.total_seconds == pytest.approx(sum((30, 200, found.evaluation_seconds, 20)))
    rest = estimate_run_time(cost, plan, config.control, done_steps=60)
    assert (rest.training_seconds, rest.n_evaluations, rest.n_checkpoints) == (80, 2, 2)
    # Every minute is every 30 steps; every six seconds is every third.
    often = dataclasses.replace(config.control, checkpoint_minutes=0.1)
    assert estimate_run_time(cost, plan, often).n_checkpoints == 34


@pytest.mark.parametrize(
    ("flags", "done", "n_checkpoints"),
    [
        # Every 30 steps and at the end; before the decay of wsd at 80, once.
        ({"scheduler": "cosine"}, 0, 4),
        ({"scheduler": "wsd"}, 0, 5),
        ({"scheduler": "wsd"}, 80, 1),
        ({"scheduler": "wsd", "checkpoint_every": 40}, 0, 3),
        # Evaluations at 25, 50, 75: each may find the best model yet, and saves it.
        ({"early_stopping_patience": 2}, 0, 7),
        ({"early_stopping_patience": 2}, 50, 3),
        ({"early_stopping_patience": 2, "checkpoint_every": 25}, 0, 4),
        ({"early_stopping_patience": 2, "scheduler": "wsd"}, 0, 8),
        ({"early_stopping_patience": 2, "scheduler": "wsd", "eval_every": 80}, 0, 5),
        ({"early_stopping_patience": 2}, 100, 0),
    ],
)
def test_checkpoints_beside_the_interval(
    flags: dict[str, Any], done: int, n_checkpoints: int
) -> None:
    config = build({"max_steps": 100, "checkpoint_every": 30, "eval_every": 25} | flags)
    plan = build_plan(config.training, config.control, 256, 10_000, 50)
    cost = RunCost(1.0, 0.0, 0.0, 5.0, 0.0, "test")
    found = estimate_run_time(cost, plan, config.control, done)
    assert (found.n_checkpoints, found.checkpoint_seconds) == (n_checkpoints, 5 * n_checkpoints)


@pytest.mark.parametrize(
    ("patience", "done", "earliest"),
    [(None, 0, None), (1, 0, 40), (3, 0, 80), (4, 0, None), (1, 60, 80), (1, 80, None)],
)
def test_the_earliest_stop(patience: int | None, done: int, earliest: int | None) -> None:
    """The first of five evaluations is the best so far, the last is at the end."""
    config = build({"max_steps": 100, "eval_every": 20, "early_stopping_patience": patience})
    plan = build_plan(config.training, config.control, 256, 10_000, 50)
    assert find_earliest_stop(plan, done) == earliest


def test_an_estimate_grows_with_the_work() -> None:
    card = find_card("A100 SXM 80GB")
    small = build({"model_size": "small"}).model.resolve(50257)

    def rate(model: ModelConfig, batch: int, **flags: Any) -> float:
        training = TrainingSettings(batch_size=batch)
        cost = estimate_cost(model, training, dtype=torch.bfloat16, card=card, **flags)
        return batch * model.context_length / cost.step_seconds

    # Public runs of GPT-2 124M on an A100 lie between 90 and 190 thousand tokens a second.
    assert 90_000 < rate(small, 16) < 190_000
    assert rate(small, 16, compile_model=True) > rate(small, 16)
    assert rate(small, 16, gradient_checkpointing=True) < rate(small, 16)
    wide = dataclasses.replace(small, n_layers=24)
    assert rate(wide, 16) < rate(small, 16)
    assert rate(small, 1) < rate(small, 16)


def test_long_steps_are_timed_in_part() -> None:
    full = _Load(4, 8, 1024)
    assert _choose_loads(full, 2.0, True) == (None, full)
    low, high = _choose_loads(full, 12.0, True)
    assert high == _Load(1, 8, 1024)
    low, high = _choose_loads(full, 800.0, True)
    assert (high.micro_steps, high.sequences) == (1, 1)
    assert low is not None
    assert low.tokens <= 8 < high.tokens < 1024
    # Compiled or on CUDA the shapes stay.
    assert _choose_loads(full, 100.0, False) == (_Load(1, 8, 1024), _Load(2, 8, 1024))
    assert _choose_loads(_Load(1, 8, 1024), 100.0, False) == (None, _Load(1, 8, 1024))


def test_a_part_scales_to_the_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time that is made to follow the work exactly is extrapolated exactly."""
    config = make_config(batch_size=8, gradient_accumulation_steps=4)
    tokenizer = load_tokenizer("gpt2")
    data = prepare_data(config.data, tokenizer)
    model = config.model.resolve(tokenizer.vocab_size)
    plan = build_plan(config.training, config.control, 32, 100, 10)
    runtime = build_runtime(config.system, 20)
    clock = [0.0]

    def train_step(self: Any, step: int, batches: Any) -> Any:
        flops = sum(_Load(1, len(x), x.shape[1]).count_flops(model) for x, _ in batches)
        clock[0] += 0.5 + flops / 1e9
        return type("Result", (), {"loss": torch.zeros(())})()

    monkeypatch.setattr(measured_cost.Trainer, "train_step", train_step)
    monkeypatch.setattr(measured_cost.time, "perf_counter", lambda: clock[0])
    Path("training_output").mkdir()
    cost = measured_cost.measure_cost(config, model, plan, runtime, data, tokenizer, 100.0)
    whole = 0.5 + _Load(4, 8, 32).count_flops(model) / 1e9
    assert cost.step_seconds == pytest.approx(whole, rel=1e-6)
    assert "scaled" in cost.basis
    assert cost.peak_bytes is None
