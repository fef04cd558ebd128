"""Speed of the model families and of Muon, beside GPT-2 with AdamW, alternating in one run.

    python benchmarks/families.py             (the GPU: small; else the CPU: micro, three minutes)
    python benchmarks/families.py --smoke     (nano, on the CPU; a few seconds)

Families differ in the floating-point operations of a token. So that they are compared at equal
ones, the figure is operations per second: tokens/s times `estimate_flops_per_token`, over GPT-2's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import alternate, print_rows  # noqa: E402
from train import draw_batch  # noqa: E402

import trainer  # noqa: E402
from preflight.device.runtime import build_runtime, describe_device  # noqa: E402
from preflight.models.cost import estimate_flops_per_token  # noqa: E402
from preflight.settings import (  # noqa: E402
    ControlSettings,
    ModelConfig,
    ModelSettings,
    SystemSettings,
    TrainingSettings,
)
from preflight.settings.kinds import MODELS  # noqa: E402
from preflight.training.plan import build_plan  # noqa: E402

VOCAB_SIZE = 4096
N_TOKENS = {"cpu": 2048, "cuda": 32_768}  # of a step
GOAL = 0.9
Row = tuple[str, Any, str]


def build_step(
    shape: ModelConfig, n_tokens: int, optimizer: str, system: SystemSettings
) -> Callable[[], float]:
    """A training step of `--train` of `n_tokens`, its loss read as a run reads it."""
    batch_size = n_tokens // shape.context_length
    training = TrainingSettings(batch_size=batch_size, learning_rate=1e-4, optimizer=optimizer)
    plan = build_plan(training, ControlSettings(), shape.context_length, 10**6, 100)
    own = trainer.build_trainer(shape, training, plan, build_runtime(system, 10**5))
    batch = draw_batch(shape, batch_size, own.runtime.device)
    return lambda: float(own.train_step(100, [batch]).loss)


def compare(sizes: list[str], system: SystemSettings, repeats: int) -> Iterator[Row]:
    """Rows of each size."""
    for size in sizes:
        shapes = {
            name: ModelSettings(model_size=size, model_family=name).resolve(VOCAB_SIZE)
            for name in MODELS.names()
        }
        steps = {
            (name, optimizer): build_step(shape, N_TOKENS[system.device], optimizer, system)
            for name, shape in shapes.items()
            for optimizer in ("adamw", "muon")
        }
        seconds = alternate(steps, repeats, warm_up=3)  # type: ignore[arg-type]
        rates = {key: N_TOKENS[system.device] / each for key, each in seconds.items()}
        flops = {name: estimate_flops_per_token(shape) for name, shape in shapes.items()}
        yield f"{size}: tokens/s, gpt2, adamw", rates["gpt2", "adamw"], ""
        base = rates["gpt2", "adamw"] * flops["gpt2"]
        for name, optimizer in steps:
            goal = f">= {GOAL}" if optimizer == "adamw" else ""
            ratio = rates[name, optimizer] * flops[name] / base
            yield f"{size}: operations/s over gpt2's, {name}, {optimizer}", ratio, goal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="nano, on the CPU")
    given = parser.parse_args()
    on_cuda = torch.cuda.is_available() and not given.smoke
    system = SystemSettings(device="cuda" if on_cuda else "cpu")
    sizes = ["nano"] if given.smoke else ["small"] if on_cuda else ["micro"]
    rows = []
    for row in compare(sizes, system, repeats=2 if given.smoke else 9):
        rows.append(row)
        print_rows([row])
        sys.stdout.flush()
    device = torch.device(system.device)
    facts = {
        "device": describe_device(device),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "rows": rows,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
