"""An optimizer's tensors by the names of the parameters, as a checkpoint holds them.

``layers.0.mlp.up_proj.weight.exp_avg`` is the tensor `exp_avg` of that parameter. Hyperparameters
are no part of it: those of the flags are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.rows import wrap_rows
from preflight.models.protocol import LanguageModel


def list_optimizer_tensors(
    model: LanguageModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All tensors that `optimizer` keeps for the parameters of `model`, as they are.

    Raises:
        TypeError: it keeps something else, which a checkpoint cannot hold.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, held in optimizer.state.items():
        for key, value in held.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the optimizer's {key} is no tensor: {type(value).__name__}")
            tensors[f"{names[parameter]}.{key}"] = value
    return tensors


def load_optimizer_tensors(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give `optimizer` what `list_optimizer_tensors` gave; of sharded ones, this rank's rows.

    Raises:
        ValueError: a tensor is of no parameter of it, or of another shape than its shard.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        by_name.setdefault(name, {})[key] = tensor
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.param_groups
    for index, parameter in enumerate(itertools.chain(*(group["params"] for group in groups))):
        held = by_name.pop(names[parameter], {})
        state[index] = {
            key: wrap_rows(tensor, parameter) if tensor.dim() else tensor
            for key, tensor in held.items()
        }
    if by_name:
        raise ValueError(f"the optimizer has no parameter {next(iter(by_name))[:100]}")
    # Hyperparameters stay those of the flags: a checkpoint's are never used.
    own_groups = optimizer.state_dict()["param_groups"]
    held_state = {index: held for index, held in state.items() if held}
    optimizer.load_state_dict({"state": held_state, "param_groups": own_groups})
