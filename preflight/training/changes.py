"""What a resumed run does otherwise than the run before it, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from preflight.device.runtime import Runtime
from preflight.training.plan import TrainingPlan
from preflight.training.schedules import find_extension_step, learning_rate_at


def describe_runtime(runtime: Runtime, *, gradient_checkpointing: bool) -> dict[str, Any]:
    """What a checkpoint remembers of the machine: all that may change the last bits of a loss."""
    return {
        "device": runtime.device.type,
        "precision": str(runtime.dtype).removeprefix("torch."),
        "compile_model": runtime.compile_model,
        "gradient_checkpointing": gradient_checkpointing,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def describe_changes(before: Any, now: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs. `before` is as a checkpoint has it, or missing."""
    if not isinstance(before, dict):
        return []
    return [
        f"changed since the checkpoint: {name} {_show(before[name])} -> {_show(value)}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _show(value: Any) -> str:
    """A value in a message; a stranger may have written it."""
    return value if isinstance(value, str) and value.isprintable() else repr(value)[:60]


def describe_schedule(step: int, before: TrainingPlan, now: TrainingPlan) -> str:
    """What the learning rate does behind `step`, where the schedule is another than before."""
    shapes = [
        (p.total_steps, p.warmup_steps, p.scheduler, p.peak_learning_rate) for p in (before, now)
    ]
    if step == 0 or shapes[0] == shapes[1]:
        return ""
    last, following = learning_rate_at(step - 1, before), learning_rate_at(step, now)
    text = (
        f"changed since the checkpoint: the learning rate was {last:.2e} in step {step:,} and is "
        f"{following:.2e} in the next; {now.scheduler} ends at step {now.total_steps:,}"
    )
    if following <= last:
        return text
    extension_step = find_extension_step(before)
    if extension_step is not None and step > extension_step:
        return (
            f"{text} (without this jump the run is made longer from step {extension_step:,} or "
            "before: --resume-from that checkpoint, with another --output-dir)"
        )
    return f"{text} (to keep it low: --scheduler none --warmup-steps 0 --learning-rate {last:.2e})"
