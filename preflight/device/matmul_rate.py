"""How fast a device multiplies matrices: a rate to compare with, and which precision is faster."""

from __future__ import annotations

import functools
import math
import time
from typing import Annotated

import torch
from pydantic import Field

from preflight.core.schema import Schema
from preflight.device.remembered import describe_hardware, recall, remember

_LEAST_GAIN = 1.2  # of bf16 over fp32; 0.5 to 4 were measured, and nothing between 0.6 and 2


class _MatmulRates(Schema):
    """FLOP/s in each precision."""

    float32: Annotated[float, Field(gt=0)]
    bfloat16: Annotated[float, Field(gt=0)]


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, *, least_seconds: float = 0.1
) -> float:
    """FLOP/s of a large matmul: a rate to compare with where no data sheet gives one."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = a @ a
    seconds, repeats = 0.0, 0
    best = math.inf
    while seconds < least_seconds or repeats < 3:
        began = time.perf_counter()
        torch.mm(a, a, out=product)
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
        seconds, repeats = seconds + time.perf_counter() - began, repeats + 1
    return 2 * size**3 / best


@functools.cache
def is_bf16_faster() -> bool:
    """Whether this CPU multiplies faster in bf16: some that have the instructions do not.

    Measured once on a machine (0.1 s), so that its runs agree.
    """
    cpu = torch.device("cpu")
    key = {"of": "matmul", "machine": describe_hardware(cpu)}
    rates = recall(key, _MatmulRates)
    if rates is None:
        with torch.random.fork_rng(devices=[]):
            rates = _MatmulRates(
                float32=measure_matmul_flops(cpu, torch.float32, least_seconds=0.05),
                bfloat16=measure_matmul_flops(cpu, torch.bfloat16, least_seconds=0.05),
            )
        remember(key, rates)
    return rates.bfloat16 > _LEAST_GAIN * rates.float32
