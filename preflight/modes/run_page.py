"""The page of `--report`: a run, or several side by side, from what `run_facts` read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from preflight.core.page_parts import (
    Html,
    build_figures,
    build_page,
    build_table,
    build_tag,
    format_large,
    format_share,
)
from preflight.core.units import format_bytes
from preflight.modes.charts import (
    Chart,
    Line,
    draw_chart,
    format_count,
    format_plain,
)
from preflight.modes.run_facts import RunFacts, get_number
from preflight.modes.run_outcome import Outcome, find_foreign_check, list_outcomes
from preflight.modes.run_scores import draw_scores
from preflight.training.smoothing import MovingAverage

MARK = "preflight-run-report"
MAX_PAGE_BYTES = 10**6
_NAME_CHARACTERS = 300  # of a name, a path or a sentence
_COMMAND_CHARACTERS = 2000
_MAX_NOTES = 30
_MAX_CHECKPOINTS = 20
_RUN_SHARE_SMOOTHED = 50  # a fiftieth of the run, as in the picture of the curve


@dataclass(frozen=True)
class Limits:
    """How much of the samples is shown: less, where the page would be too large."""

    n_samples: int
    n_characters: int


_LIMITS = (Limits(12, 1500), Limits(8, 500), Limits(4, 200), Limits(2, 40))


def render_page(runs: list[RunFacts]) -> str:
    """The page of these runs, of at most `MAX_PAGE_BYTES`."""
    page = ""
    for limits in _LIMITS:
        page = _render(runs, limits)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _render(runs: list[RunFacts], limits: Limits) -> str:
    title = f"Run {cut(runs[0].name)}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = [
        *_draw_head(runs, title),
        *_draw_notes(runs),
        *_draw_outcomes(runs),
        *_draw_charts(runs),
        *draw_scores(runs),
        *_draw_samples(runs, limits),
        *_draw_data(runs),
        *_draw_repeat(runs),
        *_draw_checkpoints(runs),
    ]
    return build_page(MARK, title, parts)


def cut(text: object, n_characters: int = _NAME_CHARACTERS) -> str:
    """A text of the run, of bounded length."""
    shown = str(text)
    return shown if len(shown) <= n_characters else shown[: n_characters - 3] + "..."


def _draw_head(runs: list[RunFacts], title: str) -> list[Html]:
    parts = [build_tag("h1", title)]
    for run in runs:
        model = run.plan.get("model")
        shape = model.get("shape") if isinstance(model, dict) else None
        parameters = get_number(run.plan, "model", "parameters")
        words = [] if len(runs) == 1 else [cut(run.name)]
        words += [cut(shape)] if shape else []
        words += [f"{format_large(int(parameters))} parameters"] if parameters else []
        words += [f"tokenizer {cut(run.plan['tokenizer'])}"] if run.plan.get("tokenizer") else []
        if words:
            parts.append(build_tag("p", ", ".join(words), class_="lead"))
    if len(runs) == 1:
        figures = {o.name: o.format(o.measured) for o in list_outcomes(runs[0]) if o.is_main}
        parts.append(build_figures({name: text for name, text in figures.items() if text != "-"}))
    return parts


def _draw_notes(runs: list[RunFacts]) -> list[Html]:
    """What is damaged, missing or remarkable."""
    notes = []
    for run in runs:
        found = [f"{error.lines[0]}." for error in run.damaged] + run.missing
        if run.n_skipped:
            found.append(f"{run.n_skipped:,} updates were not finite and were skipped.")
        if run.resumed_at:
            steps = ", ".join(f"{step:,}" for step in run.resumed_at[:10])
            rest = "" if len(run.resumed_at) <= 10 else f" and {len(run.resumed_at) - 10} more"
            found.append(f"Resumed at step {steps}{rest}.")
        other = find_foreign_check(run)
        if other:
            found.append(f"The report of --check is of another run, and not shown: {other}.")
        name = "" if len(runs) == 1 else f"{cut(run.name)}: "
        notes += [name + cut(text) for text in found]
    shown, more = notes[:_MAX_NOTES], len(notes) - _MAX_NOTES
    shown += [f"{more:,} more notes are left out."] if more > 0 else []
    return [build_tag("ul", *(build_tag("li", note) for note in shown), class_="warnings")] * bool(
        shown
    )


# ---- plan and outcome ---------------------------------------------------------------------------


def _draw_outcomes(runs: list[RunFacts]) -> list[Html]:
    title = build_tag("h2", "What was planned, and what came")
    if len(runs) == 1:
        found = [_build_outcome_row(outcome) for outcome in list_outcomes(runs[0])]
        told = ("figure", "predicted", "measured", "measured / predicted", "prediction from")
        return [title, build_table(told, found, class_="cards")] if found else []
    columns = [{o.name: o for o in list_outcomes(run)} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(_spell_outcome(column.get(name)) for column in columns)) for name in names]
    headers = ("figure", *(cut(run.name) for run in runs))
    note = "In brackets: measured / predicted, where there is a prediction."
    table = build_tag("div", build_table(headers, rows), class_="scroll")
    return [title, table, build_tag("p", note, class_="note")] if rows else []


def _build_outcome_row(outcome: Outcome) -> tuple[str, ...]:
    predicted = outcome.format(outcome.predicted)
    if outcome.interval:
        predicted += " ({} to {})".format(*map(outcome.format, outcome.interval))
    ratio = "-" if outcome.ratio is None else f"{outcome.ratio:.3f}"
    return outcome.name, predicted, outcome.format(outcome.measured), ratio, outcome.basis


def _spell_outcome(outcome: Outcome | None) -> str:
    if outcome is None or outcome.measured is None:
        return "-"
    ratio = "" if outcome.ratio is None else f" ({outcome.ratio:.3f})"
    return outcome.format(outcome.measured) + ratio


# ---- curves -------------------------------------------------------------------------------------

Format = Callable[[float], str]


def _draw_charts(runs: list[RunFacts]) -> list[Html]:
    """Loss, learning rate, speed, memory and gradient norm over the steps."""
    charts = _build_loss_charts(runs) + _build_step_charts(runs)
    figures = [part for chart in charts if (part := draw_chart(chart, format_count))]
    if not figures:
        return []
    return [build_tag("h2", "Curves"), build_tag("div", *figures, class_="charts")]


def _build_loss_charts(runs: list[RunFacts]) -> list[Chart]:
    lines = _draw_losses(runs, "loss", "val_loss")
    charts = [Chart("Loss", "nats per token, over steps", lines, format_plain, is_wide=True)]
    if len(runs) > 1:  # it does not depend on the tokenizer
        bits = _draw_losses(runs, "bits_per_byte", "bits_per_byte")
        charts.insert(0, Chart("Bits per byte", "over steps", bits, format_plain, is_wide=True))
    rate = _build_chart(runs, "Learning rate", "over steps", "learning_rate", format_plain)
    return [*charts, rate]


def _draw_losses(runs: list[RunFacts], training: str, validation: str) -> list[Line]:
    """Training loss, smoothed over the unsmoothed one, and the evaluations."""
    lines, alone = [], len(runs) == 1
    for number, run in enumerate(runs):
        steps, losses = run.steps["step"], run.steps[training]
        if alone:
            lines.append(Line(steps, losses, number, style="faint"))
        name = "training, smoothed" if alone else cut(run.name)
        lines.append(Line(steps, _smooth(losses), number, name))
        colour = 1 if alone else number
        name = "validation" if alone else ""
        found = run.evaluations["step"], run.evaluations[validation]
        lines += [Line(*found, colour, name, "dots")]
        lines += [Line(*found, colour)] if alone else []
    return lines


def _smooth(values: Any) -> list[float]:
    average = MovingAverage(1 - 1 / max(2, len(values) / _RUN_SHARE_SMOOTHED))
    return [average.add(value) if math.isfinite(value) else math.nan for value in values]


def _build_step_charts(runs: list[RunFacts]) -> list[Chart]:
    largest = max((max(run.steps["peak_memory_bytes"], default=0.0) for run in runs), default=0.0)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    speed = _build_chart(runs, "Speed", "tokens per second", "tokens_per_second", format_count)
    memory = _build_chart(runs, "Peak memory", unit, "peak_memory_bytes", format_plain, size)
    norm = _build_chart(runs, "Gradient norm", "before clipping", "grad_norm", format_plain)
    if len(runs) == 1:
        outcomes = {outcome.name: outcome for outcome in list_outcomes(runs[0])}
        _add_prediction(speed, runs[0], outcomes.get("tokens per second"))
        _add_prediction(memory, runs[0], outcomes.get("peak memory"), size)
    return [speed, memory, norm]


def _build_chart(
    runs: list[RunFacts],
    title: str,
    unit: str,
    name: str,
    format_value: Format,
    unit_size: float = 1.0,
) -> Chart:
    alone = len(runs) == 1
    lines = [
        Line(
            run.steps["step"],
            np.asarray(run.steps[name]) / unit_size,
            number,
            "" if alone else cut(run.name),
        )
        for number, run in enumerate(runs)
    ]
    return Chart(title, unit, lines, format_value, from_zero=name != "grad_norm")


def _add_prediction(
    chart: Chart, run: RunFacts, outcome: Outcome | None, unit_size: float = 1.0
) -> None:
    steps = run.steps["step"]
    if outcome is not None and outcome.predicted is not None and len(steps):
        ends, level = [min(steps), max(steps)], outcome.predicted / unit_size
        chart.lines[0] = Line(steps, chart.lines[0].ys, 0, "measured")
        chart.lines.append(Line(ends, [level] * 2, 1, "predicted", "dashed"))


# ---- samples, data, how to repeat it ------------------------------------------------------------


def _draw_samples(runs: list[RunFacts], limits: Limits) -> list[Html]:
    parts = []
    for run in runs:
        if len(runs) > 1 and run.samples:
            parts.append(build_tag("h3", cut(run.name)))
        for number in _spread(len(run.samples), limits.n_samples):
            step, text = run.samples[number]
            text = cut(text, limits.n_characters)
            caption = build_tag("figcaption", f"step {step:,}")
            shown = build_tag("div", text, class_="text", dir="auto")
            parts.append(build_tag("figure", caption, shown, class_="example"))
    return [build_tag("h2", "Samples over time"), *parts] if parts else []


def _spread(n_items: int, n_shown: int) -> list[int]:
    """Indices of at most `n_shown` items, evenly spaced, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, n_items - 1, min(n_items, n_shown))})


