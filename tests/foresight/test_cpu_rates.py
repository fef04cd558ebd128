"""The estimate of a step on a CPU, against steps that were measured."""

from __future__ import annotations

import pytest
import torch

from conftest import build
from preflight.foresight.cpu_rates import CpuRates, measure_cpu_rates
from preflight.foresight.run_time import estimate_cost

# One core of an AMD EPYC with AVX-512 bf16 (benchmarks/LOG.md, 2026-11-26).
COPY, CALL = 25.3e9, 1.02e-6
RATES = {
    torch.float32: CpuRates(89.7e9, COPY, CALL),
    torch.bfloat16: CpuRates(211.4e9, COPY, CALL),
}
OWN = {"model_size": "custom", "n_layers": 6, "n_heads": 6, "n_embeddings": 384}
TOY = {"model_size": "custom", "n_layers": 2, "n_heads": 2, "n_embeddings": 32}


@pytest.mark.parametrize(
    ("flags", "vocabulary", "dtype", "measured"),
    [
        ({"model_size": "nano", "batch_size": 8}, 50257, torch.bfloat16, 0.429),
        ({"model_size": "micro", "batch_size": 4}, 50257, torch.bfloat16, 0.839),
        (OWN | {"context_length": 256, "batch_size": 4}, 50257, torch.bfloat16, 1.449),
        ({"model_size": "nano", "batch_size": 8}, 512, torch.bfloat16, 0.0549),
        (TOY | {"context_length": 32, "batch_size": 4}, 512, torch.bfloat16, 0.0065),
        (TOY | {"context_length": 32, "batch_size": 4}, 512, torch.float32, 0.0040),
        ({"model_size": "nano", "batch_size": 8}, 50257, torch.float32, 0.679),
    ],
)
def test_steps_that_were_measured(
    flags: dict[str, object], vocabulary: int, dtype: torch.dtype, measured: float
) -> None:
    config = build(flags)
    model = config.model.resolve(vocabulary)
    cost = estimate_cost(model, config.training, dtype=dtype, cpu=RATES[dtype])
    assert cost.step_seconds == pytest.approx(measured, rel=0.3)
    fused = estimate_cost(model, config.training, dtype=dtype, cpu=RATES[dtype], compile_model=True)
    assert fused.step_seconds < cost.step_seconds


def test_rates_of_this_machine() -> None:
    rates = measure_cpu_rates(1e9)
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e-8 < rates.call_seconds < 1e-2
