"""Reading one row in numpy, against the model in torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from preflight.decoding.single_row import SingleRowReader, choose_reader, one_torch_thread
from preflight.models.kv_cache import KVCache
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


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_it_reads_as_the_model_does(activation: str) -> None:
    model = build_model(activation)
    tokens = torch.randint(0, 101, (24,))
    expected = model(tokens[None])[0]
    cache, of_model = (KVCache(model.config, 1, CPU, torch.float32) for _ in range(2))
    for own in (cache, of_model):
        model.prefill(tokens[None, :9], own, [0], [9])
    reader = choose_reader(model, cache)
    assert isinstance(reader, SingleRowReader)
    for place in range(9, 24):
        logits = reader.decode(tokens[place : place + 1], cache)
        torch.testing.assert_close(logits, expected[place : place + 1], rtol=1e-4, atol=1e-4)
        model.decode(tokens[place : place + 1], of_model)
    assert cache.lengths == of_model.lengths == [24]
    torch.testing.assert_close(cache.layers, of_model.layers, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="25 tokens are more than the cache's 24"):
        reader.decode(tokens[:1], cache)


def test_a_reader_keeps_to_its_cache() -> None:
    model = build_model()
    own, other = (KVCache(model.config, 1, CPU, torch.float32) for _ in range(2))
    with pytest.raises(ValueError, match="another cache"):
        SingleRowReader(model, own).decode(torch.tensor([1]), other)


def test_scores_beyond_the_exponential_do_no_harm() -> None:
    model = build_model()
    for block in model.layers:
        block.self_attn.qkv_proj.weight.mul_(20)
    tokens = torch.randint(0, 101, (6,))
    cache = KVCache(model.config, 1, CPU, torch.float32)
    reader = choose_reader(model, cache)
    logits = torch.cat([reader.decode(token[None], cache) for token in tokens])
    assert isinstance(reader, SingleRowReader)
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
def test_the_model_reads_wherever_numpy_cannot(
    rows: int, dtype: torch.dtype, cached: torch.dtype, trained: bool
) -> None:
    model = build_model().to(dtype).requires_grad_(trained)
    assert choose_reader(model, KVCache(model.config, rows, CPU, cached)) is model


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
