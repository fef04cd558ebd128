"""Int8 weights: how far they are off, both ways to multiply, and models that use them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generate import generate_ids
from preflight.models import quantization
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.quantization import (
    Int8Matrix,
    find_kernel,
    quantize_model,
    quantize_rows,
)
from preflight.settings import ModelConfig, SamplingConfig

GPT2 = ModelConfig(300, 64, 64, 4, 2, 128)
LLAMA = ModelConfig(
    *(300, 64, 64, 4, 2, 128),
    model_family="llama",
    n_kv_heads=2,
    norm="rms",
    positions="rope",
    feed_forward="swiglu",
    bias=False,
    tied=False,
)
MLP = ModelConfig(300, 8, 64, 1, 2, 128, model_family="mlp", activation="tanh")
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mlp": MLP}


def draw(config: ModelConfig) -> TokenModel:
    torch.manual_seed(3)
    model = build_model(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
        else:
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


@given(st.integers(1, 20), st.integers(1, 40), st.floats(1e-20, 1e20), st.integers(0, 99))
def test_a_row_is_off_by_half_a_scale(n: int, k: int, size: float, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = 0
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(dim=1)[1:].eq(127).all()  # the largest value uses the whole range
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * 0.50001).all()
    assert values[0].eq(0).all()


@pytest.mark.parametrize("wide_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 16, 17, 40])
@pytest.mark.parametrize("shape", [(300, 64), (9, 128), (5000, 32)])
def test_both_products_are_that_of_the_rounded_matrix(
    shape: tuple[int, int], n_rows: int, wide_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = Int8Matrix(torch.randn(*shape, generator=generator), wide_dtype)
    x = torch.randn(2, n_rows, shape[1], generator=generator).to(torch.bfloat16).float()
    rounded = matrix.values.float() * matrix.scale.float()[:, None]
    meant = x @ rounded.T
    found = matrix.multiply(x)
    assert found.shape == meant.shape
    assert found.dtype == torch.float32
    assert (found - meant).abs().max() <= 0.01 * meant.abs().max()
    matrix._kernel = None
    assert (matrix.multiply(x) - meant).abs().max() <= 0.01 * meant.abs().max()
    ids = torch.tensor([[0, shape[0] - 1]])
    assert torch.equal(matrix.read_rows(ids, torch.float32), rounded[ids])


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, scale = quantize_rows(torch.randn(64, 32))
    scale = scale.to(torch.bfloat16)
    assert find_kernel(values, scale) is not None
    own = torch.ops.aten._weight_int8pack_mm

    def fail(*_: Any) -> Any:
        raise RuntimeError("not here")

    for fault in (lambda x, q, s: own(x, q, s) * 1.05, lambda x, q, s: own(x, q, s.flip(0)), fail):
        monkeypatch.setattr(quantization, "load_kernel", lambda fault=fault: fault)
        assert find_kernel(values, scale) is None
    monkeypatch.setattr(quantization, "load_kernel", lambda: None)
    assert find_kernel(values, scale) is None
    assert find_kernel(values.to("meta"), scale) is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_as_with_its_rounded_weights(name: str, dtype: torch.dtype) -> None:
    model = draw(FAMILIES[name])
    rounded = copy.deepcopy(model)
    for parameter in (p for p in rounded.parameters() if p.dim() > 1):
        if parameter is not _positions(rounded):
            values, scale = quantize_rows(parameter)
            parameter.copy_(values.float() * scale.to(torch.bfloat16).float()[:, None])
    small = copy.deepcopy(model).to(dtype)
    quantize_model(small, dtype)
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    meant, found = rounded(ids), small(ids).float()
    off = float((found - meant).norm() / meant.norm())
    assert off < (0.015 if dtype == torch.float32 else 0.04)
    for weight in (*small.parameters(), *small.buffers()):
        assert weight.dtype == torch.int8 or weight.dim() < 2 or weight is _positions(small)
    n_bytes = sum(w.nbytes for w in (*small.parameters(), *small.buffers()))
    whole = sum(w.nbytes for w in model.parameters())
    assert n_bytes < 0.42 * whole  # scales and norms weigh more here than in a large model


def _positions(model: TokenModel) -> Any:
    return getattr(getattr(model, "embed_positions", None), "weight", None)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_with_a_cache_gives_the_tokens_of_whole_passes(name: str) -> None:
    small = draw(FAMILIES[name])
    quantize_model(small)
    ids = [5, 7, 11, 2]
    config = SamplingConfig(max_new_tokens=4, temperature=0.0)
    found = generate_ids(small, [ids, ids[:2]], config)
    for start, answer in zip((ids, ids[:2]), found, strict=True):
        for i, token in enumerate(answer):
            logits = small(torch.tensor([start + answer[:i]]))[0, -1]
            assert logits[token] >= logits.max() - 0.02 * logits.abs().max()
    head = small.embed_tokens if small.config.tied else small.lm_head
    assert small._multiply_head == head.matrix.multiply  # no copy of the table at each token
    assert small.embed_tokens.weight.shape == (300, 64)
    assert small.head_weight.shape == (300, 64)
