"""What the model card of an export says of the run: all from the run's own records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.modes.run_facts import EVALUATION_NAME, get_number
from preflight.modes.run_plan import PLAN_NAME
from preflight.modes.trying import read_report

_MAX_FILES = 20  # of evaluations, the newest


def collect_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts of a checkpoint and of its run, by the keys of `model_card.write_card`."""
    parent = checkpoint.path.absolute().parent
    run = parent.parent if parent.name == MILESTONES_NAME else parent
    plan, config = read_report(run / PLAN_NAME), checkpoint.config
    facts: dict[str, Any] = {
        "name": run.name,
        "step": checkpoint.step,
        "losses": {k: v for k, v in checkpoint.manifest.losses.items() if v is not None},
        "scores": _list_scores(checkpoint, run / EVALUATION_NAME),
    }
    facts |= {key: config[key] for key in ("origin", "data") if isinstance(config.get(key), dict)}
    if isinstance(plan.get("commands"), list):
        facts["commands"] = plan["commands"]
    tokens_per_step = get_number(plan, "plan", "tokens_per_step")
    if tokens_per_step is not None and checkpoint.step:
        facts["training_tokens"] = int(checkpoint.step * tokens_per_step)
    return facts


def _list_scores(checkpoint: Checkpoint, folder: Path) -> list[tuple[str, str, str]]:
    """Task, figure and value with its interval, of what `--evaluate` found of these weights."""
    sha256 = checkpoint.manifest.files[checkpoint.manifest.weights_name].sha256
    rows: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.json"))[-_MAX_FILES:]:
        content = read_report(path)
        if content.get("weights_sha256") != sha256 or not isinstance(content.get("tasks"), list):
            continue
        for task in content["tasks"]:
            figures = task.get("figures") if isinstance(task, dict) else None
            for figure in figures if isinstance(figures, list) else []:
                value, low, high = (get_number(figure, key) for key in ("value", "low", "high"))
                if value is not None:
                    interval = "" if None in (low, high) else f" ({low:.4g} to {high:.4g})"
                    key = str(task.get("name")), str(figure.get("name"))
                    rows[key] = f"{value:.4g}{interval}"
    return [(task, figure, value) for (task, figure), value in rows.items()]
