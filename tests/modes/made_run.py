"""The folder of a run that was never trained, for tests of what reads such a folder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 1024
SAMPLE = "Return the <script>document.title = 'taken over'</script> <img src=x onerror=alert(1)>"


def build_rows(n_steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`: a loss that falls, evaluations and samples."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, n_steps + 1):
        loss = 3 + 5 * math.exp(-step / 90) + rng.gauss(0, 0.05)
        rows.append(
            {
                "event": "step",
                "step": step,
                "loss": loss,
                "bits_per_byte": loss / 3,
                "learning_rate": 1e-2 * min(1, step / 20) * (1 - step / (n_steps + 1)),
                "grad_norm": abs(rng.gauss(1, 0.2)),
                "tokens": step * TOKENS_PER_STEP,
                "tokens_per_second": 20_000 + rng.gauss(0, 500),
                "peak_memory_bytes": 4 * 10**8 + step * 1000,
            }
        )
        if step % max(1, n_steps // 5) == 0:
            val = {"event": "eval", "step": step, "val_loss": loss + 0.1}
            rows.append(
                val | {"perplexity": math.exp(loss + 0.1), "bits_per_byte": (loss + 0.1) / 3}
            )
            rows.append({"event": "sample", "step": step, "text": f"{SAMPLE} {step}"})
    return rows


def make_run(folder: Path, n_steps: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """Write a run's folder with every kind of file but checkpoints; its rows."""
    rows = build_rows(n_steps, seed)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"total_steps": n_steps, "tokens_per_step": TOKENS_PER_STEP}
    speed = {
        "timed_steps": 8,
        "tokens_per_second": {"predicted": 30_000, "measured": 16_000, "ratio": 0.53},
        "training_seconds": n_steps * TOKENS_PER_STEP / 16_000,
    }
    figures = [
        {"name": "acc", "value": 0.35, "low": 0.12, "high": 0.58, "n_items": 20},
        {"name": "perplexity", "value": 21.5, "low": 20.25, "high": 22.75, "n_items": 9},
        {"name": "no number", "value": "many"},
    ]
    files = {
        "run_plan.json": {
            "format": "preflight-run-plan",
            "commands": ["python main.py --train --text-file '<b>my</b>.txt'"],
            "choices": ["--max-steps 300 (from the command line)"],
            "model": {"shape": "2 layers", "parameters": 1_312_000},
            "tokenizer": "gpt2",
            "data": {"folder": "nowhere", "fingerprint": "ab" * 32},
            "plan": plan,
            "versions": {"torch": "2.13.0"},
        },
        "check_report.json": {
            "format": "preflight-check",
            "model": {"shape": "2 layers"},
            "training_configuration": plan,
            "memory_analysis": {"resident_bytes": {"predicted": 5 * 10**8, "measured": 1}},
            "performance_estimation": speed,
        },
        "forecast.json": {
            "format": "preflight-forecast",
            "total_steps": n_steps,
            "bits_per_byte": {"loss": 1.25, "low": 1.0, "high": 1.5},
        },
        "evaluation/quick-1.json": {
            "model": {"path": "run/milestones/checkpoint-300"},
            "tasks": [{"name": "our choices", "figures": figures}, "odd", {"figures": 3}],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return rows
