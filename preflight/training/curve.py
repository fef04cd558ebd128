"""The loss curve: training and validation loss over the tokens trained on, in nats and in bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preflight.core.storage import publish_file
from preflight.training.smoothing import MovingAverage
from preflight.training.trackers import Row

CURVE_NAME = "loss_curve.png"
CURVE_EVERY_SECONDS = 60  # how often a run redraws it
MAX_POINTS = 8192  # more than a picture has columns


class _Series:
    """Points of a curve: all of them, or from `MAX_POINTS` on, means of neighbours.

    The more values there are, the more of them one point stands for.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, ...]] = []
        self._per_point, self._waiting = 1, 0
        self._sums: tuple[float, ...] = ()

    def add(self, *values: float) -> None:
        """One more value of each coordinate."""
        self._sums = tuple(map(sum, zip(self._sums, values, strict=True))) if self._sums else values
        self._waiting += 1
        if self._waiting == self._per_point:
            self._points.append(self._mean())
            self._sums, self._waiting = (), 0
        if len(self._points) == MAX_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [
                tuple((a + b) / 2 for a, b in zip(*pair, strict=True)) for pair in pairs
            ]
            self._per_point *= 2

    def _mean(self) -> tuple[float, ...]:
        return tuple(value / self._waiting for value in self._sums)

    def columns(self) -> list[list[float]]:
        """The points, one list for each coordinate."""
        last = [self._mean()] if self._waiting else []
        return [list(column) for column in zip(*self._points, *last, strict=True)]


class LossCurve:
    """The figures of a run's rows, in bounded memory, and the picture of them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """`rows`: those that are there already."""
        self._steps, self._evaluations = _Series(), _Series()
        self._best: tuple[float, float] | None = None
        self._bits_per_nat: float | None = None  # bits per byte for each nat per token
        for row in rows:
            self.log(row)

    def resume(self, step: int) -> None:
        """Part of `Tracker`: the rows that are left were given at the start."""

    def log(self, row: Row) -> None:
        """Take in one row; one that lacks a figure is left out."""
        names = {"step": ("tokens", "loss", "learning_rate"), "eval": ("tokens", "val_loss")}
        figures: list[Any] = [row.get(name) for name in names.get(row["event"], ())]
        if not figures or not all(map(_is_figure, figures)):
            return
        if row["event"] == "step":
            self._steps.add(*figures)
            return
        tokens, loss = figures
        bits = row.get("bits_per_byte")
        if _is_figure(bits) and bits and loss:
            self._bits_per_nat = bits / loss
        self._evaluations.add(tokens, loss)
        if self._best is None or loss < self._best[1]:
            self._best = tokens, loss

    def save(self, path: Path, title: str) -> None:
        """Draw training and validation loss over the tokens, with the learning rate below.

        Raises:
            PreflightError: code STORAGE, when it cannot be written.
        """
        columns = self._steps.columns()
        if columns:
            evaluations = self._evaluations.columns()
            _draw(path, title, columns, evaluations, self._best, self._bits_per_nat)


def _is_figure(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e300  # neither infinite nor NaN
    )


def _draw(
    path: Path,
    title: str,
    steps: list[list[float]],
    evaluations: list[list[float]],
    best: tuple[float, float] | None,
    bits_per_nat: float | None,
) -> None:
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the run
    # Imported here: matplotlib takes half a second, which the first step need not wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    tokens, losses, learning_rates = steps
    top.plot(tokens, losses, color="#9db4d3", linewidth=0.7, label="training, each step")
    top.plot(tokens, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if best is not None:
        places, values = evaluations
        top.plot(places, values, "o-", color="#c8501e", markersize=4, label="validation")
        top.annotate(
            f"best {best[1]:.3f}\nperplexity {math.exp(min(best[1], 50)):,.1f}"
            + ("" if bits_per_nat is None else f"\n{best[1] * bits_per_nat:.3f} bits per byte"),
            best,
            xytext=(0, 28),
            textcoords="offset points",
            ha="right" if best[0] > max(places) / 2 else "left",
            color="#c8501e",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "lw": 0.7},
        )
    top.set_ylabel("loss (nats per token)")
    if bits_per_nat is not None:
        scale = (lambda nats: nats * bits_per_nat, lambda bits: bits / bits_per_nat)
        top.secondary_yaxis("right", functions=scale).set_ylabel("bits per byte")
    top.set_title(title, loc="left", fontsize=11)
    top.legend(frameon=False)
    top.grid(alpha=0.25)
    top.tick_params(labelbottom=False)
    bottom.plot(tokens, learning_rates, color="#5b7f4d")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens")
    bottom.grid(alpha=0.25)
    bottom.xaxis.set_major_formatter(lambda value, _: _format_count(value))
    with publish_file(path) as file:
        figure.savefig(file, format="png")


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over a fiftieth of the run, with bias correction."""
    average = MovingAverage(1 - 1 / max(2, len(values) / 50))
    return [average.add(value) for value in values]


def _format_count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
