"""A model of any family, from its configuration."""

from __future__ import annotations

from preflight.models.base import TokenModel
from preflight.settings import ModelConfig
from preflight.settings.kinds import MODELS


def build_model(config: ModelConfig, *, gradient_checkpointing: bool = False) -> TokenModel:
    """The model, initialised, on torch's default device."""
    build = MODELS.load(config.model_family)
    model: TokenModel = build(config, gradient_checkpointing=gradient_checkpointing)
    return model
