"""Loss curves: our default step beside the plain fp32 loop, on the same batches of real text.

    python benchmarks/curves.py            (300 steps of nano on 4 MB; some four minutes on a CPU)
    python benchmarks/curves.py --own      (beside our own step in fp32)
    python benchmarks/curves.py --smoke    (a tiny model, 20 steps, on the CPU)

Ours is what `--train` does on this machine: its precision, its chunked loss, fused AdamW, compiled
on CUDA. The plain one is Hugging Face's GPT-2 of the same first weights with torch's own cross
entropy and unfused AdamW. With `--own` it is our step with `--no-mixed-precision`, so that what
differs is precision alone. Beyond rounding the two must not differ.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import build_hugging_face, print_rows  # noqa: E402

from benchmarks.prepare import gather_text  # noqa: E402
from preflight.corpus.build import prepare_data  # noqa: E402
from preflight.device.runtime import build_runtime, describe_device  # noqa: E402
from preflight.settings import (  # noqa: E402
    ControlSettings,
    DataSettings,
    ModelConfig,
    ModelSettings,
    SystemSettings,
    TrainingSettings,
)
from preflight.tokenization import load_tokenizer  # noqa: E402
from preflight.training.plan import build_plan  # noqa: E402
from preflight.training.schedules import learning_rate_at  # noqa: E402
from train_utils import BatchLoader  # noqa: E402
from trainer import Trainer, build_trainer  # noqa: E402

PEAK_RATE = 1e-3
WINDOW = 20  # steps whose mean loss is compared
Row = tuple[str, Any, str]
Step = Callable[[int, Tensor, Tensor], float]  # of its number and its batch; returns the loss


def build_plain_step(trainer: Trainer, training: TrainingSettings) -> Step:
    """The plain fp32 loop from the weights of `trainer`: Hugging Face's model, unfused AdamW."""
    plan, device = trainer.plan, trainer.runtime.device
    peer = build_hugging_face(trainer.model)[0].to(device).train()
    named = list(peer.named_parameters())
    matrices = [p for n, p in named if p.dim() >= 2 and "wte" not in n and "wpe" not in n]
    others = [p for n, p in named if p.dim() < 2 or "wte" in n or "wpe" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=False,
    )

    def step(number: int, inputs: Tensor, targets: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, plan)
        loss = F.cross_entropy(peer(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def build_own_step(trainer: Trainer, training: TrainingSettings) -> Step:
    """Our own step in fp32 from the weights of `trainer`, not compiled."""
    system = SystemSettings(
        device=trainer.runtime.device.type, mixed_precision=False, compile_model=False
    )
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    other = build_trainer(
        trainer.model.config, training, trainer.plan, build_runtime(system), weights=weights
    )
    return lambda number, *batch: float(other.train_step(number, [batch]).loss)


def train_both(
    shape: ModelConfig,
    megabytes: float,
    batch_size: int,
    steps: int,
    system: SystemSettings,
    build_other: Callable[[Trainer, TrainingSettings], Step],
) -> tuple[list[float], list[float]]:
    """Losses of each step: ours, and those of the fp32 loop that `build_other` makes."""
    training = TrainingSettings(batch_size=batch_size, max_steps=steps, learning_rate=PEAK_RATE)
    with tempfile.TemporaryDirectory() as folder:
        gather_text(Path(folder) / "text", int(megabytes * 1e6))
        data = prepare_data(
            DataSettings(text_file=(f"{folder}/text",), data_dir=f"{folder}/data"),
            load_tokenizer("gpt2"),
        )
        plan = build_plan(training, ControlSettings(), shape.context_length, 10**6, 100)
        # As for a long run, so that a card compiles.
        trainer = build_trainer(shape, training, plan, build_runtime(system, 10**5))
        precision = torch.get_float32_matmul_precision()
        other_step = build_other(trainer, training)
        ours, plain = [], []
        with BatchLoader(
            data,
            "train",
            batch_size=batch_size,
            seed=training.seed,
            device=trainer.runtime.device,
            context_length=shape.context_length,
        ) as loader:
            for step in range(steps):
                inputs, targets = loader.next_batch()
                torch.set_float32_matmul_precision(precision)
                ours.append(float(trainer.train_step(step, [(inputs, targets)]).loss))
                torch.set_float32_matmul_precision("highest")  # no TF32
                plain.append(other_step(step, inputs, targets))
    return ours, plain


def compare(ours: list[float], plain: list[float]) -> list[Row]:
    """How far apart the curves are, in nats per token."""
    apart = [abs(a - b) for a, b in zip(ours, plain, strict=True)]
    means = [
        abs(sum(ours[at : at + WINDOW]) - sum(plain[at : at + WINDOW])) / WINDOW
        for at in range(0, len(ours) - WINDOW + 1, WINDOW)
    ]
    last = max(1, len(ours) // 10)
    assert all(map(math.isfinite, ours + plain))
    return [
        ("loss at first", ours[0], ""),
        (f"mean of the last {last}, ours", sum(ours[-last:]) / last, ""),
        (f"mean of the last {last}, plain fp32", sum(plain[-last:]) / last, ""),
        ("largest difference at one step", max(apart), "<= 0.05"),
        (f"largest difference of the means of {WINDOW} steps", max(means), "<= 0.01"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--own", action="store_true", help="beside our own step in fp32")
    given = parser.parse_args()
    build_other = build_own_step if given.own else build_plain_step
    if given.smoke:
        shape, system = ModelConfig(50257, 32, 32, 2, 2, 128), SystemSettings(device="cpu")
        ours, plain = train_both(shape, 0.4, 4, 20, system, build_other)
    else:
        shape = ModelSettings(model_size="nano").resolve(50257)
        ours, plain = train_both(shape, 4, 8, 300, SystemSettings(), build_other)
    rows = compare(ours, plain)
    print_rows(rows)
    device = build_runtime(SystemSettings(device="cpu" if given.smoke else "auto")).device
    print(
        json.dumps(
            {
                "device": describe_device(device),
                "torch": str(torch.__version__),
                "rows": rows,
                "ours": ours,
                "plain": plain,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
