"""Seconds of a step on this CPU, estimated from three rates and measured, for several shapes.

    python benchmarks/cpu_rates.py             (some minutes)
    python benchmarks/cpu_rates.py --smoke     (the two smallest shapes)
    python benchmarks/cpu_rates.py --threads 1 --compile-model

Time is this process's CPU time over its threads, so that other work on the machine counts less. The
constants in preflight/foresight/cpu_rates.py are right where the ratios are between 0.7 and 1.3;
they were set by hand from a run of this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflight.device.runtime import build_runtime
from preflight.foresight import cpu_rates, run_time
from preflight.settings import build_config
from preflight.training.plan import build_plan
from trainer import build_trainer

SHAPES: dict[str, dict[str, Any]] = {
    "2 layers, 32, vocabulary 512": {
        "model_size": "custom",
        "n_layers": 2,
        "n_heads": 2,
        "n_embeddings": 32,
        "context_length": 32,
        "batch_size": 4,
    },
    "nano, vocabulary 512": {"model_size": "nano", "batch_size": 8},
    "nano": {"model_size": "nano", "batch_size": 8},
    "micro": {"model_size": "micro", "batch_size": 4},
    "6 layers, 384": {
        "model_size": "custom",
        "n_layers": 6,
        "n_heads": 6,
        "n_embeddings": 384,
        "context_length": 256,
        "batch_size": 4,
    },
    "small": {"model_size": "small", "batch_size": 1},
}


def read_clock() -> float:
    """CPU seconds of this process, as if its threads had run at the same time."""
    return time.process_time() / torch.get_num_threads()


def measure_shape(name: str, flags: dict[str, Any], compile_model: bool) -> dict[str, Any]:
    """Estimated and measured seconds of a step."""
    flags = {"device": "cpu", "compile_model": compile_model} | flags
    config = build_config(flags, dict.fromkeys(flags, "the benchmark"))
    model = config.model.resolve(512 if "512" in name else 50257)
    training, runtime = config.resolve_training(), build_runtime(config.system, 1000)
    flops = run_time.measure_matmul_flops(runtime.device, runtime.dtype)
    rates = cpu_rates.measure_cpu_rates(flops)
    estimate = run_time.estimate_cost(
        model, training, dtype=runtime.dtype, cpu=rates, compile_model=compile_model
    ).step_seconds
    plan = build_plan(training, config.control, model.context_length, 10**6, 100)
    trainer = build_trainer(model, training, plan, runtime)
    ids = torch.randint(model.vocab_size, (training.batch_size, model.context_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    seconds: list[float] = []
    for step in range(50):
        began = read_clock()
        float(trainer.train_step(step, [batch]).loss)
        seconds.append(read_clock() - began)
        if step >= 3 and sum(seconds[1:]) > 1.0:
            break
    return {
        "shape": name,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "estimated_seconds": round(estimate, 4),
        "measured_seconds": round(min(seconds[1:]), 4),
        "ratio": round(estimate / min(seconds[1:]), 3),
        "rates": [rates.matmul_flops, rates.bytes_per_second, rates.call_seconds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the two smallest shapes")
    parser.add_argument("--compile-model", action="store_true", help="the compiled step")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    time.perf_counter = read_clock  # by which the rates are measured too
    for name, flags in list(SHAPES.items())[: 2 if given.smoke else None]:
        for precision in ({}, {"mixed_precision": False}):
            print(
                json.dumps(measure_shape(name, flags | precision, given.compile_model)), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
