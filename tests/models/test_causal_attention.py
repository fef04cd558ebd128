"""Attention by blocks of queries, against torch's own in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from preflight.models import causal_attention
from preflight.models.causal_attention import attend_causally


def draw(B: int, H: int, K: int, T: int, D: int) -> list[Tensor]:
    """Queries, keys and values in bf16, as a model has them: heads next to each other."""
    generator = torch.Generator().manual_seed(T)
    heads = torch.randn(B, T, H + 2 * K, D, generator=generator).bfloat16()
    parts = heads.split([H, K, K], dim=2)
    return [part.transpose(1, 2).detach().requires_grad_() for part in parts]


def differentiate(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, grad)]


@pytest.mark.parametrize("block", [256, 16, 7])
@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 48, 16), (1, 6, 2, 33, 8), (3, 4, 1, 1, 8)], ids=["gpt2", "grouped", "one"]
)
def test_output_and_gradients_equal_those_of_fp32(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_attention, "BLOCK_QUERIES", block)
    inputs = draw(*shape)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    found = differentiate(attend_causally(*inputs), inputs)
    for ours, theirs in zip(found, differentiate(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == theirs.shape
        # A number in bf16 is right to 1 in 256; these are sums of rounded ones.
        error = torch.linalg.vector_norm(ours.float() - theirs)
        assert error <= 0.01 * torch.linalg.vector_norm(theirs) + 1e-6


def test_no_token_sees_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "BLOCK_QUERIES", 8)
    q, k, v = (x.detach() for x in draw(1, 2, 2, 30, 8))
    before = attend_causally(q, k, v)
    k[:, :, 20:], v[:, :, 20:] = 100.0, -100.0
    after = attend_causally(q, k, v)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_what_has_dropout_or_another_type_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("by blocks")

    inputs = draw(1, 2, 2, 8, 8)
    monkeypatch.setattr(causal_attention._BlockedAttention, "apply", refuse)
    with pytest.raises(AssertionError, match="by blocks"):
        attend_causally(*inputs)
    assert attend_causally(*inputs, dropout=0.5).shape == inputs[0].shape
    exact = [x.detach().float() for x in inputs]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    assert torch.equal(attend_causally(*exact), expected)