def _draw_data(runs: list[RunFacts]) -> list[Html]:
    """The main figures of each data folder, once for the runs that share it."""
    parts = []
    with_data = [run for run in runs if run.data]
    for _, group in groupby(with_data, key=lambda run: str(run.data)):
        same = list(group)
        figures = _list_data_figures(same[0].data or {})
        if len(runs) > 1 and figures:
            parts.append(build_tag("h3", cut(", ".join(run.name for run in same))))
        parts += [build_figures(figures)] * bool(figures)
    note = build_tag("p", "The whole report: data_report.html in the data folder.", class_="note")
    return [build_tag("h2", "Data"), *parts, note] if parts else []


def _list_data_figures(data: dict[str, Any]) -> dict[str, str]:
    totals, sources = data.get("totals"), data.get("sources")
    formats: tuple[tuple[str, tuple[str, ...], Format], ...] = (
        ("documents", ("n_kept",), _format_whole),
        ("tokens", ("n_kept_tokens",), _format_whole),
        ("to train on", ("n_tokens", "train"), _format_whole),
        ("to validate", ("n_tokens", "val"), _format_whole),
        ("text", ("n_kept_bytes",), format_bytes),
        ("bytes per token", ("bytes_per_token",), lambda value: f"{value:.2f}"),
        ("dropped", ("dropped_share",), format_share),
    )
    figures = {
        name: write(number)
        for name, keys, write in formats
        if (number := get_number(totals, *keys)) is not None
    }
    if isinstance(sources, list) and sources:
        names = [str(s.get("name")) for s in sources if isinstance(s, dict)]
        figures["source" + "s" * (len(names) > 1)] = cut(", ".join(names), 80)
    return figures


