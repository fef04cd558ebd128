"""The loss, against torch's cross-entropy on whole logits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from preflight.models import loss as losses
from preflight.models.building import build_model
from preflight.models.loss import (
    LOSS_ROWS_CPU,
    NO_TARGET,
    LossLayout,
    TargetRows,
    cap_logits,
    count_targets,
    count_tokens,
    linear_cross_entropy,
    loss_layout,
)
from preflight.settings import ModelSettings

R = LOSS_ROWS_CPU
MASKS = {
    "none": lambda n: [],
    "some": lambda n: list(range(0, n, 3)),
    "borders": lambda n: [i for i in (0, R - 1, R, 2 * R - 1, 2 * R, n - 1) if i < n],
    "a whole chunk": lambda n: list(range(R)) if n > R else [0],
    "all": lambda n: list(range(n)),
}


def draw(n_rows: int, masked: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_rows)
    hidden = torch.randn(n_rows, 16, generator=generator).to(device)
    weight = torch.randn(53, 16, generator=generator).to(device)
    targets = torch.randint(0, 53, (n_rows,), generator=generator)
    targets[masked] = NO_TARGET
    return hidden, weight, targets.to(device)


@pytest.mark.parametrize("n_rows", [1, R, 2 * R, 2 * R + 7])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        loss_layout("cpu"),
        loss_layout("cpu")._replace(vocab_multiple=64),
        LossLayout(R, 1, weight_first=False, fused=True, keeps_logits=True),
        loss_layout("cpu", torch.bfloat16)._replace(rows=R),
        loss_layout("cuda")._replace(rows=R),
    ],
    ids=["cpu", "cpu, padded", "cpu, blocks", "cpu, blocks, padded", "cuda"],
)
def test_loss_equals_cross_entropy(
    n_rows: int,
    mask: str,
    dtype: torch.dtype,
    layout: LossLayout,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "loss_layout", lambda *_: layout)
    hidden, weight, targets = draw(n_rows, MASKS[mask](n_rows), device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    # The oracle computes in fp32 from the same numbers.
    plain = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    loss = linear_cross_entropy(*ours, targets)
    logits = plain[0] @ plain[1].T
    expected = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    exact = dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5 if exact else 0.01, atol=1e-4)
    factor = 1024 / max(1, n_rows)  # as a gradient scaler and the number of targets do
    (loss * factor).backward()
    (expected * factor).backward()
    for a, b in zip(ours, plain, strict=True):
        largest = float(b.grad.abs().max())
        scale = 1e-5 if exact else 0.03
        torch.testing.assert_close(a.grad.float(), b.grad, atol=scale * largest, rtol=1e-4)
    masked = targets == NO_TARGET
    assert not ours[0].grad[masked].any()
    with torch.no_grad():  # another path: no gradients to compute along the way
        torch.testing.assert_close(linear_cross_entropy(*ours, targets), loss.detach())


@pytest.mark.parametrize(
    "layout",
    [
        LossLayout(R, 1, True, keeps_logits=True),
        LossLayout(R, 1, False),
        LossLayout(R, 64, False, fused=True),
        LossLayout(R, 64, False, fused=True, keeps_logits=True),
    ],
    ids=["columns", "rows", "fused", "blocks"],
)
def test_loss_of_capped_logits(
    layout: LossLayout, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients and without: two paths. A cap of 3 is far from the identity here."""
    monkeypatch.setattr(losses, "loss_layout", lambda *_: layout)
    hidden, weight, targets = draw(R + 7, [3], device)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [hidden.requires_grad_(), weight.requires_grad_()]
    logits = 3.0 * torch.tanh(plain[0] @ plain[1].T / 3.0)
    torch.testing.assert_close(cap_logits(plain[0] @ plain[1].T, 3.0), logits)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    loss = linear_cross_entropy(*ours, targets, softcap=3.0)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        loss = linear_cross_entropy(*ours, targets, softcap=3.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-4)


def test_a_wrong_id_is_no_mask() -> None:
    hidden, weight, targets = draw(4, [])
    targets[2] = -7
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden.requires_grad_(), weight, targets)


