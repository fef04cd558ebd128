"""``run_plan.json``: what a run set out to do, saved at its start for whoever reads it later."""

from __future__ import annotations

import dataclasses
import math
import platform
from pathlib import Path
from typing import Any

import torch

from preflight import __version__
from preflight.core.storage import write_json
from preflight.models.cost import count_parameters
from preflight.modes.launch import is_prepared
from preflight.modes.setup import RunSetup
from preflight.modes.trying import format_train_command, read_report
from preflight.settings import describe_choices

PLAN_NAME = "run_plan.json"
FORMAT, VERSION = "preflight-run-plan", 1
_MAX_COMMANDS = 20  # of a run that was resumed: the first and the newest


def save_plan(setup: RunSetup) -> Path:
    """Write the plan of a run that starts or resumes; all of it is known by then.

    Raises:
        PreflightError: code STORAGE.
    """
    path = setup.output_dir / PLAN_NAME
    launched = ("--ranks", str(setup.ranks.world)) if is_prepared() else ()
    commands = [format_train_command(setup.given, *launched)]
    if setup.state.step:
        commands = _join_commands(read_report(path).get("commands"), commands[0])
    write_json(path, {"format": FORMAT, "version": VERSION} | _describe(setup, commands))
    return path


def _join_commands(before: Any, command: str) -> list[str]:
    """The commands of the run so far, with this one, each once."""
    known = [text for text in before if isinstance(text, str)] if isinstance(before, list) else []
    commands = list(dict.fromkeys([*known, command]))
    return commands[:1] + commands[1:][-(_MAX_COMMANDS - 1) :]


def _describe(setup: RunSetup, commands: list[str]) -> dict[str, Any]:
    model, data = setup.model_config, setup.data
    plan = dataclasses.asdict(setup.plan).items()
    return {
        "commands": commands,
        "choices": describe_choices(setup.adopted),
        "model": {
            "shape": model.label,
            "parameters": count_parameters(model),
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
        },
        "tokenizer": setup.tokenizer.name,
        "optimizer": setup.config.training.optimizer,
        "data": {
            "folder": setup.given.data.data_dir,
            "fingerprint": data.fingerprint,
            "train_tokens": data.train.n_tokens,
            "val_tokens": data.val.n_tokens,
        },
        "plan": {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in plan
        },
        "ranks": {"world": setup.ranks.world, "hosts": setup.ranks.hosts},
        "machine": setup.describe_machine(),
        "versions": {
            "preflight": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
    }
