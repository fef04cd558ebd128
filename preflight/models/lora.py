"""Low-rank adapters (LoRA): a frozen linear layer, and beside it a product of two thin matrices.

y = W x + b + alpha / r * B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1). A and B alone are
trained. They are named as the library PEFT names them, so that either reads the other's files.

Shapes: (... in) vectors that enter a layer, (... out) that leave it, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preflight.core.errors import ExitCode, PreflightError
from preflight.models.base import TokenModel
from preflight.models.protocol import LanguageModel
from preflight.settings.finetuning import ADAPTER_TARGETS, AdapterConfig

_PEFT_PREFIX = "base_model.model."
_PEFT_NAME = re.compile(re.escape(_PEFT_PREFIX) + r"(layers\..+)\.lora_([AB])\.weight")


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and its adapter.

    The backward pass needs the layer's input for A and the r channels between A and B for B. The
    frozen weight has no gradient, so nothing is kept for it.

    Args:
        base_layer: frozen from now on.
        rank: r.
        scale: the factor of B A.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer.requires_grad_(False), scale
        place = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, device=place))
        # Zeros: the model computes what it did until the first update.
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, device=place))
        if place.type != "meta":  # random numbers on meta load torch's compiler, 1.5 seconds
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT does

    def forward(self, x: Tensor) -> Tensor:
        """(... in) -> (... out)."""
        result = self.base_layer(x)
        narrow = F.linear(x, self.lora_A).flatten(0, -2)  # N r
        # One kernel scales, multiplies and adds, without a copy of the result for each.
        wide = torch.addmm(result.flatten(0, -2), narrow, self.lora_B.T, alpha=self.scale)  # N out
        return wide.view(result.shape)


def add_adapters(model: TokenModel, adapter: AdapterConfig) -> None:
    """Freeze the model, and give each target of every block an adapter, drawn with torch's seed.

    Targets that this model does not have are left out.

    Raises:
        PreflightError: code FLAGS, when it has none of them.
    """
    found = [
        (path, module)
        for path, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in ADAPTER_TARGETS
    ]
    chosen = [pair for pair in found if pair[0].rpartition(".")[2] in adapter.targets]
    if not chosen:
        raise no_target_error(adapter, {path.rpartition(".")[2] for path, _ in found})
    model.requires_grad_(False)
    for path, module in chosen:
        parent, _, name = path.rpartition(".")
        wrapped = LoRALinear(module, adapter.rank, adapter.scale)
        setattr(model.layers.get_submodule(parent), name, wrapped)


def no_target_error(adapter: AdapterConfig, present: set[str]) -> PreflightError:
    """The error for adapters of which a model has not one target."""
    return PreflightError(
        ExitCode.FLAGS,
        f"--lora-targets {' '.join(adapter.targets)}: this model has no such layer",
        f"its linear layers: {', '.join(sorted(present)) or 'none that can have an adapter'}",
        "name some of these, or leave the flag out: all get an adapter then",
    )


def list_adapter_weights(model: LanguageModel) -> dict[str, Tensor]:
    """A (r in) and B (out r) of every adapter, by PEFT's names; empty for a model without any."""
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{_PEFT_PREFIX}{path}.lora_A.weight"] = module.lora_A.detach()
            weights[f"{_PEFT_PREFIX}{path}.lora_B.weight"] = module.lora_B.detach()
    return weights


def derive_adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], adapter: AdapterConfig
) -> dict[str, tuple[int, ...]]:
    """Shapes of `list_adapter_weights`, from those of the model's weights without adapters."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        is_target = path.startswith("layers.") and path.rpartition(".")[2] in adapter.targets
        if is_target and kind == "weight":
            result[f"{_PEFT_PREFIX}{path}.lora_A.weight"] = (adapter.rank, shape[1])
            result[f"{_PEFT_PREFIX}{path}.lora_B.weight"] = (shape[0], adapter.rank)
    return result


def load_adapter_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy what `list_adapter_weights` gave into the adapters of `model`.

    Raises:
        ValueError: names or shapes are not those of its adapters. Nothing is copied then.
    """
    own = list_adapter_weights(model)
    odd = sorted(own.keys() ^ weights.keys())
    odd += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if odd:
        raise ValueError(f"not of this model's adapters: {odd[0][:100]}")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def list_trained_weights(model: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint of this model holds: its adapters where it has some, else all weights."""
    return list_adapter_weights(model) or dict(model.state_dict())


def load_trained_weights(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Copy what `list_trained_weights` gave into `model`.

    Raises:
        ValueError, RuntimeError: names or shapes are not the model's.
    """
    if list_adapter_weights(model):
        load_adapter_weights(model, weights)
    else:
        model.load_state_dict(weights)


def merge_adapter(
    weights: dict[str, Tensor], adapter_weights: Mapping[str, Tensor], adapter: AdapterConfig
) -> None:
    """Add alpha / r * B A to each weight that has an adapter, in place and in fp32.

    A weight of fewer bits is replaced by one of fp32, which can hold the sum.

    Args:
        weights: of the base model, by its names.
        adapter_weights: by PEFT's names.
        adapter: its factor is read.

    Raises:
        ValueError: an adapter without its half or without a weight of its shape in `weights`.
            Nothing is changed then.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter_weights.items():
        match = _PEFT_NAME.fullmatch(name)
        if match is None or f"{match[1]}.weight" not in weights:
            raise ValueError(f"the model has no layer for {name[:100]!r}")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for name, pair in pairs.items():
        shape = (*pair["B"].shape[:1], *pair["A"].shape[1:]) if len(pair) == 2 else ()
        fits = shape == weights[name].shape and pair["A"].shape[:1] == pair["B"].shape[1:]
        if not fits or len(pair["A"]) != adapter.rank:
            raise ValueError(f"the adapter of {name[:100]!r} does not fit its weight or its rank")
    for name, pair in pairs.items():
        weights[name] = weights[name].float()
        weights[name].addmm_(pair["B"].float(), pair["A"].float(), alpha=adapter.scale)
