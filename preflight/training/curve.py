"""The loss curve: training and validation loss over the tokens trained on."""

from __future__ import annotations

import math
import os
from pathlib import Path

from preflight.core.storage import publish_file
from preflight.training.metrics import Row

CURVE_NAME = "loss_curve.png"
CURVE_EVERY_SECONDS = 60  # how often a run redraws it


def save_loss_curve(path: Path, rows: list[Row], title: str) -> None:
    """Draw training and validation loss over the tokens trained on, with the learning rate below.

    Raises:
        PreflightError: code STORAGE, when it cannot be written.
    """
    steps = [row for row in rows if row.get("event") == "step" and row.get("loss") is not None]
    evals = [row for row in rows if row.get("event") == "eval" and row.get("val_loss") is not None]
    if not steps:
        return
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the run
    # Imported here: matplotlib takes half a second, which the first step need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    tokens = [row["tokens"] for row in steps]
    losses = [row["loss"] for row in steps]
    top.plot(tokens, losses, color="#9db4d3", linewidth=0.7, label="training, each step")
    top.plot(tokens, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if evals:
        places, values = [r["tokens"] for r in evals], [r["val_loss"] for r in evals]
        top.plot(places, values, "o-", color="#c8501e", markersize=4, label="validation")
        lowest = min(range(len(values)), key=values.__getitem__)
        top.annotate(
            f"best {values[lowest]:.3f}\nperplexity {math.exp(min(values[lowest], 50)):,.1f}",
            (places[lowest], values[lowest]),
            xytext=(0, 28),
            textcoords="offset points",
            ha="right" if places[lowest] > max(places) / 2 else "left",
            color="#c8501e",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "lw": 0.7},
        )
    top.set_ylabel("loss (nats per token)")
    top.set_title(title, loc="left", fontsize=11)
    top.legend(frameon=False)
    top.grid(alpha=0.25)
    top.tick_params(labelbottom=False)
    bottom.plot(tokens, [row["learning_rate"] for row in steps], color="#5b7f4d")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens")
    bottom.grid(alpha=0.25)
    bottom.xaxis.set_major_formatter(lambda value, _: _format_count(value))
    with publish_file(path) as file:
        figure.savefig(file, format="png")


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over a fiftieth of the run, with bias correction."""
    keep = 1 - 1 / max(2, len(values) / 50)
    total = weight = 0.0
    result = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        result.append(total / weight)
    return result


def _format_count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
