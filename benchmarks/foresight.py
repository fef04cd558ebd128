"""Foresight, measured: predicted against real peak memory and time, for real training runs.

    python benchmarks/foresight.py             (the GPU, else the CPU; under ten minutes)
    python benchmarks/foresight.py --smoke     (tiny shapes on the CPU; about a minute)

Each configuration has a process of its own. It predicts the memory, times what `--check` times,
predicts the time of a run of about `--seconds`, and then makes that run with `--train`'s own code.
Goals on CUDA: allocated within 3 %, reserved within 5 %, time within 10 %. On the CPU what is
allocated is read from the profiler, in three steps after the run, and has to be within 1 %;
resident memory, of which the libraries' part varies, has no goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
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

from config import ModelConfig, RunConfig, build_config  # noqa: E402
from memory import estimate_memory  # noqa: E402
from performance import (  # noqa: E402
    estimate_cost,
    estimate_run_time,
    measure_cost,
    measure_product_flops,
)
from prepare import prepare_data  # noqa: E402
from runtime import Runtime, build_runtime, describe_device  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from train_utils import count_windows  # noqa: E402
from trainer import Trainer, TrainingPlan, build_plan  # noqa: E402
from training_run import run_training  # noqa: E402

GOALS = {"cuda": {"allocated": 0.03, "reserved": 0.05, "time": 0.10},
         "cpu": {"allocated": 0.01, "time": 0.10}}
EAGER: dict[str, Any] = {"compile_model": False}
ON_CUDA: list[dict[str, Any]] = [
    {"model_size": "small", "batch_size": 8},
    {"model_size": "small", "batch_size": 32},
    {"model_size": "small", "batch_size": 8, "mixed_precision": False},
    {"model_size": "small", "batch_size": 16, "gradient_checkpointing": True},
    {"model_size": "small", "batch_size": 4, "gradient_accumulation_steps": 4},
    {"model_size": "small", "batch_size": 8, "optimizer": "sgd"},
    {"model_size": "small", "batch_size": 32, "context_length": 256},
    {"model_size": "small", "batch_size": 8, "dropout": 0.1},
    {"model_size": "nano", "batch_size": 64},
    {"model_size": "tiny", "batch_size": 32},
    {"model_size": "medium", "batch_size": 8},
    {"model_size": "medium", "batch_size": 16, "gradient_checkpointing": True},
    {"model_size": "medium", "batch_size": 4, "gradient_accumulation_steps": 2,
     "mixed_precision": False},
    {"model_size": "small", "batch_size": 8, "compile_model": True},
]
ON_CPU: list[dict[str, Any]] = [
    {"model_size": "nano", "batch_size": 4},
    {"model_size": "nano", "batch_size": 16},
    {"model_size": "nano", "batch_size": 64},
    {"model_size": "nano", "batch_size": 8, "gradient_accumulation_steps": 4},
    {"model_size": "nano", "batch_size": 16, "gradient_checkpointing": True},
    {"model_size": "nano", "batch_size": 16, "optimizer": "sgd"},
    {"model_size": "nano", "batch_size": 16, "dropout": 0.1},
    {"model_size": "nano", "batch_size": 8, "context_length": 512},
    {"model_size": "micro", "batch_size": 2},
    {"model_size": "micro", "batch_size": 8},
    {"model_size": "micro", "batch_size": 4, "gradient_checkpointing": True},
    {"model_size": "micro", "batch_size": 2, "gradient_accumulation_steps": 2},
    {"model_size": "tiny", "batch_size": 1},
]
_TINY = {"model_size": "custom", "n_layers": 2, "n_heads": 2, "n_embeddings": 64,
         "context_length": 64, "batch_size": 4, "mixed_precision": False}
SMOKE: list[dict[str, Any]] = [_TINY | change for change in (
    {}, {"batch_size": 16, "context_length": 128}, {"gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2, "optimizer": "sgd"}, {"n_layers": 4, "dropout": 0.1},
)]


def run_one(flags: dict[str, Any], data_dir: str, seconds: float) -> dict[str, Any]:
    """Predict and make one run in this process; the row of the table."""
    with tempfile.TemporaryDirectory(dir=Path(data_dir).parent) as output:
        values = EAGER | flags | {"data_dir": data_dir, "output_dir": output, "max_steps": 1000}
        config = build_config(values, dict.fromkeys(values, "the benchmark"))
        tokenizer = load_tokenizer(config.model.tokenizer)
        model = config.model.resolve(tokenizer.vocab_size)
        data = prepare_data(config.data, tokenizer, model.context_length)
        runtime = build_runtime(config.system, 1000)
        predicted = estimate_memory(
            model, config.training, dtype=runtime.dtype, device_type=runtime.device.type,
            compile_model=runtime.compile_model,
            gradient_checkpointing=config.system.gradient_checkpointing)
        flops = measure_product_flops(runtime.device, runtime.dtype)
        guess = estimate_cost(
            model, config.training, dtype=runtime.dtype, cpu_flops=flops,
            gradient_checkpointing=config.system.gradient_checkpointing,
            compile_model=runtime.compile_model)
        windows = [count_windows(part.n_tokens, model.context_length)
                   for part in (data.train, data.val)]
        plan = build_plan(config.training, config.control, model.context_length, *windows)
        cost = measure_cost(config, model, plan, runtime, data, tokenizer, guess.step_seconds)
        config = shorten(config, max(4, round(seconds / cost.step_seconds)))
        plan = build_plan(config.training, config.control, model.context_length, *windows)
        expected = estimate_run_time(cost, plan, config.control).total_seconds
        if runtime.compile_model:
            torch._dynamo.reset()
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        code = run_training(config)
        real = time.perf_counter() - began
        row = {"flags": flags, "steps": plan.total_steps, "exit_code": code,
               "step_seconds": cost.step_seconds, "timed_steps": cost.n_timed,
               "time": [expected, real]}
        if runtime.device.type == "cuda":
            row["allocated"] = [predicted.peak_bytes, torch.cuda.max_memory_allocated()]
            row["reserved"] = [predicted.reserved_bytes, torch.cuda.max_memory_reserved()]
        else:
            row["resident"] = [predicted.host_bytes, runtime.peak_memory_bytes()]
            timed = max(predicted.phases["training step"], predicted.phases["optimizer step"])
            row["allocated"] = [timed, measure_allocated(config, model, plan, runtime)]
        return row


def measure_allocated(
    config: RunConfig, model: ModelConfig, plan: TrainingPlan, runtime: Runtime
) -> int:
    """Most bytes allocated on the CPU in three steps, by the profiler's memory events."""
    batch = torch.zeros(config.training.batch_size, model.context_length, dtype=torch.long)
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        trainer = Trainer(model, config.training, runtime, plan, config.peak_learning_rate,
                          gradient_checkpointing=config.system.gradient_checkpointing)
        for step in range(3):
            trainer.train_step(
                step, [(batch, batch)] * config.training.gradient_accumulation_steps)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def shorten(config: RunConfig, steps: int) -> RunConfig:
    """The same run, of so many steps, with an evaluation and a checkpoint at half and end."""
    half = max(1, steps // 2)
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, max_steps=steps, num_epochs=1e6),
        control=dataclasses.replace(config.control, checkpoint_every=half, eval_every=half))


