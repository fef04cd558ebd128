"""What losing nothing costs: hashing, reading back and fsync as a share of training time.

    python benchmarks/durability.py            (micro, the default model; about a minute)
    python benchmarks/durability.py --smoke    (nano; some seconds)

A save is compared with the plainest one there is (torch.save of weights and state, no hash, no
fsync); the difference is set against the training time between two saves at default intervals:
a tenth of the run, or ten minutes. The goal is under 1 %. Verification at the start is compared
with SHA-256 of as many bytes in memory; the goal is the same rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.checkpoints import format as checkpoint_format  # noqa: E402
from preflight.checkpoints import store  # noqa: E402
from preflight.checkpoints.saving import save_checkpoint  # noqa: E402
from preflight.corpus.build import prepare_data  # noqa: E402
from preflight.corpus.shards import load_data_folder  # noqa: E402
from preflight.device.runtime import build_runtime  # noqa: E402
from preflight.settings import (  # noqa: E402
    ControlSettings,
    DataSettings,
    ModelSettings,
    SystemSettings,
    TrainingSettings,
)
from preflight.tokenization import load_tokenizer  # noqa: E402
from preflight.training.plan import build_plan  # noqa: E402
from trainer import build_trainer  # noqa: E402

SAMPLE_TOKENS = 500_000  # a text of about two megabytes: the shortest run worth saving
TEN_MINUTES = 600.0


def measure_median(act: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `act`."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_training(size: str, folder: Path, repeats: int) -> dict[str, Any]:
    """A step, a save, a plain save, and what follows for the default intervals."""
    training, control = TrainingSettings(), ControlSettings()
    model_config = ModelSettings(model_size=size).resolve(load_tokenizer("gpt2").vocab_size)
    context = model_config.context_length
    windows = SAMPLE_TOKENS // context
    plan = build_plan(training, control, context, windows, windows // 20)
    trainer = build_trainer(model_config, training, plan, build_runtime(SystemSettings()))
    device = trainer.runtime.device
    draw = torch.Generator().manual_seed(0)
    shape = (training.batch_size, context)
    batch = tuple(torch.randint(0, 50_257, shape, generator=draw).to(device) for _ in range(2))

    def step() -> None:
        trainer.train_step(10, [batch])  # type: ignore[list-item]
        trainer.runtime.synchronize()

    step()
    step_seconds = measure_median(step, repeats)
    weights, state = trainer.model.state_dict(), {"trainer": trainer.state_dict()}
    config = {"model": dataclasses.asdict(model_config)}
    numbers = iter(range(1, 1000))

    def save() -> None:
        save_checkpoint(folder, next(numbers), weights, state, config, {})
        store.retire_checkpoints(folder, 1)

    def save_plainly() -> None:
        torch.save({"weights": weights, "state": state}, folder / "plain.pt")

    save()
    save_plainly()
    save_seconds = measure_median(save, repeats)
    plain_seconds = measure_median(save_plainly, repeats)
    interval = min(plan.checkpoint_every * step_seconds, TEN_MINUTES)
    extra = save_seconds - plain_seconds
    return {
        "model": size,
        "device": str(device),
        "step_seconds": step_seconds,
        "save_seconds": save_seconds,
        "plain_save_seconds": plain_seconds,
        "shortest_run_interval_seconds": interval,
        "durability_share_shortest_run": extra / (interval + extra),
        "durability_share_ten_minutes": extra / (TEN_MINUTES + extra),
    }


def measure_verification(folder: Path, repeats: int, n_tokens: int) -> dict[str, float]:
    """GB/s of verifying a checkpoint and a data folder, and of SHA-256 alone."""
    newest = store.list_checkpoints(folder)[0]
    size = sum(entry.bytes for entry in newest.manifest.files.values())

    def verify() -> None:
        checkpoint_format.forget_verified()
        checkpoint_format.verify_checkpoint(newest)

    tokenizer = load_tokenizer("gpt2")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * (n_tokens // 10))
    data = DataSettings(
        text_file=(str(text),), data_dir=str(folder / "data"), shard_size=n_tokens // 10
    )  # ten shards: several are read at once
    prepared = prepare_data(data, tokenizer)
    data_bytes = sum(s.n_tokens for s in prepared.train.shards + prepared.val.shards) * 2
    raw = np.random.default_rng(0).bytes(size)
    return {
        "checkpoint_gb_per_second": size / 1e9 / measure_median(verify, repeats),
        "data_gb_per_second": data_bytes
        / 1e9
        / measure_median(lambda: load_data_folder(prepared.path, tokenizer), repeats),
        "sha256_gb_per_second": size
        / 1e9
        / measure_median(lambda: hashlib.sha256(raw).digest(), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk, which /tmp may not be
        folder, repeats = Path(name), 3 if smoke else 5
        report = measure_training("nano" if smoke else "micro", folder, repeats)
        report |= measure_verification(folder, repeats, 100_000 if smoke else 40_000_000)
    for name, value in report.items():
        print(f"{name:34} {value if isinstance(value, str) else f'{value:.4g}':>12}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
