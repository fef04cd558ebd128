"""Settings: presets, limits, sources, and that everything wrong is told at once."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import (
    GROUPS,
    DataSettings,
    RunConfig,
    TrainingSettings,
    build_config,
    build_options,
    describe_choices,
)


def config_of(**values: object):
    return build_config(values, dict.fromkeys(values, "the command line"))


def test_every_field_is_an_option_with_help_and_a_valid_default() -> None:
    options = build_options()
    for group, settings in GROUPS.items():
        for field in dataclasses.fields(settings):
            if (group, field.name) in (("sampling", "seed"), ("training", "adapter")):
                continue
            assert options[field.name].metadata["help"], field.name
    for option in options.values():
        if option.default not in (None, ()):
            assert (
                getattr(
                    getattr(config_of(**{option.name: option.default}), option.group), option.name
                )
                == option.default
            )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": "0"}, "--batch-size must be at least 1"),
        ({"batch_size": "2.5"}, "--batch-size takes a whole number"),
        ({"batch_size": 2.5}, "--batch-size takes a whole number"),
        ({"batch_size": True}, "--batch-size takes a whole number"),
        ({"batch_size": str(2**70)}, "--batch-size must be at most"),
        ({"learning_rate": "nan"}, "--learning-rate takes a finite number"),
        ({"learning_rate": "-1"}, "--learning-rate must be more than 0"),
        ({"dropout": "1"}, "--dropout must be less than 1"),
        ({"val_split": "0"}, "--val-split must be more than 0"),
        ({"model_size": "huge"}, "choose one of nano"),
        ({"model_size": "custom"}, "--n-layers --n-heads --n-embeddings --context-length"),
        ({"n_heads": "5"}, "does not divide"),
        ({"device": "gpu"}, "--device takes auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ({"output_file": "x.csv"}, "--output-file must end in .json, .jsonl, .txt, got 'x.csv'"),
        ({"prompts": ["a"], "prompts_file": "b"}, "--prompts"),
        ({"resume_from": "a", "auto_resume": False}, "--resume-from"),
        ({"compile_model": "yes"}, "--compile-model takes true or false"),
        ({"text_file": ["a", 3]}, "--text-file takes text"),
        ({"optimizer": "adanw"}, "--optimizer 'adanw' is unknown (did you mean adamw?)"),
        ({"scheduler": "cosin"}, "(did you mean cosine?): choose one of cosine, linear"),
        ({"activation": "swish"}, "choose one of gelu, gelu_tanh, relu, relu_squared, silu, tanh"),
        ({"log_level": "info "}, "(did you mean info?)"),
        ({"output_dir": __file__}, "there is a file of that name, not a folder"),
        ({"output_file": "a.txt", "interactive": True}, "contradict each other"),
    ],
)
def test_each_fault_names_its_flag(values: dict, words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        config_of(**values)
    assert caught.value.code == ExitCode.FLAGS
    assert words in str(caught.value)


def test_all_faults_are_told_at_once_in_at_most_five_lines() -> None:
    bad = {
        "batch_size": "x",
        "dropout": "2",
        "top_p": "0",
        "n_heads": "7",
        "eps": "inf",
        "max_steps": "0",
        "val_split": "3",
    }
    with pytest.raises(PreflightError) as caught:
        config_of(**bad)
    assert len(caught.value.lines) <= 5
    for flag in ("--batch-size", "--dropout", "--top-p", "--eps", "--max-steps", "--val-split"):
        assert flag in str(caught.value)


def test_a_value_at_fault_is_not_reported_as_missing_too() -> None:
    custom = {"model_size": "custom", "n_layers": 2, "n_embeddings": 8, "context_length": 8}
    with pytest.raises(PreflightError) as caught:
        config_of(**custom, n_heads="x")
    assert caught.value.lines == ["--n-heads takes a whole number, got 'x'"]
    with pytest.raises(PreflightError) as caught:
        config_of(**custom)
    assert caught.value.lines == ["--model-size custom also needs --n-heads"]


def test_only_what_is_given_is_set() -> None:
    config = config_of(batch_size="16", learning_rate="1e-3", dropout=0, text_file="a.txt")
    assert config.training == TrainingSettings(batch_size=16, learning_rate=0.001)
    assert config.data == DataSettings(text_file=("a.txt",), output_dir="training_output")
    assert config.control == RunConfig().control
    assert list(config.sources) == ["batch_size", "learning_rate", "dropout", "text_file"]


def test_choices_are_told_with_their_source() -> None:
    config = build_config(
        {"batch_size": 4, "max_steps": "9"},
        {"batch_size": "run.json", "max_steps": "the command line"},
    )
    spelled = build_config({"prompts": ["a b", "-c"], "measure": False, "text_file": ["x y"]}, {})
    assert describe_choices(spelled) == [
        "--text-file 'x y' (from a caller)",
        "'--prompts=a b' --prompts=-c (from a caller)",
        "--no-measure (from a caller)",
    ]
    assert describe_choices(config) == [
        "--batch-size 4 (from run.json)",
        "--max-steps 9 (from the command line)",
    ]


def test_seed_reaches_training_and_sampling() -> None:
    config = config_of(seed="7")
    assert (config.training.seed, config.sampling.seed) == (7, 7)


names = st.sampled_from(sorted(build_options()))
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(), st.none()),
)


@given(st.dictionaries(names, junk, max_size=5))
def test_any_value_gives_a_config_or_a_user_error(values: dict) -> None:
    try:
        config = config_of(**values)
    except PreflightError as error:
        assert error.code == ExitCode.FLAGS
        assert len(error.lines) <= 5
        return
    for option in build_options().values():
        value = getattr(getattr(config, option.group), option.name)
        assert not isinstance(value, float) or math.isfinite(value)
