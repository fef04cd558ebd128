"""Decoding one row in numpy, against the model in torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from preflight.decoding.stepping import find_fast_decoder
from preflight.models.building import build_model as build_any
from preflight.models.kv_cache import KVCache
from preflight.models.single_row import SingleRowDecoder, one_torch_thread
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS
from transformer_model import DecoderOnlyTransformer

torch.set_num_threads(1)
CPU = torch.device("cpu")


def build_model(activation: str = "gelu") -> DecoderOnlyTransformer:
    """Every parameter drawn, norms and biases too, and frozen."""
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(ModelConfig(101, 24, 48, 3, 2, 80, activation=activation)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def build_decoder(model: DecoderOnlyTransformer, cache: KVCache) -> SingleRowDecoder:
    decoder = model.fast_decoder(cache)
    assert isinstance(decoder, SingleRowDecoder)
    return decoder


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_it_decodes_as_the_model_does(activation: str) -> None:
    model = build_model(activation)
    tokens = torch.randint(0, 101, (24,))
    expected = model(tokens[None])[0]
    cache, of_model = (KVCache(model.config, 1, CPU, torch.float32) for _ in range(2))
    for own in (cache, of_model):
        model.prefill(tokens[None, :9], own, [0], [9])
    decoder = build_decoder(model, cache)
    for position in range(9, 24):
        logits = decoder.decode(tokens[position : position + 1])
        torch.testing.assert_close(logits, expected[position : position + 1], rtol=1e-4, atol=1e-4)
        model.decode(tokens[position : position + 1], of_model)
    assert cache.lengths == of_model.lengths == [24]
    torch.testing.assert_close(cache.layers, of_model.layers, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="25 tokens are more than the cache's 24"):
        decoder.decode(tokens[:1])


def test_scores_beyond_the_exponential_do_no_harm() -> None:
    model = build_model()
    for block in model.layers:
        block.self_attn.qkv_proj.weight.mul_(20)
    tokens = torch.randint(0, 101, (6,))
    decoder = build_decoder(model, KVCache(model.config, 1, CPU, torch.float32))
    logits = torch.cat([decoder.decode(token[None]) for token in tokens])
    torch.testing.assert_close(logits, model(tokens[None])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "dtype", "cached", "trained"),
    [
        (2, torch.float32, torch.float32, False),
        (1, torch.bfloat16, torch.bfloat16, False),
        (1, torch.float32, torch.bfloat16, False),
        (1, torch.float32, torch.float32, True),
    ],
)
def test_torch_decodes_other_batches_and_precisions(
    rows: int, dtype: torch.dtype, cached: torch.dtype, trained: bool
) -> None:
    model = build_model().to(dtype).requires_grad_(trained)
    assert model.fast_decoder(KVCache(model.config, rows, CPU, cached)) is None


def test_torch_decodes_on_other_devices() -> None:
    model = build_model().to("meta")
    assert model.fast_decoder(KVCache(model.config, 1, CPU, torch.float32)) is None


def test_torch_decodes_what_numpy_does_not_know() -> None:
    """Another norm, another linear layer: the answer hangs on what the modules are."""

    class RMSNorm(nn.LayerNorm):
        pass

    class LoRALinear(nn.Linear):
        pass

    for replace in (
        lambda model: setattr(model.layers[1], "input_layernorm", RMSNorm(48)),
        lambda model: setattr(model.layers[1].mlp, "up_proj", LoRALinear(48, 80)),
    ):
        model = build_model()
        cache = KVCache(model.config, 1, CPU, torch.float32)
        build_decoder(model, cache)
        replace(model)
        assert model.requires_grad_(False).fast_decoder(cache) is None


@pytest.mark.parametrize(
    "parts",
    [
        {"n_kv_heads": 1},
        {"norm": "rms"},
        {"qk_norm": True},
        {"positions": "rope"},
        {"feed_forward": "swiglu", "activation": "gelu_tanh"},
        {"bias": False},
        {"tied": False},
        {"logit_softcap": 5.0},
        {"model_family": "mlp", "n_heads": 1},
    ],
    ids=str,
)
def test_torch_decodes_the_parts_of_other_families(parts: dict[str, Any]) -> None:
    config = dataclasses.replace(build_model().config, **parts)
    model = build_any(config).eval().requires_grad_(False)
    assert find_fast_decoder(model, model.build_cache(1, CPU, torch.float32)) is None


def test_numpy_knows_the_eps_of_the_norms() -> None:
    config = dataclasses.replace(build_model().config, norm_eps=1e-3)
    model = build_any(config).eval().requires_grad_(False)
    assert model.config.list_changed_parts() == {"norm_eps": 1e-3}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)  # small, so that eps matters
    tokens = torch.randint(0, 101, (6,))
    assert isinstance(model, DecoderOnlyTransformer)
    decoder = build_decoder(model, KVCache(config, 1, CPU, torch.float32))
    logits = torch.cat([decoder.decode(token[None]) for token in tokens])
    torch.testing.assert_close(logits, model(tokens[None])[0], rtol=1e-4, atol=1e-6)


def test_torch_gets_its_threads_back_after_an_error() -> None:
    torch.set_num_threads(2)
    try:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        with pytest.raises(KeyError), one_torch_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
