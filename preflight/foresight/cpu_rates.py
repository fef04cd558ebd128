"""Seconds of a training step on a CPU by formula, from three rates that are measured at once.

A step is its matmuls at a share of a large one's rate, what the rest reads and writes at the rate
of a copy, and a price for each operation. The constants were set on one busy machine. When measured
again, small models were up to 1.6 times as fast as estimated (benchmarks/LOG.md);
benchmarks/cpu_rates.py measures both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from preflight.models.cost import count_parameters, estimate_flops_per_token
from preflight.settings import ModelConfig

# Shares of a large matmul's rate: in bf16 it is so high that writing the results counts more.
MATMUL_SHARES = {torch.float32: 0.85}
MATMUL_SHARE_16_BIT = 0.72
# As in `run_time`, but vector arithmetic (GELU, softmax, normalisation) takes as long as memory.
_BYTES_PER_VALUE = 4
_VALUES_PER_BLOCK = 5 * 17  # per token and unit of the hidden size, see `run_time`
_BYTES_PER_LOGIT, _BYTES_PER_PARAMETER = 60, 40
_COMPILED_SHARE = 0.25  # of the bytes that blocks move, where operations are fused
_OPERATIONS_PER_BLOCK = {False: 60, True: 20}  # forward and backward, by compiled or not
_OPERATIONS = 150  # of the rest of a step
# What an operation of a step costs with Python, autograd and autocast, in calls of a bare one.
_CALLS_PER_OPERATION, _CALLS_PER_OPERATION_16_BIT = 10, 22
_SECONDS = 0.1  # for each rate


@dataclass(frozen=True)
class CpuRates:
    """What this CPU does in a second, with the threads that torch has.

    Attributes:
        matmul_flops: floating-point operations of a large matmul.
        bytes_per_second: read and written by a large copy.
        call_seconds: of an operation on a few numbers.
    """

    matmul_flops: float
    bytes_per_second: float
    call_seconds: float


def measure_cpu_rates(matmul_flops: float) -> CpuRates:
    """The rates beside that of a matmul; it takes a quarter of a second."""
    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    copy_seconds = _measure_best(lambda: target.copy_(source))
    few, n_calls = torch.zeros(16), 500

    def call() -> None:
        for _ in range(n_calls):
            few + few

    call_seconds = _measure_best(call) / n_calls
    return CpuRates(matmul_flops, 2 * source.nbytes / copy_seconds, call_seconds)


def _measure_best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls; the first one warms up."""
    work()
    best, total = math.inf, 0.0
    while total < _SECONDS:
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        best, total = min(best, taken), total + taken
    return best


def estimate_cpu_step(
    config: ModelConfig,
    rates: CpuRates,
    dtype: torch.dtype,
    *,
    flops_per_token: int,
    micro_steps: int,
    sequences: int,
    compile_model: bool,
) -> float:
    """Seconds of an update of `micro_steps` times `sequences` of `config.context_length` tokens."""
    tokens = micro_steps * sequences * config.context_length
    matmul = MATMUL_SHARES.get(dtype, MATMUL_SHARE_16_BIT) * rates.matmul_flops
    block: float = _BYTES_PER_VALUE * _VALUES_PER_BLOCK * config.n_embeddings * dtype.itemsize
    block *= 1.5 * (_COMPILED_SHARE if compile_model else 1.0)
    moved = tokens * (config.n_layers * block + config.vocab_size * _BYTES_PER_LOGIT)
    moved += count_parameters(config) * (_BYTES_PER_PARAMETER + 12 * (micro_steps - 1))
    operations = _OPERATIONS + config.n_layers * _OPERATIONS_PER_BLOCK[compile_model]
    calls = _CALLS_PER_OPERATION if dtype == torch.float32 else _CALLS_PER_OPERATION_16_BIT
    return (
        flops_per_token * tokens / matmul
        + moved / rates.bytes_per_second
        + operations * micro_steps * calls * rates.call_seconds
    )


def estimate_cpu_token(config: ModelConfig, rates: CpuRates) -> float:
    """Seconds of a generated token: the weights are read once, and each operation is called."""
    operations = 20 + config.n_layers * _OPERATIONS_PER_BLOCK[False] / 3
    flops = estimate_flops_per_token(config, training=False)
    return (
        max(4 * count_parameters(config) / rates.bytes_per_second, flops / rates.matmul_flops)
        + operations * _CALLS_PER_OPERATION / 3 * rates.call_seconds
    )


def describe_basis(rates: CpuRates, dtype: torch.dtype) -> str:
    """Where an estimate comes from."""
    share = MATMUL_SHARES.get(dtype, MATMUL_SHARE_16_BIT)
    return (
        f"{share:.0%} of a matmul's rate here, {rates.matmul_flops / 1e9:,.0f} GFLOP/s, "
        f"{rates.bytes_per_second / 1e9:,.0f} GB/s, {rates.call_seconds * 1e6:.1f} us a call"
    )