def run_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every configuration in a process of its own, within the time allowed."""
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        on_device = ON_CUDA if torch.cuda.is_available() else ON_CPU
        for number, flags in enumerate(SMOKE if given.smoke else on_device, 1):
            left = given.budget - (time.monotonic() - began)
            if left < 3 * given.seconds:
                rows.append({"flags": flags, "error": "no time left"})
                continue
            one = {"flags": flags, "data_dir": str(Path(folder) / "data"),
                   "seconds": given.seconds}
            if given.smoke:
                one["flags"] = flags | {"device": "cpu"}
            rows.append(start_one(one, left, "1" if given.smoke else None))
            print(f"{number:>2} {describe(flags)}: {time.monotonic() - began:.0f} s so far",
                  file=sys.stderr)
    return rows


def start_one(one: dict[str, Any], timeout: float, threads: str | None) -> dict[str, Any]:
    """The row that a process of its own makes; an error instead of one that fails."""
    # Both compilations, the timed one and the run's, are then made from nothing.
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if threads:  # tiny shapes gain nothing from a second one, and wait for it on a busy machine
        environment["OMP_NUM_THREADS"] = threads
    try:
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(one)], timeout=timeout,
                              capture_output=True, text=True, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"flags": one["flags"], "error": "no time left"}
    if done.returncode or not done.stdout.strip():
        return {"flags": one["flags"], "error": done.stderr.strip()[-400:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe(flags: dict[str, Any]) -> str:
    """A configuration in a few words."""
    short = {"model_size": "", "batch_size": "B", "gradient_accumulation_steps": "x",
             "context_length": "T", "n_layers": "L", "n_embeddings": "C", "dropout": "drop",
             "optimizer": "", "n_heads": None, "device": None}
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            positive = {"mixed_precision": ("mixed", "fp32"), "compile_model": ("compiled", ""),
                        "gradient_checkpointing": ("ckpt", "")}[name]
            words.append(positive[0] if value else positive[1])
        elif short[name] is not None:
            words.append(f"{short[name]}{value}")
    return " ".join(word for word in words if word)


def print_table(rows: list[dict[str, Any]], goals: dict[str, float]) -> bool:
    """Predicted, measured, their difference and the verdict of each row; whether all passed."""
    print(f"{'configuration':34} {'figure':>10} {'predicted':>11} {'measured':>11} {'off':>7} "
          f"{'goal':>6}  verdict")
    passed = True
    for row in rows:
        name = describe(row["flags"])
        if "error" in row:
            print(f"{name:34} {row['error'].splitlines()[-1][:60] if row['error'] else 'failed'}")
            passed = False
            continue
        for figure in ("allocated", "reserved", "resident", "time"):
            if figure not in row:
                continue
            expected, found = row[figure]
            off, goal = expected / found - 1, goals.get(figure)
            verdict = "-" if goal is None else "met" if abs(off) <= goal else "MISSED"
            passed &= verdict != "MISSED"
            unit, scale = ("s", 1.0) if figure == "time" else ("MiB", 2**20)
            print(f"{name:34} {figure:>10} {expected / scale:>9.1f} {unit:3}"
                  f"{found / scale:>8.1f} {unit:3} {off:>+6.1%} "
                  f"{'' if goal is None else f'{goal:.0%}':>6}  {verdict}")
            name = ""
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--seconds", type=float, default=None, help="length of each real run")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--output", default=None, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--dir", default=None, help="folder for data and checkpoints")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        row = run_one(**json.loads(given.one))
        print(json.dumps(row))
        return 0
    given.seconds = given.seconds or (1.0 if given.smoke else 10.0 if torch.cuda.is_available()
                                      else 25.0)
    rows = run_all(given)
    use_cpu = given.smoke or not torch.cuda.is_available()
    device = torch.device("cpu" if use_cpu else "cuda:0")
    passed = print_table(rows, GOALS[device.type])
    result = {"device": describe_device(device), "torch": str(torch.__version__),
              "goals": GOALS[device.type], "all_met": passed, "rows": rows}
    print(json.dumps(result))
    if given.output:
        Path(given.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
