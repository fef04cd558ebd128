"""What a run was predicted to need and to reach, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from preflight.core.units import format_bytes, format_seconds
from preflight.modes.run_facts import RunFacts, get_number

_WARM_UP_STEPS = 3  # the first ones hold compilation and allocation


@dataclass(frozen=True)
class Outcome:
    """A figure of the run.

    Attributes:
        predicted, measured: ``None``: not known.
        write: the number in words.
        basis: where the prediction is from.
        interval: of the prediction.
        is_main: it belongs at the top of the page.
    """

    name: str
    predicted: float | None
    measured: float | None
    write: Callable[[float], str]
    basis: str = ""
    interval: tuple[float, float] | None = None
    is_main: bool = False

    def format(self, value: float | None) -> str:
        """The value in words; ``-`` where it is not known."""
        return "-" if value is None else self.write(value)

    @property
    def ratio(self) -> float | None:
        """Measured / predicted."""
        if not self.predicted or self.measured is None:
            return None
        return self.measured / self.predicted


def list_outcomes(run: RunFacts) -> list[Outcome]:
    """The figures of which at least one side is known."""
    outcomes = [*_list_lengths(run), *_list_costs(run), *_list_losses(run)]
    return [o for o in outcomes if o.predicted is not None or o.measured is not None]


def _list_lengths(run: RunFacts) -> list[Outcome]:
    steps, tokens = run.steps["step"], run.steps["tokens"]
    planned = get_number(run.plan, "plan", "total_steps")
    per_step = get_number(run.plan, "plan", "tokens_per_step")
    total = planned * per_step if planned and per_step else None
    whole: Callable[[float], str] = lambda value: f"{value:,.0f}"  # noqa: E731
    return [
        Outcome("steps", planned, _last(steps), whole, "the plan", is_main=True),
        Outcome("tokens", total, _last(tokens), whole, "the plan", is_main=True),
    ]


def find_foreign_check(run: RunFacts) -> str:
    """Why the report of `--check` says nothing of this run; empty where it does."""
    if not run.check or not run.plan:
        return ""
    for section, key, *place in (
        ("model", "shape", "model", "shape"),
        ("training_configuration", "tokens_per_step", "plan", "tokens_per_step"),
        ("training_configuration", "total_steps", "plan", "total_steps"),
    ):
        rows, planned = run.check.get(section), run.plan.get(place[0])
        checked = rows.get(key) if isinstance(rows, dict) else None
        wanted = planned.get(place[1]) if isinstance(planned, dict) else None
        if checked != wanted:
            name = key.replace("_", " ")
            return f"{name} {str(checked)[:60]} there, {str(wanted)[:60]} in the run"
    return ""


def _list_costs(run: RunFacts) -> list[Outcome]:
    """Speed, time and memory, beside what `--check` said."""
    report = {} if find_foreign_check(run) else run.check
    memory, speed = report.get("memory_analysis"), report.get("performance_estimation")
    is_measured = get_number(speed, "timed_steps") is not None
    basis = "--check, measured" if is_measured else "--check, estimated"
    rates = np.asarray(run.steps["tokens_per_second"])[_WARM_UP_STEPS:]
    rates = rates[np.isfinite(rates) & (rates > 0)]
    peaks = np.asarray(run.steps["peak_memory_bytes"])
    peaks = peaks[np.isfinite(peaks)]
    return [
        Outcome(
            "tokens per second",
            _get_rate(speed),
            float(np.median(rates)) if len(rates) else None,
            lambda value: f"{value:,.0f}",
            basis,
            is_main=True,
        ),
        Outcome(
            "time of the steps",
            get_number(speed, "training_seconds"),
            _sum_seconds(run),
            format_seconds,
            basis,
            is_main=True,
        ),
        Outcome(
            "peak memory",
            _get_memory(memory),
            float(peaks.max()) if len(peaks) else None,
            format_bytes,
            "--check",
            is_main=True,
        ),
    ]


def _get_rate(rows: Any) -> float | None:
    """What `--check` measured, else what it estimated."""
    for keys in (("measured",), ("predicted",), ()):
        rate = get_number(rows, "tokens_per_second", *keys)
        if rate is not None:
            return rate
    return None


def _get_memory(rows: Any) -> float | None:
    """Of the process on a CPU, allocated on a card: what the log's peak is, too."""
    for name in ("resident_bytes", "allocated_bytes"):
        for keys in ((name, "predicted"), (name,)):
            size = get_number(rows, *keys)
            if size is not None:
                return size
    return None


def _sum_seconds(run: RunFacts) -> float | None:
    """The time of all steps, without evaluations and checkpoints."""
    tokens = np.asarray(run.steps["tokens"])
    if not len(tokens):
        return None
    per_step = np.diff(tokens, prepend=get_number(run.plan, "plan", "tokens_per_step") or tokens[0])
    per_step[0] = per_step[0] or tokens[0]
    rates = np.asarray(run.steps["tokens_per_second"])
    known = np.isfinite(per_step) & np.isfinite(rates) & (rates > 0) & (per_step > 0)
    return float(np.sum(per_step[known] / rates[known])) if known.any() else None


def _list_losses(run: RunFacts) -> list[Outcome]:
    """The last evaluation, beside the forecast; and the best one."""
    last = {name: _last(column) for name, column in run.evaluations.items()}
    is_of_run = get_number(run.forecast, "total_steps") == get_number(
        run.plan, "plan", "total_steps"
    )
    forecast = run.forecast if is_of_run else {}
    outcomes = [
        Outcome(
            name,
            get_number(forecast, key, "loss"),
            last[key],
            lambda value: f"{value:.4f}",
            "--forecast" if get_number(forecast, key, "loss") is not None else "",
            _get_interval(forecast, key),
            is_main=key == "bits_per_byte",
        )
        for name, key in (("validation loss", "val_loss"), ("bits per byte", "bits_per_byte"))
    ]
    losses = np.asarray(run.evaluations["val_loss"])
    best = float(np.nanmin(losses)) if np.isfinite(losses).any() else None
    return [
        *outcomes,
        Outcome("best validation loss", None, best, lambda value: f"{value:.4f}"),
        Outcome("perplexity", None, last["perplexity"], lambda value: f"{value:,.1f}"),
    ]


def _get_interval(forecast: dict[str, Any], key: str) -> tuple[float, float] | None:
    low, high = (get_number(forecast, key, end) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _last(column: Any) -> float | None:
    values = np.asarray(column)
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None