def test_a_wrong_id_has_no_loss_where_nobody_looks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel raises nothing: the loss is NaN, and the trainer leaves such an update out."""
    layout = LossLayout(R, 64, False, fused=True)
    monkeypatch.setattr(losses, "loss_layout", lambda *_: layout)
    for wrong in (-7, 53, 60):
        hidden, weight, targets = draw(4, [1], device)
        targets[2] = wrong
        assert linear_cross_entropy(hidden.requires_grad_(), weight, targets).isnan()


def test_targets_are_counted_on_their_device() -> None:
    targets = torch.tensor([[3, NO_TARGET, 0], [NO_TARGET, NO_TARGET, 1]])
    count = count_targets(targets)
    assert isinstance(count, Tensor)
    assert int(count) == 3


class _Passes(TorchDispatchMode):
    """Counts operations that give as many numbers as the logits have."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        large = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() == self.size]
        if large and func.is_view is False:
            self.names.append(func.__name__)
        return result


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_mask_costs_no_pass_over_the_logits(
    weight_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LossLayout(R, 1, weight_first, keeps_logits=weight_first)
    monkeypatch.setattr(losses, "loss_layout", lambda *_: layout)
    hidden, weight, targets = draw(R, MASKS["some"](R))
    with _Passes(R * 53) as passes:
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    expected = {
        True: ["new_empty.default", "mm.out", "sub_.Tensor", "exp_.default", "div_.Tensor"],
        False: ["mm.default", "_log_softmax.default", "exp_.default"],
    }[weight_first]
    assert passes.names == [*expected, "scatter_add_.default"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mlp"])
@pytest.mark.parametrize("n_targets", [0, 1, 20, 63])
def test_rows_with_a_target_equal_masked_targets(family: str, n_targets: int) -> None:
    """Loss and gradients, for every family; without any target the loss is zero."""
    config = ModelSettings(
        model_size="custom",
        model_family=family,
        n_layers=2,
        n_heads=1 if family == "mlp" else 2,
        n_embeddings=16,
        context_length=16,
    ).resolve(vocab_size=53)
    torch.manual_seed(1)
    model = build_model(config)
    tokens = torch.randint(0, 53, (4, 16))
    rows = torch.randperm(64)[:n_targets]
    ids = torch.randint(0, 53, (n_targets,))
    masked = torch.full((64,), NO_TARGET)
    masked[rows] = ids
    results = []
    for targets in (masked.view(4, 16), TargetRows(rows, ids, 64)):
        model.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients, count_targets(targets), count_tokens(targets)))
    (loss, gradients, count, n_tokens), (loss2, gradients2, count2, n_tokens2) = results
    assert count == count2 == n_targets
    assert n_tokens == n_tokens2 == 64
    torch.testing.assert_close(loss, loss2, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_buffer_of_logits_serves_every_step_of_a_head(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer made anew at each step finds a new place again and again: the process grows."""
    kept = WeakTensorKeyDictionary()
    monkeypatch.setattr(losses, "_kept_buffers", kept)
    hidden, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in draw(40, []))
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    [place] = [buffer.data_ptr() for buffer in kept.values()]
    for n_rows in (40, 7):
        linear_cross_entropy(hidden[:n_rows], weight, targets[:n_rows])
        with torch.no_grad():
            linear_cross_entropy(hidden[:n_rows], weight, targets[:n_rows])
        assert [buffer.data_ptr() for buffer in kept.values()] == [place]
    more = torch.cat([hidden, hidden])
    linear_cross_entropy(more, weight, torch.cat([targets, targets]))
    assert [len(buffer) >= 80 * 53 for buffer in kept.values()] == [True]
    del weight
    assert not kept


def test_two_threads_never_share_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second loss begins while the first one computes; both are as they are alone."""
    hidden, weight, targets = draw(R, [])
    weight.requires_grad_()

    def compute(factor: float) -> Tensor:
        return linear_cross_entropy(factor * hidden, weight, targets).detach()

    expected = [compute(1.0), compute(2.0)]
    found: list[Tensor] = []
    own = losses._compute_logits

    def compute_and_wait(*args: Any) -> Tensor:
        logits = own(*args)
        if not threading.current_thread().name.startswith("second"):
            thread = threading.Thread(target=lambda: found.append(compute(2.0)), name="second")
            thread.start()
            thread.join()
        return logits

    monkeypatch.setattr(losses, "_compute_logits", compute_and_wait)
    assert [compute(1.0), *found] == expected