def _format_whole(value: float) -> str:
    return format_large(int(value))


def _draw_repeat(runs: list[RunFacts]) -> list[Html]:
    parts = []
    for run in runs:
        commands = run.plan.get("commands")
        found = [str(c) for c in commands] if isinstance(commands, list) else []
        if not found:
            continue
        parts += [build_tag("h3", cut(run.name))] if len(runs) > 1 else []
        parts.append(build_tag("pre", "\n".join(cut(c, _COMMAND_CHARACTERS) for c in found[:20])))
        versions, choices = run.plan.get("versions"), run.plan.get("choices")
        rows = [("data fingerprint", cut(_get_fingerprint(run)))]
        rows += list(versions.items()) if isinstance(versions, dict) else []
        if isinstance(choices, list):
            rows.append(("set", cut("; ".join(map(str, choices)), _COMMAND_CHARACTERS)))
        table = build_table(
            ("what", "value"), [(cut(key), cut(value, 2000)) for key, value in rows], names=2
        )
        parts.append(table)
    return [build_tag("h2", "How to repeat it"), *parts] if parts else []


def _get_fingerprint(run: RunFacts) -> object:
    data = run.plan.get("data")
    return data.get("fingerprint", "unknown") if isinstance(data, dict) else "unknown"


def _draw_checkpoints(runs: list[RunFacts]) -> list[Html]:
    """Step, validation loss and the SHA-256 of the weights, by the manifest, of each."""
    rows = [
        (
            *((cut(run.name),) if len(runs) > 1 else ()),
            checkpoint.path.name,
            "-" if checkpoint.val_loss is None else f"{checkpoint.val_loss:.4f}",
            build_tag(
                "span",
                checkpoint.manifest.files[checkpoint.manifest.weights_name].sha256,
                class_="mono",
            ),
        )
        for run in runs
        for checkpoint in run.checkpoints[:_MAX_CHECKPOINTS]
    ]
    headers = ["checkpoint", "validation loss", "SHA-256 of the weights in the manifest"]
    headers = ["run", *headers] if len(runs) > 1 else headers
    table = build_table(headers, rows, names=len(headers) - 2, class_="cards hashes")
    return [build_tag("h2", "Checkpoints"), table] if rows else []
