"""The optimizers: how each is built, what its state weighs, and how it skips an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from preflight.models.protocol import LanguageModel, ParameterGroup, ParameterKind
from preflight.settings import TrainingSettings
from preflight.settings.kinds import OPTIMIZERS
from preflight.training.muon import Muon
from preflight.training.sgd import SharedSGD
from preflight.training.uncompiled import leave_compiler_out


@dataclass(frozen=True)
class OptimizerSpec:
    """All that the trainer and the memory estimate need to know of an optimizer.

    Attributes:
        build: from the model's parameters, the settings and the learning rate.
        state_copies: fp32 copies of the parameters of one kind (see `ParameterGroup`) that the
            optimizer's state takes.
        skips_on_device: whether its step reads ``found_inf``, as torch's fused ones do, and then
            leaves weights and state alone. Of any other optimizer the trainer asks the device
            before each step whether loss and gradients are finite, and waits for the answer.
        knows_shards: whether its step takes parameters of which each rank holds a part. Any other
            optimizer is refused on several ranks.
    """

    build: Callable[[list[ParameterGroup], TrainingSettings, float], torch.optim.Optimizer]
    state_copies: Callable[[TrainingSettings, ParameterKind], float]
    skips_on_device: bool = False
    knows_shards: bool = False


def build_optimizer(
    model: LanguageModel, training: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of `training`, over all trainable parameters of the model."""
    spec: OptimizerSpec = OPTIMIZERS.load(training.optimizer)
    return spec.build(model.parameter_groups(), training, learning_rate)


def _split_matrices(
    groups: list[ParameterGroup],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weight matrices, and the rest.

    Checkpoints before format v3 keep the state by a parameter's index, so the order of the two must
    not change.
    """
    matrices = [p for group in groups if group.kind == "matrix" for p in group.parameters]
    others = [p for group in groups if group.kind != "matrix" for p in group.parameters]
    return matrices, others


def _split_by_decay(groups: list[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for torch: weight matrices decay; embeddings, norms and biases do not."""
    matrices, others = _split_matrices(groups)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _build_adam(
    kind: type[torch.optim.Adam],
    groups: list[ParameterGroup],
    training: TrainingSettings,
    learning_rate: float,
) -> torch.optim.Optimizer:
    # Fused kernels update all weights in one pass.
    return leave_compiler_out(kind)(
        _split_by_decay(groups, training.weight_decay),
        lr=learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=True,
    )


def _build_sgd(
    groups: list[ParameterGroup], training: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    split = _split_by_decay(groups, training.weight_decay)
    return leave_compiler_out(SharedSGD)(
        split, lr=learning_rate, momentum=training.beta1, fused=True
    )


def _build_muon(
    groups: list[ParameterGroup], training: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    return leave_compiler_out(Muon)(
        *_split_matrices(groups),
        learning_rate=learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
    )


def _count_sgd_copies(training: TrainingSettings, kind: ParameterKind) -> float:
    return 1 if training.beta1 else 0  # the momentum, which `--beta1 0` turns off


_FUSED = {"skips_on_device": True, "knows_shards": True}
ADAMW = OptimizerSpec(partial(_build_adam, torch.optim.AdamW), lambda *_: 2, **_FUSED)
ADAM = OptimizerSpec(partial(_build_adam, torch.optim.Adam), lambda *_: 2, **_FUSED)
SGD = OptimizerSpec(_build_sgd, _count_sgd_copies, **_FUSED)
MUON = OptimizerSpec(_build_muon, lambda _, kind: 1 if kind == "matrix" else 2, knows_shards=True)
