"""The modes on a GPU, one command each: families, fine-tuning, int8, evaluation, ranks, serving.

    python benchmarks/gpu_parts.py            (some two minutes on a large GPU)
    python benchmarks/gpu_parts.py --smoke    (tiny models on the CPU)

Each command is one that a user types, on a text made here. Of what it prints, the lines with a
figure are shown. One that fails is reported with its last lines, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "llama", "modern", "mlp")
LIMIT_SECONDS = 60.0  # of one command
SHOWN = 3  # lines with a figure, from the last one up
_FIGURE = re.compile(r"tokens/s|peak memory|bits per byte|perplexity|accuracy|tokens_per_second")


def write_texts(folder: Path) -> None:
    """A text to train on, one to evaluate, and chats."""
    lines = [f"{n} and {n + 1} are {2 * n + 1}, as anyone can see.\n" for n in range(20_000)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "other.txt").write_text("".join(lines[:500]), encoding="utf-8")
    chats = (
        {
            "messages": [
                {"role": "user", "content": f"What are {n} and {n + 1}?"},
                {"role": "assistant", "content": f"{2 * n + 1}"},
            ]
        }
        for n in range(200)
    )
    rows = "".join(json.dumps(chat) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(rows, encoding="utf-8")


def list_commands(smoke: bool, n_cards: int) -> Iterator[tuple[str, list[str]]]:
    """The name of each command, and its words."""
    main = [sys.executable, str(ROOT / "main.py")]
    device = ["--device", "cpu"] if smoke else []
    size = ["--model-size", "nano" if smoke else "small"]
    steps = "4" if smoke else "60"
    run = [*size, "--tokenizer", "gpt2", "--text-file", "text.txt", *device]
    train = [*main, "--train", *run, "--max-steps", steps, "--eval-every", steps]
    for family in FAMILIES:
        yield family, [*train, "--model-family", family, "--output-dir", f"out-{family}"]
    checkpointing = ["--gradient-checkpointing", "--output-dir", "out-checkpointing"]
    yield "gradient checkpointing", [*train, *checkpointing]
    if not smoke:  # half a minute on a CPU
        for flag in ("--compile-model", "--no-compile-model"):
            yield f"gpt2 {flag}", [*train, flag, "--output-dir", f"out{flag}"]
    base = ["--from", "out-gpt2"]
    lora = ["--finetune", "chats.jsonl", *base, "--lora-rank", "8", "--max-steps", steps]
    yield "fine-tuning with LoRA", [*main, *lora, *device, "--output-dir", "out-lora"]
    trained = ["--output-dir", "out-gpt2", *device]
    prompt = ["--prompts", "7 and 8 are", "--max-new-tokens", "8" if smoke else "128"]
    for told, words in (("generation", []), ("generation, int8", ["--quantize", "int8"])):
        yield told, [*main, "--generate", *prompt, "--temperature", "0", *words, *trained]
    yield "evaluation", [*main, "--evaluate", "--tasks", "other.txt", *trained]
    serve = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "out-gpt2", "--rounds", "1"]
    serve += ["--new-tokens", "8" if smoke else "48", "--device", "cpu" if smoke else "cuda"]
    yield "serving, 1 and 8 rows", serve if smoke else [*serve, "--bf16"]
    # The rate of two ranks over twice that of one is the scaling efficiency.
    for n_ranks in (1, 2) if n_cards > 1 or smoke else (1,):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{n_ranks}"]
        launched = [sys.executable, *launcher, *train[1:], "--output-dir", f"out-ranks-{n_ranks}"]
        yield f"torch's launcher, {n_ranks} rank(s)", launched


def run_command(name: str, command: list[str], folder: Path) -> bool:
    """Run it and show its figures; whether it ended well."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT_SECONDS,
            check=False,
        )
        code, lines = str(done.returncode), done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        code, lines = "its time ended", str(error.output or "").splitlines()
    seconds = time.perf_counter() - began
    is_well = code == "0"
    print(f"{name:28} {seconds:6.1f} s  {'ended well' if is_well else code}", flush=True)
    figures = [line for line in lines if _FIGURE.search(line)] if is_well else lines
    for line in figures[-SHOWN if is_well else -8 :]:
        print(f"    {line[:150]}", flush=True)
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", nargs="+", default=[], help="commands with this in their names")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder)
        commands = list_commands(given.smoke, 0 if given.smoke else torch.cuda.device_count())
        ended = [
            run_command(told, words, folder)
            for told, words in commands
            if not given.only or any(part in told for part in given.only)
        ]
    return int(not all(ended))


if __name__ == "__main__":
    sys.exit(main())
