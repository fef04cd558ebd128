"""The optimizers against torch's plain ones, and their parameter groups."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from test_trainer import MODEL, build_trainer, draw_batches, weights_of
from torch import Tensor

from preflight.settings import TrainingSettings
from preflight.settings.kinds import OPTIMIZERS


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_equal_torchs_plain_optimizer(name: str) -> None:
    trainer = build_trainer(optimizer=name, scheduler="none", warmup_steps=0, max_grad_norm=0.0)
    reference = build_trainer(optimizer=name).model
    decay = {
        p: 0.1 if p.dim() == 2 and "embed" not in n else 0.0
        for n, p in reference.named_parameters()
    }
    groups = [{"params": [p], "weight_decay": d} for p, d in decay.items()]
    plain = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False),
        "adam": lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False),
    }[name]()
    # The plain optimizer gets our gradients: Adam would magnify rounding in those near zero.
    seen: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.model.parameters())
    )
    for step, batch in enumerate(draw_batches(5)):
        seen.clear()
        trainer.train_step(step, [batch])
        for parameter, gradient in zip(reference.parameters(), seen, strict=True):
            parameter.grad = gradient
        plain.step()
    for ours, theirs in zip(weights_of(trainer), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_first_update_that_is_skipped_leaves_no_trace(name: str) -> None:
    """torch's fused SGD, of itself, then keeps a momentum that was never written."""
    unhurt, hurt = (build_trainer(optimizer=name) for _ in range(2))
    (batch,) = draw_batches(1)
    handle = hurt.model.register_forward_hook(lambda *args: args[-1] * math.nan)
    junk = [torch.full_like(p, 7.0) for p in hurt.model.parameters()]
    del junk  # what is not written to holds it
    hurt.train_step(0, [batch])
    handle.remove()
    for trainer in (unhurt, hurt):
        trainer.train_step(1, [batch])
    for ours, theirs in zip(weights_of(hurt), weights_of(unhurt), strict=True):
        assert torch.equal(ours, theirs)


def test_only_weight_matrices_decay() -> None:
    trainer = build_trainer()
    decaying, others = (group["params"] for group in trainer.optimizer.param_groups)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decaying} == {
        "qkv_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert len(decaying) + len(others) == len(names)
    assert trainer.optimizer.param_groups[1]["weight_decay"] == 0


@pytest.mark.parametrize("name", OPTIMIZERS.names())
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_state_is_as_large_as_the_spec_says(name: str, beta1: float) -> None:
    trainer = build_trainer(optimizer=name, beta1=beta1)
    trainer.train_step(0, draw_batches(1))
    copies, state = OPTIMIZERS.load(name).state_copies, trainer.optimizer.state
    training = TrainingSettings(optimizer=name, beta1=beta1)
    for group in trainer.model.parameter_groups():
        states = [state[p] for p in group.parameters]
        held = sum(v.numel() for s in states for v in s.values() if v is not None and v.dim())
        assert held == copies(training, group.kind) * sum(p.numel() for p in group.parameters)


def test_the_order_of_the_parameters_is_kept() -> None:
    """A checkpoint names the optimizer's state by index: matrices first, each kind in order."""
    trainer = build_trainer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    found = [names[id(p)] for g in trainer.optimizer.param_groups for p in g["params"]]
    layer_matrices = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    matrices = [f"layers.{i}.{m}.weight" for i in range(MODEL.n_layers) for m in layer_matrices]
    assert found[: len(matrices)] == matrices
    others = [name for name in names.values() if name not in matrices]
    assert found[len(matrices) :] == others


def test_neither_a_step_nor_a_state_loads_the_compiler() -> None:
    """In a process of its own: it takes as long as a third of a start, and 70 MiB."""
    code = """
import sys, torch
from preflight.models.protocol import ParameterGroup
from preflight.settings import TrainingSettings
from preflight.settings.kinds import OPTIMIZERS
for name in OPTIMIZERS.names():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    groups = [ParameterGroup("matrix", [weight])]
    optimizer = OPTIMIZERS.load(name).build(groups, TrainingSettings(), 0.1)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert (weight != 1).all(), name
    optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
