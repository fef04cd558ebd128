"""Fine-tuning on chats against trl's SFTTrainer: the same ids, masks, batch size and schedule.

    pip install trl torch==2.13.0                          (in an environment of its own)
    python main.py --import model.gguf --output-dir base
    python main.py --export base_hf --checkpoint-path base --quantize f32
    python benchmarks/finetune.py --chats FILE --base base --hugging-face base_hf --trl PYTHON

Each side runs alone in a process of its own, in turn. Its seconds are those of one epoch of
training steps, without loading and tokenizing. The loss is that of the trained model on chats that
neither side has seen, in fp32. trl runs as it ships (with gradient checkpointing) and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.peers import print_rows
from generate import load_model
from preflight.checkpoints.store import open_checkpoint
from preflight.core.signals import StopFlag
from preflight.models.loss import TargetRows
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.settings import build_config
from train_utils import iterate_windows

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

given = json.load(open(sys.argv[1]))
torch.set_num_threads(given["threads"])
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(given["model"])
rows = [{"input_ids": ids, "completion_mask": mask} for ids, mask in given["train"]]
config = SFTConfig(
    output_dir=given["output"], use_cpu=True, bf16=True, seed=1, report_to="none",
    per_device_train_batch_size=given["batch_size"], num_train_epochs=1,
    learning_rate=given["learning_rate"], lr_scheduler_type="cosine",
    lr_scheduler_kwargs={}, warmup_steps=given["warmup"], weight_decay=0.1, adam_beta2=0.95,
    max_grad_norm=1.0, save_strategy="no", logging_steps=1000, max_length=None,
    completion_only_loss=True, gradient_checkpointing=given["checkpointing"],
    dataloader_num_workers=0, disable_tqdm=True, optim=given["optimizer"],
)
trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows),
                     processing_class=tokenizer)
began = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - began
model = trainer.model.float().eval()
total = count = 0
with torch.no_grad():
    for ids, mask in given["held_out"]:
        ids, mask = torch.tensor([ids]), torch.tensor(mask, dtype=torch.bool)
        logits = model(ids).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total += losses[mask[1:]].sum().item()
        count += int(mask[1:].sum())
print("RESULT " + json.dumps({"seconds": seconds, "loss": total / count}))
"""
LEARNING_RATE = 5e-5


def build_flags(given: argparse.Namespace, chats: Path, output: Path) -> dict[str, Any]:
    """The run of ours: one epoch, its only evaluation at the end."""
    return {
        "finetune": [str(chats)],
        "from_checkpoint": given.base,
        "output_dir": str(output),
        "window": given.window,
        "batch_size": given.batch_size,
        "num_epochs": 1.0,
        "learning_rate": LEARNING_RATE,
        "eval_every": 10**6,
        "checkpoint_every": 10**6,
        "val_split": 0.2,
        "lora_rank": given.lora_rank,
        "data_dir": str(output / "none"),
    }


def run_ours(given: argparse.Namespace, flags: dict[str, Any]) -> float:
    """Seconds of an epoch's steps."""
    words = [sys.executable, str(ROOT / "main.py"), "--finetune", *flags["finetune"]]
    for name, value in flags.items():
        if name == "from_checkpoint":
            words += ["--from", value]
        elif name != "finetune" and value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(words, check=True, stderr=subprocess.PIPE if not given.verbose else None)
    rows = [
        json.loads(line)
        for line in (Path(flags["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    steps, before, seconds = [row for row in rows if row["event"] == "step"], 0, 0.0
    for row in steps:
        seconds += (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]
    return seconds


@torch.no_grad()
def measure_loss(checkpoint: Path, setup: FinetuneSetup) -> float:
    """Nats per target on the validation part, in fp32."""
    model, _ = load_model(open_checkpoint(str(checkpoint)), torch.device("cpu"), torch.float32)
    total = count = 0.0
    for inputs, targets in iterate_windows(
        setup.data, "val", batch_size=8, context_length=0, n_windows=10**6, device="cpu"
    ):
        assert isinstance(targets, TargetRows)
        total += float(model(inputs, targets))
        count += len(targets.ids)
    return total / count


def read_rows(setup: FinetuneSetup, split: str) -> list[tuple[list[int], list[int]]]:
    """Ids and masks of a part."""
    with setup.data.open_rows(split) as rows:
        read = rows.read(np.arange(len(rows)))
    return [(ids.tolist(), mask.astype(int).tolist()) for ids, mask in read]


def run_peer(given: argparse.Namespace, content: dict[str, Any], folder: Path) -> dict[str, float]:
    """One run of trl."""
    (folder / "peer.py").write_text(PEER)
    (folder / "given.json").write_text(json.dumps(content))
    done = subprocess.run(
        [given.trl, str(folder / "peer.py"), str(folder / "given.json")],
        check=True,
        stdout=subprocess.PIPE,
        stderr=None if given.verbose else subprocess.PIPE,
        text=True,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(line.removeprefix("RESULT ")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--hugging-face", required=True)
    parser.add_argument("--trl", required=True, help="the interpreter that has trl")
    parser.add_argument("--n-chats", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = folder / "chats.jsonl"
        rows = json.loads(Path(given.chats).read_text())[: given.n_chats]
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        seconds: dict[str, list[float]] = {}
        losses: dict[str, float] = {}
        for number in range(given.repeats):
            flags = build_flags(given, chats, folder / f"ours{number}")
            seconds.setdefault("ours", []).append(run_ours(given, flags))
            config = build_config(flags, dict.fromkeys(flags, "the benchmark"))
            setup = FinetuneSetup(config, StopFlag())
            if not number:
                losses["before"] = measure_loss(Path(given.base), setup)
                losses["ours"] = measure_loss(folder / "ours0", setup)
            content = {
                "model": given.hugging_face,
                "output": str(folder / "peer"),
                "train": read_rows(setup, "train"),
                "held_out": read_rows(setup, "val"),
                "batch_size": given.batch_size,
                "learning_rate": LEARNING_RATE,
                "warmup": setup.plan.warmup_steps,
                "threads": torch.get_num_threads(),
                "optimizer": "adamw_torch_fused",
            }
            for peer, checkpointing in (("trl as shipped", True), ("trl", False)):
                found = run_peer(given, content | {"checkpointing": checkpointing}, folder)
                seconds.setdefault(peer, []).append(found["seconds"])
                losses.setdefault(peer, found["loss"])
    median = {name: statistics.median(each) for name, each in seconds.items()}
    n_train = len(content["train"])
    print_rows(
        [
            (f"chats in training ({given.batch_size} a step)", n_train, ""),
            *((f"{name}: seconds of an epoch", value, "") for name, value in median.items()),
            ("ours over trl", median["ours"] / median["trl"], "<= 0.6"),
            ("ours over trl as shipped", median["ours"] / median["trl as shipped"], ""),
            *((f"{name}: held-out nats per target", value, "") for name, value in losses.items()),
            ("loss, ours less trl's", losses["ours"] - losses["trl"], "+-0.01"),
        ]
    )


if __name__ == "__main__":
    main()
