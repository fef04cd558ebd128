"""Int8 weights beside fp32 and bf16: tokens/s of one row, and of several, in turns; and the loss.

    python benchmarks/int8.py                                   (GPT-2 small, random weights)
    python benchmarks/int8.py --checkpoint RUN --text my.txt    (a trained model, and its loss)
    python benchmarks/int8.py --smoke                           (a tiny model; seconds)
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/int8.py --cpu-time --rows 1
                                                                (beside other programs)

All three go through what `--generate` uses; bf16 and int8 as `--quantize int8` loads them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import alternate, print_rows  # noqa: E402

from generate import generate_batch, load_model  # noqa: E402
from preflight.checkpoints.store import open_checkpoint  # noqa: E402
from preflight.device.runtime import Runtime, build_runtime, describe_device  # noqa: E402
from preflight.models.base import TokenModel  # noqa: E402
from preflight.models.building import build_model  # noqa: E402
from preflight.models.quantization import quantize_model  # noqa: E402
from preflight.modes.quantizing import SAMPLE_TOKENS, choose_dtype, measure_loss  # noqa: E402
from preflight.settings import ModelConfig, ModelSettings, SamplingConfig, SystemSettings  # noqa: E402
from preflight.tokenization import Tokenizer, load_tokenizer  # noqa: E402

PROMPT = "In the beginning the machine was quiet, and then"
ROWS = (1, 4, 8)


def build_random(shape: ModelConfig) -> TokenModel:
    """Random weights, spread out so that greedy choices are no ties."""
    torch.manual_seed(0)
    model = build_model(shape).eval().requires_grad_(False)
    with torch.no_grad():
        next(iter(model.norm.parameters())).mul_(4)
    return model


def build_variants(model: TokenModel, runtime: Runtime) -> dict[str, TokenModel]:
    """The model in fp32, in bf16, and with int8 weights."""
    device, wide = runtime.device, choose_dtype(runtime)
    small = copy.deepcopy(model).to(device, wide)
    quantize_model(small, wide)
    return {
        "fp32": copy.deepcopy(model).to(device),
        "bf16": copy.deepcopy(model).to(device, torch.bfloat16),
        "int8": small,
    }


def build_writer(
    model: TokenModel, tokenizer: Tokenizer, n_rows: int, n_tokens: int
) -> Callable[[], Any]:
    """What `--generate` does for so many equal prompts."""
    config = SamplingConfig(max_new_tokens=n_tokens, temperature=0.0)
    return lambda: generate_batch(model, tokenizer, [PROMPT] * n_rows, config)


def alternate_cpu_time(subjects: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least seconds that the process computed for each subject: other programs matter little."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, act in subjects.items():
            began = time.process_time()
            act()
            seconds[name].append(time.process_time() - began)
    return {name: min(found) for name, found in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens")
    parser.add_argument("--checkpoint", help="a trained model in place of random weights")
    parser.add_argument("--text", type=Path, help="text to measure its loss on")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="texts at once")
    parser.add_argument("--cpu-time", action="store_true", help="the process's, least of all turns")
    given = parser.parse_args()
    settings = SystemSettings(device="cpu" if given.smoke else "auto", mixed_precision=False)
    runtime = build_runtime(settings)
    device = runtime.device
    if given.checkpoint:
        cpu = torch.device("cpu")
        model, tokenizer = load_model(open_checkpoint(given.checkpoint), cpu, torch.float32)
    else:
        small = ModelSettings(model_size="small").resolve(50257)
        model = build_random(ModelConfig(50257, 64, 64, 4, 2, 256) if given.smoke else small)
        tokenizer = load_tokenizer("gpt2")
    variants = build_variants(model, runtime)
    n_tokens, repeats = (8, 2) if given.smoke else (given.tokens, 5)
    rows: list[tuple[str, Any, str]] = []
    compare = alternate_cpu_time if given.cpu_time else alternate
    for n_rows in given.rows:
        seconds = compare(
            {
                name: build_writer(variant, tokenizer, n_rows, n_tokens)
                for name, variant in variants.items()
            },
            repeats,
        )
        found = [
            (f"tokens/s, {name}, rows {n_rows}", n_rows * n_tokens / seconds[name], "")
            for name in variants
        ]
        gain = min(seconds["fp32"], seconds["bf16"]) / seconds["int8"]
        goal = ">= 1.5" if n_rows == 1 else ""
        found.append((f"int8 over the faster of both, rows {n_rows}", gain, goal))
        print_rows(found)
        rows += found
    if given.text:
        ids = tokenizer.encode(given.text.read_text(encoding="utf-8")[:100_000])
        sample = torch.from_numpy(ids[: SAMPLE_TOKENS + 1].astype("int64")).to(device)
        losses = {name: measure_loss(variant, sample) for name, variant in variants.items()}
        found = [(f"nats per token, {name}", loss, "") for name, loss in losses.items()]
        found.append(("int8 less fp32", losses["int8"] - losses["fp32"], "<= 0.05"))
        print_rows(found)
        rows += found
    described = {"device": describe_device(device), "torch": str(torch.__version__)}
    print(json.dumps(described | {"threads": torch.get_num_threads(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
