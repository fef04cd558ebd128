"""Presets, and the architecture that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import (
    MODEL_PRESETS,
    ModelConfig,
    ModelSettings,
    build_config,
    model_config_from_dict,
    model_config_to_dict,
)
from preflight.settings.model import choose_learning_rate


def test_presets_are_complete_and_flags_override_them() -> None:
    for name, preset in MODEL_PRESETS.items():
        model = ModelSettings(model_size=name).resolve(50257)
        assert (model.n_layers, model.n_embeddings) == (preset.n_layers, preset.n_embeddings)
        assert model.ffn_hid_dim == 4 * model.n_embeddings
    small = ModelSettings(model_size="small", n_layers=3, context_length=64).resolve(50257)
    assert (small.n_layers, small.context_length, small.n_embeddings) == (3, 64, 768)
    wide = ModelSettings(model_size="nano", n_embeddings=64, n_heads=4).resolve(50257)
    assert wide.ffn_hid_dim == 256
    deep = ModelSettings(model_size="nano", ffn_hid_dim=99).resolve(50257)
    assert deep.ffn_hid_dim == 99


def test_model_config_is_equal_after_a_round_trip_through_json() -> None:
    model = ModelSettings(model_size="nano").resolve(50257)
    stored = json.loads(json.dumps(dataclasses.asdict(model)))
    assert model_config_from_dict(stored) == model
    assert model_config_from_dict({k: v for k, v in stored.items() if k != "dropout"}) == model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": 1}, "unknown or missing keys: rope"),
        ({"n_heads": None, "n_head": 4}, "unknown or missing keys: n_head"),
        ({"n_heads": 3}, "n_heads 3 does not divide n_embeddings 128"),
        ({"n_layers": True}, "n_layers takes a whole number, got True"),
        ({"n_layers": "2"}, "n_layers takes a whole number, got '2'"),
        ({"n_layers": 2.0}, "n_layers takes a whole number, got 2.0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"dropout": "x"}, "dropout takes a number, got 'x'"),
        ({"dropout": 1}, "dropout must be less than 1, got 1"),
        ({"activation": "gelv"}, "(did you mean gelu?)"),
        ({"activation": []}, "activation takes text, got []"),
        ({"n_layers": 0, "dropout": -1}, "got 0; dropout must be at least 0, got -1"),
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, object], words: str) -> None:
    stored = dataclasses.asdict(ModelSettings(model_size="nano").resolve(50257)) | change
    with pytest.raises(ValueError) as caught:
        model_config_from_dict(stored)
    assert words in str(caught.value)


def test_keys_are_needed_unless_they_have_a_default() -> None:
    stored = dataclasses.asdict(ModelConfig(10, 10, 10, 2, 1, 10))
    del stored["n_heads"]
    with pytest.raises(ValueError, match="missing keys: n_heads"):
        model_config_from_dict(stored)
    with pytest.raises(ValueError, match="not an object"):
        model_config_from_dict([])


def test_the_constructor_takes_positions_and_checks_values() -> None:
    assert ModelConfig(50_257, 10**7, 12, 3, 4096, 7).n_layers == 4096  # no bound from above
    with pytest.raises(ValueError, match="does not divide"):
        ModelConfig(10, 10, 10, 3, 1, 10)
    with pytest.raises(ValueError, match="does not divide"):
        dataclasses.replace(ModelConfig(10, 10, 10, 2, 1, 10), n_heads=3)


def test_a_family_gives_the_parts_that_no_flag_names() -> None:
    llama = ModelSettings(model_size="small", model_family="llama").resolve(32_000)
    assert (llama.norm, llama.positions, llama.feed_forward) == ("rms", "rope", "swiglu")
    assert (llama.bias, llama.tied, llama.kv_heads, llama.ffn_hid_dim) == (False, False, 12, 2048)
    wide = ModelSettings(n_embeddings=4096, n_heads=32, model_family="llama").resolve(32_000)
    assert wide.ffn_hid_dim == 10_944  # two thirds of 16,384, up to a multiple of 64
    mixed = ModelSettings(model_family="modern", feed_forward="geglu", bias=True, norm="layer")
    assert mixed.resolve(97).list_changed_parts() == {
        "model_family": "modern",
        "positions": "rope",
        "qk_norm": True,
        "feed_forward": "geglu",
    }
    ngram = ModelSettings(model_size="tiny", model_family="mlp").resolve(97)
    assert (ngram.context_length, ngram.n_heads, ngram.activation) == (16, 1, "tanh")
    assert "llama (feed-forward size 2,048)" in llama.label


def test_a_checkpoint_of_gpt2_names_no_new_part() -> None:
    gpt2 = ModelSettings(model_size="nano", dropout=0.1).resolve(97)
    stored = model_config_to_dict(gpt2)
    assert len(stored) == 8
    assert model_config_from_dict(stored) == gpt2
    llama = ModelSettings(model_family="llama", n_kv_heads=2).resolve(97)
    assert model_config_from_dict(json.loads(json.dumps(model_config_to_dict(llama)))) == llama


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"n_kv_heads": "3"}, "--n-kv-heads 3 does not divide n-heads 8"),
        ({"rope_theta": "500"}, "--rope-theta 500.0 needs positions rope"),
        ({"positions": "rope", "rope_factor": "2"}, "--rope-factor above 1"),
        ({"positions": "rope", "rope_scaling": "ntk"}, "--rope-factor above 1"),
        ({"positions": "rope", "n_embeddings": "24"}, "heads of an even size, not 3"),
        ({"feed_forward": "swiglu", "activation": "relu"}, "--activation relu needs feed-forward"),
        ({"model_family": "lamma"}, "(did you mean llama?)"),
        ({"model_family": "mlp", "norm": "rms"}, "--norm rms is no part of model-family mlp"),
        ({"model_family": "mlp", "n_heads": "4"}, "--n-heads 4 is no part of model-family mlp"),
    ],
)
def test_parts_that_do_not_fit_are_refused(flags: dict[str, str], words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        build_config(flags, {})
    assert caught.value.code == ExitCode.FLAGS
    assert words in str(caught.value)
    assert len(caught.value.lines) == 1


def test_learning_rate_of_a_custom_size_lies_between_the_presets() -> None:
    for name, preset in MODEL_PRESETS.items():
        assert ModelSettings(name).learning_rate == preset.learning_rate
    rates = [choose_learning_rate(6, width) for width in range(1, 6000, 7)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (2e-3, 2e-4)
    # Of a model as large as the geometric mean of two presets, it is the mean of theirs.
    nano, micro = MODEL_PRESETS["nano"], MODEL_PRESETS["micro"]
    sizes = [preset.n_layers * preset.n_embeddings**2 for preset in (nano, micro)]
    width = round(math.sqrt(math.sqrt(sizes[0] * sizes[1])))
    middle = math.sqrt(nano.learning_rate * micro.learning_rate)
    assert choose_learning_rate(1, width) == pytest.approx(middle, rel=0.02)
    assert ModelSettings("nano", n_embeddings=768, n_layers=12).learning_rate == 6e-4
