"""What is learned in a given time: the demo, tiny Shakespeare and 8 MB of code beside nanoGPT, and
20 MB of code.

    python benchmarks/learning.py demo
    python benchmarks/learning.py shakespeare --nanogpt FOLDER     (a clone of karpathy/nanoGPT)
    python benchmarks/learning.py tuned --nanogpt FOLDER           (nanoGPT tuned by hand)
    python benchmarks/learning.py code                             (twenty minutes a seed)
    python benchmarks/learning.py demo --smoke                     (a few steps, half a minute)

Every figure is of whole commands, from text to model, in processes of their own, with three seeds.
Losses are bits per byte over the whole validation part. Peers that are compared take turns; in
``code`` they run at the same time, each on half of the cores, so that noise meets both alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prepare import gather_text  # noqa: E402

SHAKESPEARE = ROOT.parent / "shared" / "corpora" / "tinyshakespeare.txt"
Run = dict[str, Any]

# nanoGPT's README, "I only have a macbook": its flags for a run on a CPU.
NANOGPT_FLAGS = [
    "config/train_shakespeare_char.py",
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]
SHAKESPEARE_FLAGS = ["--val-split", "0.1", "--model-size", "nano", "--max-steps", "1300"]
MODERN_MUON = ["--model-family", "modern", "--optimizer", "muon"]
CODE_BYTES, TUNED_BYTES = 20_000_000, 8_000_000
CODE_FLAGS = ["--model-size", "micro", "--vocab-size", "8192", "--batch-size", "8"]
# The learning rate of each is the best of three tried for two minutes (LOG.md).
CODE_RUNS = {
    "gpt2, adamw": ["--max-steps", "580", "--learning-rate", "0.001"],
    "modern, muon": [*MODERN_MUON, "--max-steps", "260", "--learning-rate", "0.005"],
}


def start(folder: Path, flags: list[str], threads: int | None = None) -> subprocess.Popen[bytes]:
    """``main.py --train`` with `flags`, which writes into `folder`."""
    folder.mkdir()
    places = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "run")]
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), "--train", *flags, *places],
            stdout=log,
            stderr=log,
            env=env,
        )


def wait(process: subprocess.Popen[bytes], folder: Path, began: float) -> Run:
    """Seconds of the command, and its last evaluation's bits per byte."""
    if process.wait():
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    seconds = time.perf_counter() - began
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "eval"]
    return {"seconds": seconds, "bits_per_byte": rows[-1]["bits_per_byte"]}


def train(folder: Path, flags: list[str]) -> Run:
    """One run on all cores."""
    began = time.perf_counter()
    return wait(start(folder, flags), folder, began)


# ---- demo ---------------------------------------------------------------------------------------


def run_demo(folder: Path, seed: int, given: Namespace) -> Iterator[tuple[str, Run]]:
    """Both commands of ``make demo``, and what they print last."""
    flags = ["--config", str(ROOT / "demo.json"), "--seed", str(seed)]
    short = ["--max-steps", "4"] if given.smoke else []
    began = time.perf_counter()
    result = train(folder / "demo", [*flags, *short])
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "main.py"), "--generate", *flags),
            *("--output-dir", str(folder / "demo" / "run")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    yield "demo", result | {"seconds": time.perf_counter() - began, "sample": done.stdout}


# ---- tiny Shakespeare beside nanoGPT ------------------------------------------------------------


def run_shakespeare(
    folder: Path, seed: int, given: argparse.Namespace
) -> Iterator[tuple[str, Run]]:
    """Ours, then nanoGPT's, on the same text and the same validation part."""
    flags = [*SHAKESPEARE_FLAGS, *MODERN_MUON, "--text-file", str(SHAKESPEARE)]
    yield "ours", train(folder / "ours", [*flags, "--seed", str(seed)])
    peer = folder / "nanogpt"
    shutil.copytree(given.nanogpt, peer, ignore=shutil.ignore_patterns(".git"))
    data = peer / "data" / "shakespeare_char"
    shutil.copy(SHAKESPEARE, data / "input.txt")
    replace(peer / "train.py", "torch.manual_seed(1337 ", f"torch.manual_seed({seed} ")
    # The download that the file's presence makes needless.
    replace(data / "prepare.py", "import requests\n", "")
    began = time.perf_counter()
    for command in (["data/shakespeare_char/prepare.py"], ["train.py", *NANOGPT_FLAGS]):
        subprocess.run([sys.executable, *command], cwd=peer, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    yield "nanoGPT", {"seconds": seconds, "bits_per_byte": evaluate_nanogpt(peer)}


def evaluate_nanogpt(peer: Path) -> float:
    """Its best checkpoint over the whole validation part, in windows of its context."""
    script = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype("i8"))
size = saved["model_args"]["block_size"]
starts = range(0, len(ids) - size, size)
with torch.no_grad():
    losses = [model(ids[None, s:s+size], ids[None, s+1:s+size+1])[1].item() for s in starts]
print(sum(losses) / len(losses))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=peer, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1]) / math.log(2)  # a character of it is a byte


# ---- 8 MB of code beside nanoGPT tuned by hand --------------------------------------------------

