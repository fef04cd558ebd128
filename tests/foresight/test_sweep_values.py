"""What `--sweep` tries, and what it refuses."""

from __future__ import annotations

import pytest

from conftest import build
from preflight.core.errors import ExitCode, PreflightError
from preflight.foresight.sweep import (
    build_combination,
    choose_steps,
    list_combinations,
    parse_sweep,
    spell_values,
)


def test_values_have_the_type_of_their_flag() -> None:
    words = ("learning_rate=1e-3,2e-3,1e-3", "--n-layers=2,3", "optimizer=adamw,sgd")
    assert parse_sweep(words) == {
        "learning_rate": [1e-3, 2e-3],
        "n_layers": [2, 3],
        "optimizer": ["adamw", "sgd"],
    }


def test_several_flags_make_the_product() -> None:
    found = list_combinations({"a": [1, 2], "b": [3, 4, 5]})
    assert len(found) == 6
    assert found[:2] == [{"a": 1, "b": 3}, {"a": 1, "b": 4}]
    assert spell_values({"n_layers": 2, "learning_rate": 1e-3}) == [
        "--n-layers",
        "2",
        "--learning-rate",
        "0.001",
    ]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("learning_rate", "write --sweep FLAG=VALUE"),
        ("learning_rate=", "write --sweep FLAG=VALUE"),
        ("learning_rate=1,x", "--learning-rate takes a number, got 'x'"),
        ("learning_rate=1,,2", "--learning-rate takes a number, got ''"),
        ("learning_rat=1", "did you mean learning_rate"),
        ("output_dir=a,b", "--output-dir is no flag of the model or the training"),
        ("max_steps=1,2", "cannot vary --max-steps: "),
        ("tokenizer=gpt2", "cannot vary --tokenizer: the data folder"),
        ("optimizer=adamw,lion", "--optimizer"),
    ],
)
def test_bad_words_are_named(word: str, told: str) -> None:
    with pytest.raises(PreflightError) as caught:
        parse_sweep((word, "batch_size=0", "batch_size=1"))
    assert caught.value.code == ExitCode.FLAGS
    assert told in caught.value.lines[0]
    assert "--batch-size must be at least 1, got 0" in caught.value.lines[-2]
    assert "--batch-size is given twice" in caught.value.lines[-1]


def test_a_combination_is_checked_as_if_typed() -> None:
    config = build({"n_heads": 2, "model_size": "nano", "max_steps": 5})
    combined = build_combination(config, {"n_embeddings": 64, "learning_rate": 3e-3})
    assert (combined.model.n_embeddings, combined.model.n_heads) == (64, 2)
    assert combined.training.learning_rate == 3e-3
    assert combined.training.max_steps == 5
    assert combined.sources["learning_rate"] == "--sweep"
    with pytest.raises(PreflightError, match="--n-heads") as caught:
        build_combination(config, {"n_embeddings": 63})
    assert caught.value.code == ExitCode.FLAGS


def test_every_training_reads_the_same_tokens() -> None:
    for per_step in (1, 7, 64, 1000):
        assert abs(choose_steps(1000, per_step) * per_step - 1000) <= per_step / 2
    assert choose_steps(10, 1000) == 1
