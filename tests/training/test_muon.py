"""Muon against torch's own, in the precision of each; that it resumes and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from test_trainer import build_trainer, draw_batches, weights_of
from torch import Tensor

from preflight.training import muon
from trainer import Trainer


def follow_torch(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after four steps, and those of torch's optimizers from the same gradients."""
    reference = build_trainer().model
    groups = {g.kind: g.parameters for g in reference.parameter_groups()}
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs = [
        torch.optim.Muon(groups["matrix"], **settings),
        torch.optim.AdamW(
            groups["embedding"] + groups["scalar"], lr=1e-2, betas=(0.9, 0.95), weight_decay=0
        ),
    ]
    seen: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.model.parameters())
    )
    for step, batch in enumerate(draw_batches(4)):
        seen.clear()
        trainer.train_step(step, [batch])
        for parameter, gradient in zip(reference.parameters(), seen, strict=True):
            parameter.grad = gradient
        for optimizer in theirs:
            optimizer.step()
    return weights_of(trainer), [p.detach() for p in reference.parameters()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)], ids=str
)
def test_updates_equal_torchs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """torch's converts to bf16 by one call; without it, its code is the oracle in fp32."""
    monkeypatch.setattr(muon, "choose_dtype", lambda device: dtype)
    if dtype == torch.float32:
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    trainer = build_trainer(optimizer="muon", scheduler="none", warmup_steps=0)
    ours, theirs = follow_torch(trainer)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 8, 24), (4, 24, 8), (7, 8, 8)], ids=str)
def test_singular_values_end_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # In bf16, where the CPU has it in hardware.
    values = torch.linalg.svdvals(muon.orthogonalise(1e-3 * matrices).float())
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.5


def test_a_run_continued_equals_the_whole_run() -> None:
    whole, cut = (build_trainer(optimizer="muon") for _ in range(2))
    batches = draw_batches(6)
    for step in range(6):
        whole.train_step(step, batches[step : step + 1])
    for step in range(3):
        cut.train_step(step, batches[step : step + 1])
    resumed = build_trainer(optimizer="muon", seed=7)
    parts = cut.model.state_dict(), cut.list_optimizer_tensors(), cut.state_dict()
    resumed.load_state_dict(*copy.deepcopy(parts))
    for step in range(3, 6):
        resumed.train_step(step, batches[step : step + 1])
    for a, b in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in whole.optimizer.param_groups] == [
        g["lr"] for g in resumed.optimizer.param_groups
    ]