# What its CPU loop leaves out: autocast and the fused optimizer. And GPT-2's encoding from a file.
TUNED = """
import os, runpy, sys
import tiktoken, torch
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
tiktoken.get_encoding = lambda name: TiktokenTokenizer.load(name).encoding
own = torch.optim.AdamW
torch.optim.AdamW = lambda groups, **settings: own(groups, **(settings | {"fused": True}))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_tuned(folder: Path, seed: int, given: Namespace) -> Iterator[tuple[str, Run]]:
    """Ours by default, then nanoGPT in bf16, compiled, with a fused optimizer; from text to model.

    Ours evaluates on 15 batches ten times, nanoGPT on eight of each part.
    """
    text, steps = folder / "code.txt", 12 if given.smoke else given.steps
    gather_text(text, TUNED_BYTES)
    shape = ["--model-size", "nano", "--n-layers", "3", "--context-length", "256"]
    flags = [*shape, "--tokenizer", "gpt2", "--max-steps", str(steps), "--val-split", "0.1"]
    yield "ours", train(folder / "ours", [*flags, "--text-file", str(text), "--seed", str(seed)])
    peer = folder / "nanogpt"
    shutil.copytree(given.nanogpt, peer, ignore=shutil.ignore_patterns(".git"))
    data = peer / "data" / "shakespeare"
    shutil.copy(text, data / "input.txt")
    replace(data / "prepare.py", "import requests\n", "")
    replace(peer / "train.py", "torch.manual_seed(1337 ", f"torch.manual_seed({seed} ")
    replace(peer / "train.py", "nullcontext() if device_type == 'cpu' else ", "")
    peers_flags = [
        *("--dataset=shakespeare", "--device=cpu", "--compile=True", "--dtype=bfloat16"),
        *("--n_layer=3", "--n_head=4", "--n_embd=128", "--block_size=256", "--batch_size=8"),
        *("--gradient_accumulation_steps=1", "--dropout=0.0", "--bias=True"),
        *(f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 20}"),
        *("--learning_rate=2e-3", "--min_lr=2e-4", f"--eval_interval={max(1, steps // 10)}"),
        *("--eval_iters=8", f"--log_interval={max(1, steps // 100)}"),
    ]
    began = time.perf_counter()
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    for command in (["data/shakespeare/prepare.py"], ["train.py", *peers_flags]):
        script = [sys.executable, "-c", TUNED, *command]
        subprocess.run(script, cwd=peer, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.perf_counter() - began
    saved = torch.load(peer / "out" / "ckpt.pt", weights_only=False)
    n_tokens = sum((data / f"{part}.bin").stat().st_size for part in ("train", "val")) / 2
    bits = float(saved["best_val_loss"]) / math.log(2) * n_tokens / text.stat().st_size
    yield "nanoGPT by hand", {"seconds": seconds, "bits_per_byte": bits}


def replace(path: Path, old: str, new: str) -> None:
    """In the text of a file; `old` must be there."""
    source = path.read_text()
    assert old in source, (path, old)
    path.write_text(source.replace(old, new))


# ---- 20 MB of code ------------------------------------------------------------------------------


def run_code(folder: Path, seed: int, given: Namespace) -> Iterator[tuple[str, Run]]:
    """Both at once, each on half of the cores."""
    text = folder / "code.txt"
    gather_text(text, CODE_BYTES)
    threads = max(1, (os.cpu_count() or 2) // 2)
    began = time.perf_counter()
    processes = {}
    for name, flags in CODE_RUNS.items():
        own = [*CODE_FLAGS, *flags, "--text-file", str(text), "--seed", str(seed)]
        processes[name] = start(folder / name, own, threads)
    # The shorter first: the time of the longer would be counted for it otherwise.
    for name in reversed(CODE_RUNS):
        yield name, wait(processes[name], folder / name, began)


# ---- all ----------------------------------------------------------------------------------------

PARTS = {"demo": run_demo, "shakespeare": run_shakespeare, "tuned": run_tuned, "code": run_code}


def summarise(results: list[Run]) -> dict[str, tuple[float, float]]:
    """Mean, and the largest less the smallest."""
    columns = {key: [each[key] for each in results] for key in ("seconds", "bits_per_byte")}
    return {key: (statistics.mean(v), max(v) - min(v)) for key, v in columns.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="demo", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--steps", type=int, default=1000, help="of tuned")
    parser.add_argument("--smoke", action="store_true", help="one seed of the demo, a few steps")
    given = parser.parse_args()
    if given.part in ("shakespeare", "tuned") and given.nanogpt is None:
        parser.error(f"{given.part} needs --nanogpt FOLDER")
    found: dict[str, list[Run]] = {}
    for seed in given.seeds[:1] if given.smoke else given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, result in PARTS[given.part](Path(folder), seed, given):
                found.setdefault(name, []).append(result)
                print(
                    f"seed {seed}  {name:14} {result['seconds']:7.1f} s  "
                    f"{result['bits_per_byte']:.4f} bits per byte",
                    result.get("sample", ""),
                    sep="\n",
                    flush=True,
                )
    summary = {name: summarise(results) for name, results in found.items()}
    print(json.dumps({"part": given.part, "mean_and_spread": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
