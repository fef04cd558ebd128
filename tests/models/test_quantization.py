"""Int8 weights: how far they are off, both ways to multiply, and models that use them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generate import generate_ids
from preflight.models import int8_kernels
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.int8_kernels import find_block, find_kernel, has_exact_products, rotate
from preflight.models.quantization import Int8Matrix, quantize_model, quantize_rows
from preflight.models.single_row import SingleRowDecoder
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


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of integers as a CPU with VNNI has them; on any other by torch's plain product."""
    if not has_exact_products():
        monkeypatch.setattr(int8_kernels, "has_exact_products", lambda: True)
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())


@pytest.fixture(params=["integers", "floating point"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a CPU with VNNI, and as on one without."""
    if request.param == "floating point":
        monkeypatch.setattr(int8_kernels, "has_exact_products", lambda: False)
    else:
        request.getfixturevalue("integers")
    return str(request.param)


@pytest.mark.parametrize("wide_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 16, 17, 140])
@pytest.mark.parametrize("shape", [(300, 64), (9, 128), (5000, 32), (30, 24)])
def test_both_products_are_that_of_the_rounded_matrix(
    shape: tuple[int, int], n_rows: int, wide_dtype: torch.dtype, products: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = Int8Matrix(torch.randn(*shape, generator=generator), wide_dtype)
    x = torch.randn(2, n_rows, shape[1], generator=generator).to(torch.bfloat16).float()
    assert matrix.is_integer == (products == "integers" and shape[1] != 24)
    rounded = rotate(matrix.values.float() * matrix.scale.float()[:, None], matrix.block)
    meant = x @ rounded.T
    found = matrix.multiply(x)
    assert found.shape == meant.shape
    assert found.dtype == torch.float32
    assert (found - meant).abs().max() <= 0.015 * meant.abs().max()
    matrix._kernel = None
    assert (matrix.multiply(x) - meant).abs().max() <= 0.01 * meant.abs().max()
    ids = torch.tensor([[0, shape[0] - 1]])
    torch.testing.assert_close(matrix.read_rows(ids, torch.float32), rounded[ids])


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("n_columns", [48, 768])
def test_one_large_value_leaves_the_others_their_precision(n_columns: int) -> None:
    """As in trained models: rounded as it is, a row would lose a tenth and more."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(400, n_columns, generator=generator)
    x = torch.randn(5, n_columns, generator=generator)
    x[:, 7] = 40
    matrix = Int8Matrix(weight, torch.float32)
    meant = x @ matrix.dequantize().T
    without = meant - x[:, 7:8] * matrix.dequantize()[:, 7]
    assert (matrix.multiply(x) - meant).norm() < 0.06 * without.norm()
    plain = x.clone()
    step = x.abs().amax(1, keepdim=True) / 127
    plain = (x / step).round() * step
    assert ((plain - x) @ weight.T).norm() > 0.08 * without.norm()


@pytest.mark.usefixtures("integers")
def test_a_row_has_one_result_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = Int8Matrix(torch.randn(70, 64, generator=generator), torch.float32)
    x = torch.randn(300, 64, generator=generator)
    x[3] = 0
    x[4] *= 1e30
    together = matrix.multiply(x)
    assert together[3].eq(0).all()
    for i in (0, 3, 4, 299):
        torch.testing.assert_close(matrix.multiply(x[i : i + 1])[0], together[i])


@pytest.mark.usefixtures("integers")
def test_one_row_of_gpt2_is_decoded_in_numpy() -> None:
    small = draw(GPT2)
    quantize_model(small)
    tokens = torch.randint(300, (9,), generator=torch.Generator().manual_seed(0))
    cache, of_model = (small.build_cache(1, torch.device("cpu"), torch.float32) for _ in range(2))
    decoder = small.fast_decoder(cache)  # type: ignore[operator]
    assert isinstance(decoder, SingleRowDecoder)
    assert not decoder.multiplies_in_numpy
    for token in tokens:
        found, meant = decoder.decode(token[None]), small.decode(token[None], of_model)
        assert (found - meant).norm() < 0.01 * meant.norm()
    small.layers[0].mlp.up_proj.matrix._kernel = None  # type: ignore[union-attr]
    assert small.fast_decoder(cache) is None  # type: ignore[operator]


def test_saturation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch._int_mm
    has_exact_products.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: own(a, b).clamp(max=2**15))
    try:
        assert not has_exact_products()
        assert find_block(torch.randn(8, 64)) == 1
    finally:
        has_exact_products.cache_clear()


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, scale = quantize_rows(torch.randn(64, 32))
    good = find_kernel(values, scale, 1)
    assert good is not None
    own = good.multiply

    def fail(*_: Any) -> Any:
        raise RuntimeError("not here")

    for fault in (lambda x, q, s: own(x, q, s) * 1.05, lambda x, q, s: own(x, q, s.flip(0)), fail):
        bad = dataclasses.replace(good, multiply=fault)
        monkeypatch.setattr(int8_kernels, "list_kernels", lambda block, bad=bad: [bad])
        assert find_kernel(values, scale, 1) is None
        monkeypatch.setattr(int8_kernels, "list_kernels", lambda block, bad=bad: [bad, good])
        assert find_kernel(values, scale, 1) is good
    assert find_kernel(values.to("meta"), scale, 1) is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_as_with_its_rounded_weights(
    name: str, dtype: torch.dtype, products: str
) -> None:
    model = draw(FAMILIES[name])
    rounded = copy.deepcopy(model)
    for parameter in (p for p in rounded.parameters() if p.dim() > 1):
        if parameter is not _positions(rounded):
            parameter.copy_(Int8Matrix(parameter, torch.float32).dequantize())
    small = copy.deepcopy(model).to(dtype)
    quantize_model(small, dtype)
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    meant, found = rounded(ids), small(ids).float()
    off = float((found - meant).norm() / meant.norm())
    exact = products == "floating point" and dtype == torch.float32
    assert off < (0.015 if exact else 0.06)
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
