"""Seconds of a step, estimated from parts of the model and then measured, for several shapes.

    python benchmarks/step_parts.py             (some minutes, with nothing else running)
    python benchmarks/step_parts.py --smoke     (the two smallest shapes)
    python benchmarks/step_parts.py --threads 1 --compile-model

The goal is a ratio between 0.7 and 1.3: what `--check --no-measure` says of this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflight.device.matmul_rate import measure_matmul_flops
from preflight.device.runtime import build_runtime
from preflight.foresight.step_parts import estimate_step
from preflight.foresight.timing import time_steps
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


def measure_shape(name: str, flags: dict[str, Any], compile_model: bool) -> dict[str, Any]:
    """Estimated and measured seconds of a step."""
    flags = {"device": "cpu", "compile_model": compile_model} | flags
    config = build_config(flags, dict.fromkeys(flags, "the benchmark"))
    model = config.model.resolve(512 if "512" in name else 50257)
    training, runtime = config.resolve_training(), build_runtime(config.system, 1000)
    flops = measure_matmul_flops(runtime.device, runtime.dtype)
    began = time.perf_counter()
    estimate = estimate_step(model, training, runtime, matmul_flops=flops).step_seconds
    took = time.perf_counter() - began
    plan = build_plan(training, config.control, model.context_length, 10**6, 100)
    trainer = build_trainer(model, training, plan, runtime)
    ids = torch.randint(model.vocab_size, (training.batch_size, model.context_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    time_steps(trainer, lambda: [batch], 3)
    count = max(5, min(50, int(2.0 / estimate)))
    seconds = statistics.median(time_steps(trainer, lambda: [batch], count))
    return {
        "shape": name,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "estimated_seconds": round(estimate, 4),
        "measured_seconds": round(seconds, 4),
        "ratio": round(estimate / seconds, 3),
        "estimated_in_seconds": round(took, 2),
        "matmul_gflops": round(flops / 1e9, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the two smallest shapes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--compile-model", action="store_true", help="the compiled step")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in given.shapes[: 2 if given.smoke else None]:
        for mixed in (True, False):
            flags = SHAPES[name] | {"mixed_precision": mixed}
            print(json.dumps(measure_shape(name, flags, given.compile_model)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
