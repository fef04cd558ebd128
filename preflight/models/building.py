"""A model of any family, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from preflight.models.base import TokenModel
from preflight.settings import ModelConfig
from preflight.settings.kinds import MODELS


def build_model(config: ModelConfig, *, gradient_checkpointing: bool = False) -> TokenModel:
    """The model, initialised, on torch's default device."""
    build = MODELS.load(config.model_family)
    model: TokenModel = build(config, gradient_checkpointing=gradient_checkpointing)
    return model


def build_on_meta(config: ModelConfig) -> TokenModel:
    """The model's shapes alone: nothing is held and nothing initialised."""
    with torch.device("meta"), _WithoutInitialisation():
        return build_model(config)


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves out ``torch.nn.init``: random numbers on meta load torch's compiler, 1.5 seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))
