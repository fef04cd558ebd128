"""A resumed run trains with the hyperparameters of its flags, never with a checkpoint's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from preflight.device.runtime import Runtime
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.training.plan import build_plan
from trainer import Trainer, build_trainer

MODEL = ModelConfig(
    vocab_size=97, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
)
CPU = Runtime(torch.device("cpu"), torch.float32, False, ())
CHANGES: dict[str, Any] = {"weight_decay": 50.0, "beta1": 0.0, "beta2": 0.5, "eps": 0.5}


def build(optimizer: str, **changes: Any) -> Trainer:
    flags = {"batch_size": 4, "max_steps": 9, "learning_rate": 1e-2, "warmup_steps": 0} | changes
    training = TrainingSettings(optimizer=optimizer, **flags)
    plan = build_plan(training, ControlSettings(), MODEL.context_length, 1000, 20)
    return build_trainer(MODEL, training, plan, CPU)


def train(trainer: Trainer, step: int) -> None:
    tokens = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(step))
    trainer.train_step(step, [(tokens[:, :-1], tokens[:, 1:])])


def continue_with(first: Trainer, optimizer: str, **changes: Any) -> Trainer:
    """A trainer of the `changes` at the state of `first`, one step later."""
    resumed = build(optimizer, **changes)
    resumed.load_state_dict(
        {name: weight.clone() for name, weight in first.model.state_dict().items()},
        copy.deepcopy(first.list_optimizer_tensors()),
        copy.deepcopy(first.state_dict()),
    )
    train(resumed, 3)
    return resumed


def weights_of(trainer: Trainer) -> bytes:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy().tobytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_changed_hyperparameters_are_used(optimizer: str) -> None:
    """What is told as changed shows in the weights; unchanged flags change nothing."""
    first = build(optimizer)
    for step in range(3):
        train(first, step)
    used = ["weight_decay", "beta1"] if optimizer == "sgd" else list(CHANGES)
    ends = [weights_of(continue_with(first, optimizer))]
    ends += [weights_of(continue_with(first, optimizer, **{name: CHANGES[name]})) for name in used]
    train(first, 3)
    assert ends[0] == weights_of(first)
    assert len(set(ends)) == len(ends)


def test_of_a_gradient_scaler_only_what_it_learned_is_restored() -> None:
    plan = build_plan(TrainingSettings(max_steps=9), ControlSettings(), 16, 1000, 20)
    runtime = Runtime(torch.device("cpu"), torch.float16, False, ())
    first, resumed = (build_trainer(MODEL, TrainingSettings(), plan, runtime) for _ in range(2))
    forged = copy.deepcopy(first.state_dict())
    expected = forged["scaler"] | {"scale": 1024.0, "_growth_tracker": 7}
    forged["scaler"] |= {"scale": 1024.0, "_growth_tracker": 7, "growth_factor": -1.0}
    resumed.load_state_dict(first.model.state_dict(), {}, forged)
    assert resumed.scaler.state_dict() == expected
