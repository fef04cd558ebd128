"""A step's time from parts of the model: exact where the time follows the work exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import build
from preflight.device.runtime import Runtime
from preflight.foresight import step_parts
from preflight.foresight.step_parts import _Seconds, estimate_by_rate, estimate_step
from preflight.models.cost import estimate_flops_per_token
from preflight.settings import ModelConfig, TrainingSettings

REST, BLOCK, PER_ID = 0.003, 2e-12, 1e-9  # seconds; a FLOP of a block; an id and token
UPDATE_REST, UPDATE_BLOCK, UPDATE_ID = 0.0004, 0.002, 1e-7
RUNTIME = Runtime(torch.device("cpu"), torch.float32, False, ())


def count_block_flops(config: ModelConfig, tokens: int) -> float:
    """Of all blocks: those of the model less those of its output head."""
    head = 6 * config.vocab_size * config.n_embeddings
    return (estimate_flops_per_token(config) - head) * tokens


def tell_exactly(
    config: ModelConfig,
    training: TrainingSettings,
    runtime: Runtime,
    shape: tuple[int, int],
    *_: Any,
) -> Iterator[_Seconds]:
    """Times of a machine without noise."""
    shorter = build_shape(config, shape[1])
    micro = REST + BLOCK * count_block_flops(shorter, math.prod(shape))
    micro += PER_ID * config.vocab_size * math.prod(shape)
    update = UPDATE_REST + UPDATE_BLOCK * config.n_layers + UPDATE_ID * config.vocab_size
    return itertools.repeat(_Seconds(micro, update))


def build_shape(config: ModelConfig, tokens: int) -> ModelConfig:
    return ModelConfig(**{**vars(config), "context_length": tokens})


@pytest.mark.parametrize(
    ("flags", "vocabulary", "matmul_flops"),
    [
        ({"model_size": "nano", "batch_size": 8}, 512, 1e12),
        ({"model_size": "nano", "batch_size": 8}, 50257, 1e11),
        ({"model_size": "small", "batch_size": 3}, 50257, 1e11),  # cut to a part of a sequence
        ({"model_size": "small", "batch_size": 64}, 50257, 1e13),  # cut to some sequences
        ({"model_size": "small", "batch_size": 2, "gradient_accumulation_steps": 5}, 3, 1e11),
        ({"model_size": "micro", "batch_size": 4, "n_layers": 1}, 2, 1e11),
        ({"model_size": "nano", "batch_size": 1}, 1, 1e11),
    ],
)
def test_parts_add_up(
    flags: dict[str, Any], vocabulary: int, matmul_flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_parts, "_begin_timing", tell_exactly)
    config = build(flags)
    model, training = config.model.resolve(vocabulary), config.training
    found = estimate_step(model, training, RUNTIME, matmul_flops=matmul_flops)
    shape = training.batch_size, model.context_length
    whole = next(tell_exactly(model, training, RUNTIME, shape))
    expected = training.gradient_accumulation_steps * whole.micro_step + whole.update
    assert found.step_seconds == pytest.approx(expected, rel=1e-9)
    fused = Runtime(RUNTIME.device, RUNTIME.dtype, True, ())
    flops = count_block_flops(model, math.prod(shape))
    compiled = estimate_step(model, training, fused, matmul_flops=1 / BLOCK / 0.8)
    other = estimate_step(model, training, RUNTIME, matmul_flops=1 / BLOCK / 0.8)
    saved = training.gradient_accumulation_steps * BLOCK * flops * 0.2 / 2
    assert other.step_seconds - compiled.step_seconds == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("family", ["gpt2", "mlp"])
def test_real_steps_are_timed(optimizer: str, family: str) -> None:
    """An optimizer whose time is told counts; the random state of the process is its own affair."""
    shape = {"n_layers": 3, "n_embeddings": 32, "n_heads": 1 if family == "mlp" else 2}
    config = build(
        {"model_size": "custom", "context_length": 16, "model_family": family}
        | {"batch_size": 2, "optimizer": optimizer}
        | shape
    )
    model = config.model.resolve(40)
    steps = step_parts._begin_timing(model, config.training, RUNTIME, (2, 16), False)
    seconds = next(steps)
    assert seconds.micro_step > 0
    assert seconds.update > 0
    found = estimate_step(model, config.training, RUNTIME, matmul_flops=1e11)
    assert math.isfinite(found.step_seconds)
    assert found.step_seconds > 0
    assert "1 x 16" not in found.basis
    assert "2 x 16" in found.basis


def test_a_rate_alone() -> None:
    config = build({"model_size": "small", "batch_size": 2, "gradient_accumulation_steps": 3})
    model = config.model.resolve(50257)
    per_token = estimate_flops_per_token(model)
    rate = {"matmul_flops": 1e12, "flops_per_token": per_token}
    found = estimate_by_rate(model, config.training, **rate)
    assert found.step_seconds == pytest.approx(6 * 1024 * per_token / 0.75e12)
    again = estimate_by_rate(model, config.training, gradient_checkpointing=True, **rate)
    assert again.step_seconds == pytest.approx(found.step_seconds * 4 / 3)
