"""What learning wants of the tokens per step."""

from __future__ import annotations

import dataclasses

import pytest

from conftest import MakeConfig, build
from preflight.corpus.build import prepare_data
from preflight.foresight.critical_batch import (
    LearningNeeds,
    estimate_critical_tokens,
    estimate_learning_needs,
    find_batch_warnings,
)
from preflight.tokenization import load_tokenizer
from preflight.training.plan import TrainingPlan, build_plan

NEEDS = LearningNeeds(500_000, 1_500_000, 40_000, 500)


def test_the_law_of_mccandlish() -> None:
    """With enough updates, (S / S_min - 1)(E / E_min - 1) is 1 at every batch size."""
    needs = dataclasses.replace(NEEDS, least_updates=0)
    for batch in (100, 40_000, 3_000_000):
        times_tokens = needs.count_times_tokens(batch)
        # S / S_min is E / B over E_min / B_crit.
        times_steps = times_tokens * needs.critical_tokens / batch
        assert (times_steps - 1) * (times_tokens - 1) == pytest.approx(1)


def test_below_the_least_updates_only_these_count() -> None:
    few = dataclasses.replace(NEEDS, critical_tokens=1e12)
    assert few.count_updates(3000) == (167, 500)
    assert few.count_times_tokens(3000) == pytest.approx(1)
    # Half the updates learn half as much of the same tokens.
    assert few.count_times_tokens(6000) == pytest.approx(2)
    assert few.count_times_tokens(60_000) == pytest.approx(20)


def test_what_was_published() -> None:
    """Kaplan et al. 2020, figure 10: 200 M tokens at a loss of 1; more text, a larger batch."""
    assert estimate_critical_tokens(1e30, 1.8e13) == pytest.approx(2e8, rel=1e-3)
    # GPT-3's small was trained on 300 G tokens with 0.5 M a step, below its critical batch size.
    assert 500_000 < estimate_critical_tokens(85e6, 3e11) < 5_000_000
    assert estimate_critical_tokens(85e6, 1e6) < 100_000


def plan_of(batch_size: int, **flags: float) -> TrainingPlan:
    config = build({"model_size": "nano", "batch_size": batch_size} | flags)
    return build_plan(config.resolve_training(), config.control, 128, 4_116, 216)


def test_a_text_is_measured_in_bytes(make_config: MakeConfig) -> None:
    """Ids of single bytes are worth a quarter of GPT-2's each."""
    config = make_config()
    found = []
    for name in ("gpt2", "byte"):
        tokenizer = load_tokenizer(name)
        own = make_config(tokenizer=name, data_dir=f"data_{name}")
        data = prepare_data(own.data, tokenizer)
        plan = build_plan(config.training, config.control, 32, data.train.n_tokens // 32, 10)
        model = config.model.resolve(1000)
        needs = estimate_learning_needs(own, model, plan, data)
        found.append(needs.critical_tokens * data.train.n_bytes / data.train.n_tokens)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_trained_weights_move_little() -> None:
    def needs(**flags: object) -> LearningNeeds:
        config = build({"model_size": "nano"} | flags)
        return estimate_learning_needs(config, config.model.resolve(50257), plan_of(8), None)

    assert needs().least_updates == 500  # 1 / 0.002
    assert needs(learning_rate=1e-3).least_updates == 1000
    assert needs(init_from="a").least_updates == 100  # five spans of 1 / (1 - 0.95)
    assert needs(optimizer="sgd", learning_rate=0.1).least_updates == 100


def test_a_warning_names_a_size_that_learns_more() -> None:
    config = build({"model_size": "nano"})
    (advice,) = find_batch_warnings(config, NEEDS, plan_of(601))
    assert "6 updates an epoch, 19 in the run" in advice.text
    assert "--batch-size 150 " in advice.fix
    assert find_batch_warnings(config, NEEDS, plan_of(8)) == []
    # The number of steps is given: there a larger batch is more text.
    stepped = build({"model_size": "nano", "max_steps": 20})
    assert find_batch_warnings(stepped, NEEDS, plan_of(601)) == []


def test_an_assumed_text_is_told(make_config: MakeConfig) -> None:
    config = make_config()
    model = config.model.resolve(257)
    unknown = estimate_learning_needs(config, model, plan_of(8), None)
    assert unknown.basis.startswith("a text of 20 tokens per parameter is assumed")
    assert "assumed" not in NEEDS.basis
