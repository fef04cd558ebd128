"""Presets, and the architecture that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json

import pytest

from preflight.settings import MODEL_PRESETS, ModelConfig, ModelSettings, model_config_from_dict


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
