"""Foresight, measured: predicted against real peak memory and time, for real training runs.

    python benchmarks/foresight.py             (the GPU, else the CPU; under ten minutes)
    python benchmarks/foresight.py --smoke     (a tiny shape on the CPU; half a minute)

Each configuration has two processes of its own. One predicts the memory, times what `--check`
times, and predicts the time of a run of about `--seconds`; the other makes that run with the code
of `--train`. Goals on CUDA: allocated within 3 %, reserved within 5 %, time within 10 %. On the CPU
what is allocated is read from the profiler, in three steps after the run, and has to be within 1 %,
resident memory, of which the libraries' part varies, within 8 %. `estimate` is a step's time as
`--check --no-measure` tells it, beside the measured one: within 30 %. A CPU without bf16 has no
configurations in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preflight.corpus.build import prepare_data  # noqa: E402
from preflight.corpus.windows import count_windows  # noqa: E402
from preflight.device.matmul_rate import measure_matmul_flops  # noqa: E402
from preflight.device.runtime import (  # noqa: E402
    Runtime,
    build_runtime,
    describe_device,
    has_fast_bf16,
)
from preflight.foresight.measured_cost import measure_cost  # noqa: E402
from preflight.foresight.memory import MemoryOptions, estimate_memory  # noqa: E402
from preflight.foresight.run_time import (  # noqa: E402
    estimate_cost,
    estimate_run_time,
)
from preflight.foresight.step_parts import estimate_step  # noqa: E402
from preflight.modes import train as train_mode  # noqa: E402
from preflight.settings import ModelConfig, RunConfig, build_config  # noqa: E402
from preflight.tokenization import load_tokenizer  # noqa: E402
from preflight.training.plan import TrainingPlan, build_plan  # noqa: E402
from trainer import build_trainer  # noqa: E402

GOALS = {
    "cuda": {"allocated": 0.03, "reserved": 0.05, "time": 0.10},
    "cpu": {"allocated": 0.01, "resident": 0.08, "estimate": 0.30, "time": 0.10},
}
EAGER: dict[str, Any] = {"compile_model": False, "tokenizer": "gpt2"}
ON_CUDA: list[dict[str, Any]] = [
    {"model_size": "medium", "batch_size": 8},
    {"model_size": "nano", "batch_size": 64},
    {"model_size": "small", "batch_size": 8},
    {"model_size": "small", "batch_size": 32},
    {"model_size": "small", "batch_size": 8, "mixed_precision": False},
    {"model_size": "small", "batch_size": 16, "gradient_checkpointing": True},
    {"model_size": "small", "batch_size": 4, "gradient_accumulation_steps": 4},
    {"model_size": "small", "batch_size": 8, "optimizer": "sgd"},
    {"model_size": "small", "batch_size": 32, "context_length": 256},
    {"model_size": "small", "batch_size": 8, "dropout": 0.1},
    {"model_size": "tiny", "batch_size": 32},
    {"model_size": "medium", "batch_size": 16, "gradient_checkpointing": True},
    {
        "model_size": "medium",
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "mixed_precision": False,
    },
    {"model_size": "small", "batch_size": 8, "compile_model": True},
]
ON_CPU: list[dict[str, Any]] = [
    {"model_size": "nano", "batch_size": 4},
    {"model_size": "nano", "batch_size": 16},
    {"model_size": "nano", "batch_size": 64, "mixed_precision": True},
    {"model_size": "nano", "batch_size": 16, "compile_model": True},
    {"model_size": "nano", "batch_size": 8, "gradient_accumulation_steps": 4},
    {"model_size": "nano", "batch_size": 16, "gradient_checkpointing": True},
    {"model_size": "nano", "batch_size": 16, "optimizer": "sgd"},
    {"model_size": "nano", "batch_size": 16, "dropout": 0.1},
    {"model_size": "nano", "batch_size": 8, "context_length": 512},
    {"model_size": "micro", "batch_size": 8, "mixed_precision": True},
    {"model_size": "micro", "batch_size": 4, "gradient_checkpointing": True},
    {"model_size": "micro", "batch_size": 2, "gradient_accumulation_steps": 2},
    {"model_size": "tiny", "batch_size": 1},
]
SMOKE: list[dict[str, Any]] = [
    {
        "model_size": "custom",
        "n_layers": 2,
        "n_heads": 2,
        "n_embeddings": 64,
        "context_length": 64,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "mixed_precision": False,
    }
]


def predict_one(flags: dict[str, Any], folder: str, seconds: float) -> dict[str, Any]:
    """What is predicted of a run of about `seconds`, and the flags that make it."""
    values = (
        EAGER
        | flags
        | {"data_dir": f"{folder}/data", "output_dir": f"{folder}/predicted", "max_steps": 1000}
    )
    config = build_config(values, dict.fromkeys(values, "the benchmark"))
    Path(config.control.output_dir).mkdir(exist_ok=True)
    tokenizer = load_tokenizer(config.model.tokenizer)
    model = config.model.resolve(tokenizer.vocab_size)
    data = prepare_data(config.data, tokenizer)
    runtime = build_runtime(config.system, 1000)
    options = MemoryOptions.of(runtime, config.system.gradient_checkpointing)
    memory = estimate_memory(model, config.training, options)
    guess = estimate_cost(
        model,
        config.training,
        dtype=runtime.dtype,
        here=estimate_step(
            model,
            config.training,
            runtime,
            matmul_flops=measure_matmul_flops(runtime.device, runtime.dtype),
            gradient_checkpointing=config.system.gradient_checkpointing,
        ),
        gradient_checkpointing=config.system.gradient_checkpointing,
        compile_model=runtime.compile_model,
    )
    windows = [
        count_windows(part.n_tokens, model.context_length) for part in (data.train, data.val)
    ]
    plan = build_plan(config.resolve_training(), config.control, model.context_length, *windows)
    cost = measure_cost(config, model, plan, runtime, data, tokenizer, guess.step_seconds)
    # An evaluation and a checkpoint at half and end.
    steps = max(4, round(seconds / cost.step_seconds))
    half = max(1, steps // 2)
    values |= {"max_steps": steps, "num_epochs": 1e6, "checkpoint_every": half, "eval_every": half}
    config = build_config(values, dict.fromkeys(values, "the benchmark"))
    plan = build_plan(config.resolve_training(), config.control, model.context_length, *windows)
    on_cuda = runtime.device.type == "cuda"
    timed = max(memory.phases["training step"], memory.phases["optimizer step"])
    return {
        "values": values,
        "steps": steps,
        "step_seconds": cost.step_seconds,
        "guessed_step_seconds": guess.step_seconds,
        "timed_steps": cost.n_timed,
        "time": estimate_run_time(cost, plan, config.control).total_seconds,
    } | (
        {"allocated": memory.peak_bytes, "reserved": memory.reserved_bytes}
        if on_cuda
        else {"allocated": timed, "resident": memory.host_bytes}
    )


def run_one(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """Make the run: its seconds and its peaks."""
    values = values | {"output_dir": f"{folder}/run"}
    config = build_config(values, dict.fromkeys(values, "the benchmark"))
    runtime = build_runtime(config.system, 1000)
    torch.zeros(1, device=runtime.device)  # a process pays once for the context
    began = time.perf_counter()
    assert train_mode.run(config) == 0
    found: dict[str, Any] = {"time": time.perf_counter() - began}
    if runtime.device.type == "cuda":
        return found | {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    resident = runtime.peak_memory_bytes()
    model = config.model.resolve(load_tokenizer(config.model.tokenizer).vocab_size)
    plan = build_plan(config.resolve_training(), config.control, model.context_length, 100, 10)
    return found | {
        "resident": resident,
        "allocated": measure_allocated(config, model, plan, runtime),
    }


def measure_allocated(
    config: RunConfig, model: ModelConfig, plan: TrainingPlan, runtime: Runtime
) -> int:
    """Most bytes allocated on the CPU in three steps, by the profiler's memory events."""
    batch = torch.zeros(config.training.batch_size, model.context_length, dtype=torch.long)
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        trainer = build_trainer(
            model,
            config.training,
            plan,
            runtime,
            gradient_checkpointing=config.system.gradient_checkpointing,
        )
        for step in range(3):
            trainer.train_step(step, [(batch, batch)] * config.training.gradient_accumulation_steps)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def run_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every configuration in turn, within the time allowed."""
    began, rows = time.monotonic(), []
    on_device = ON_CUDA if torch.cuda.is_available() else ON_CPU
    if not torch.cuda.is_available() and not has_fast_bf16(torch.device("cpu")):
        on_device = [flags for flags in ON_CPU if not flags.get("mixed_precision")]
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        for number, flags in enumerate(SMOKE if given.smoke else on_device, 1):
            left = given.budget - (time.monotonic() - began)
            if left < 3 * given.seconds:
                rows.append({"flags": flags, "error": "no time left"})
                continue
            flags = flags | ({"device": "cpu"} if given.smoke else {})
            rows.append(make_row(flags, folder, given.seconds, left, given.smoke))
            if "error" in rows[-1]:
                print(rows[-1]["error"], file=sys.stderr)
            for name in ("predicted", "run"):
                shutil.rmtree(Path(folder) / name, ignore_errors=True)
            print(
                f"{number:>2} {describe(flags)}: {time.monotonic() - began:.0f} s so far",
                file=sys.stderr,
            )
    return rows


def make_row(
    flags: dict[str, Any], folder: str, seconds: float, timeout: float, smoke: bool
) -> dict[str, Any]:
    """Predicted and measured figures of one configuration; an error instead if one fails."""
    # Both compilations, the timed one and the run's, are then made from nothing.
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if smoke:  # tiny shapes gain nothing from a second thread, and wait for it on a busy machine
        environment["OMP_NUM_THREADS"] = "1"
    row: dict[str, Any] = {"flags": flags}
    found: list[dict[str, Any]] = []
    for part in ("predict", "run"):
        order = [flags, folder, seconds] if part == "predict" else [found[0]["values"], folder]
        try:
            done = subprocess.run(
                [sys.executable, __file__, f"--{part}", json.dumps(order)],
                timeout=timeout,
                capture_output=True,
                text=True,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return row | {"error": "no time left"}
        if done.returncode or not done.stdout.strip():
            return row | {"error": done.stderr.strip()[-2000:] or "it said nothing"}
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    predicted, measured = found
    named = ("steps", "step_seconds", "guessed_step_seconds", "timed_steps")
    row |= {name: predicted[name] for name in named}
    row["estimate"] = [predicted["guessed_step_seconds"], predicted["step_seconds"]]
    return row | {name: [predicted[name], value] for name, value in measured.items()}


def describe(flags: dict[str, Any]) -> str:
    """A configuration in a few words."""
    short = {
        "model_size": "",
        "batch_size": "B",
        "gradient_accumulation_steps": "x",
        "context_length": "T",
        "n_layers": "L",
        "n_embeddings": "C",
        "dropout": "drop",
        "optimizer": "",
        "n_heads": None,
        "device": None,
    }
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            positive = {
                "mixed_precision": ("mixed", "fp32"),
                "compile_model": ("compiled", ""),
                "gradient_checkpointing": ("ckpt", ""),
            }[name]
            words.append(positive[0] if value else positive[1])
        elif short[name] is not None:
            words.append(f"{short[name]}{value}")
    return " ".join(word for word in words if word)


def print_table(rows: list[dict[str, Any]], goals: dict[str, float]) -> bool:
    """Predicted, measured, their difference and the verdict of each row; whether all passed."""
    print(
        f"{'configuration':34} {'figure':>10} {'predicted':>11} {'measured':>11} {'off':>7} "
        f"{'goal':>6}  verdict"
    )
    passed = True
    for row in rows:
        name = describe(row["flags"])
        if "error" in row:
            print(f"{name:34} {row['error'].splitlines()[-1][:60] if row['error'] else 'failed'}")
            passed = False
            continue
        for figure in ("allocated", "reserved", "resident", "estimate", "time"):
            if figure not in row:
                continue
            expected, found = row[figure]
            off, goal = expected / found - 1, goals.get(figure)
            verdict = "-" if goal is None else "met" if abs(off) <= goal else "MISSED"
            passed &= verdict != "MISSED"
            unit, scale = ("s", 1.0) if figure in ("estimate", "time") else ("MiB", 2**20)
            print(
                f"{name:34} {figure:>10} {expected / scale:>9.2f} {unit:3}"
                f"{found / scale:>8.2f} {unit:3} {off:>+6.1%} "
                f"{'' if goal is None else f'{goal:.0%}':>6}  {verdict}"
            )
            name = ""
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, on the CPU")
    parser.add_argument("--seconds", type=float, default=None, help="length of each real run")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--output", default=None, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--dir", default=None, help="folder for data and checkpoints")
    for part in ("--predict", "--run"):  # one configuration, in a process of its own
        parser.add_argument(part, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.predict or given.run:
        found = (
            predict_one(*json.loads(given.predict))
            if given.predict
            else run_one(*json.loads(given.run))
        )
        print(json.dumps(found))
        return 0
    given.seconds = given.seconds or (
        1.0 if given.smoke else 8.0 if torch.cuda.is_available() else 30.0
    )
    rows = run_all(given)
    use_cpu = given.smoke or not torch.cuda.is_available()
    device = torch.device("cpu" if use_cpu else "cuda:0")
    passed = print_table(rows, GOALS[device.type])
    result = {
        "device": describe_device(device),
        "torch": str(torch.__version__),
        "goals": GOALS[device.type],
        "all_met": passed,
        "rows": rows,
    }
    print(json.dumps(result))
    if given.output:
        Path(given.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
