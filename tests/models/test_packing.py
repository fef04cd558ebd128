"""Weights packed for oneDNN compute what the model's own do, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
from test_families import build_spread, draw_tokens, every_family, make_config

from preflight.models import packing
from preflight.models.packing import PackedLinear, can_pack, count_packed_bytes, pack_model
from preflight.settings import ModelConfig

TYPES = [torch.float32, torch.bfloat16]


def packed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    pack_model(other)
    return other


@pytest.mark.parametrize("dtype", TYPES)
@every_family
@torch.no_grad()
def test_logits_are_those_of_the_model(config: ModelConfig, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        check_refusal(dtype)
        return
    model, tokens = build_spread(config).eval().to(dtype), draw_tokens()
    other = packed(model)
    meant = model.float()(tokens)
    bound = 2e-5 if dtype == torch.float32 else 0.1
    assert (other(tokens).float() - meant).abs().max() <= bound * meant.abs().max()
    assert not [m for m in other.modules() if isinstance(m, torch.nn.Linear)]
    # The head is the packed one: a table that is tied only looks up.
    hidden = torch.randn(2, config.n_embeddings).to(dtype)
    logits = other.compute_logits(hidden)
    other.embed_tokens.weight.zero_()
    assert torch.equal(other.compute_logits(hidden), logits)


def check_refusal(dtype: torch.dtype) -> None:
    """Where there are none: the products are not there, or wrong."""
    layer, x = torch.nn.Linear(64, 33), torch.ones(3, 64)
    try:
        found = PackedLinear(layer.weight.to(dtype), layer.bias.to(dtype))(x.to(dtype))
    except (AttributeError, RuntimeError, NotImplementedError):
        return
    assert not torch.allclose(found.float(), layer(x), rtol=0.01)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@torch.no_grad()
def test_each_row_is_multiplied_alike(rows: int) -> None:
    """For any number of rows, in three dimensions, without a bias, and with odd sizes."""
    assert can_pack(torch.float32), "this torch has no such products: generation is slower"
    weight, x = torch.randn(101, 37), torch.randn(rows, 3, 37)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(
        PackedLinear(weight, None)(x).double(), expected, rtol=1e-5, atol=1e-4
    )


@torch.no_grad()
def test_memory_is_that_of_the_matrices() -> None:
    config = make_config("gpt2")
    assert config.tied
    model = build_spread(config)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    expected = sum(weight.nbytes for weight in [*matrices, model.embed_tokens.weight])
    assert count_packed_bytes(packed(model)) == expected


def test_products_that_are_wrong_or_absent_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackedLinear.forward
    for broken in (
        lambda self, x: forward(self, x) * 1.05,
        lambda self, x: torch.ops.mkldnn._no_such_product(x),
    ):
        can_pack.cache_clear()
        monkeypatch.setattr(packing.PackedLinear, "forward", broken)
        assert not can_pack(torch.float32)
    can_pack.cache_clear()
