"""A picture of the learning rate over the steps of a plan."""

from __future__ import annotations

import os
from pathlib import Path

from preflight.core.storage import publish_file
from preflight.training.plan import TrainingPlan
from preflight.training.schedules import find_extension_step, learning_rate_at

SCHEDULE_NAME = "schedule.png"
_MAX_POINTS = 2000


def choose_points(plan: TrainingPlan) -> list[int]:
    """Steps that show the schedule's shape: evenly spread, the last one among them."""
    count = min(plan.total_steps, _MAX_POINTS)
    return sorted({round(i * (plan.total_steps - 1) / max(1, count - 1)) for i in range(count)})


def list_marks(plan: TrainingPlan) -> dict[str, int]:
    """The steps that the picture names."""
    decay = find_extension_step(plan)
    marks = {"end of warm-up": plan.warmup_steps, "start of decay": decay, "end": plan.total_steps}
    return {name: step for name, step in marks.items() if step is not None}


def draw_schedule(path: Path, plan: TrainingPlan) -> None:
    """Draw it, with the ends of warm-up and run marked.

    Raises:
        PreflightError: code STORAGE, when it cannot be written.
    """
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the run
    from matplotlib.figure import Figure  # here, since it takes half a second

    steps = choose_points(plan)
    figure = Figure(figsize=(8, 3.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [learning_rate_at(step, plan) for step in steps], color="#5b7f4d")
    for name, step in list_marks(plan).items():
        axes.axvline(step, color="#c8501e", linewidth=0.8, linestyle="--")
        place = (step, 0.02)
        axes.annotate(
            f"{name}: step {step:,}",
            place,
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            ha="right",
            va="bottom",
        )
    axes.set_title(f"{plan.scheduler}, peak {plan.peak_learning_rate:.1e}", loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.25)
    with publish_file(path) as file:
        figure.savefig(file, format="png")
