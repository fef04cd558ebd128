"""The optimizers and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch

from preflight.settings import TrainingSettings


def build_optimizer(
    model: torch.nn.Module, training: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer, in two groups: weight matrices decay; norms, biases and embeddings do not.

    Fused kernels update all weights in one pass, and skip the update on the device itself when
    its gradients are not finite.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decaying = [p for n, p in named if p.dim() >= 2 and "embedding" not in n]
    others = [p for n, p in named if p.dim() < 2 or "embedding" in n]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=training.beta1, fused=True)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    betas = (training.beta1, training.beta2)
    return kind(groups, lr=learning_rate, betas=betas, eps=training.eps, fused=True)
