"""What `--evaluate` found, in the page of `--report`: figures with their intervals."""

from __future__ import annotations

from typing import Any

from preflight.core.page_parts import Html, build_table, build_tag
from preflight.modes.run_facts import RunFacts, get_number

_MAX_FILES = 6  # of one run, the newest
_MAX_ROWS = 60  # of a file
_CHARACTERS = 120  # of a name
Row = tuple[str, str, dict[str, Any]]  # task, figure, and the figure's object


def draw_scores(runs: list[RunFacts]) -> list[Html]:
    """A table for each evaluation of a run; of several runs one, with the newest of each."""
    title = build_tag("h2", "Evaluations")
    if not any(run.scores for run in runs):
        text = "None in the folder evaluation/ of the run; --evaluate makes one."
        return [title, build_tag("p", text, class_="soft")]
    note = build_tag("p", "In brackets: the 95 % interval.", class_="note")
    if len(runs) == 1:
        parts = []
        for name, content in reversed(runs[0].scores[-_MAX_FILES:]):
            parts += [build_tag("h3", _cut(_name_model(content, name))), _draw_file(content)]
        return [title, *parts, note]
    columns = [
        {(task, name): figure for task, name, figure in _list_rows(run.scores[-1][1])}
        if run.scores
        else {}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))[:_MAX_ROWS]
    rows = [(*key, *(_spell(column.get(key)) for column in columns)) for key in keys]
    headers = ("task", "figure", *(_cut(run.name) for run in runs))
    return [title, build_tag("div", build_table(headers, rows, names=2), class_="scroll"), note]


def _cut(text: object) -> str:
    return str(text)[:_CHARACTERS]


def _name_model(content: dict[str, Any], name: str) -> str:
    model = content.get("model")
    if isinstance(model, dict):
        model = model.get("path") or model.get("name")
    return f"{name}: {model}" if isinstance(model, str) and model else name


def _draw_file(content: dict[str, Any]) -> Html:
    headers = ("task", "figure", "value (interval)", "items", "0 to 1")
    rows = [
        (task, name, _spell(figure), _spell_count(figure), _draw_interval(figure))
        for task, name, figure in _list_rows(content)[:_MAX_ROWS]
    ]
    return build_table(headers, rows, names=2, class_="cards scores")


def _list_rows(content: dict[str, Any]) -> list[Row]:
    """Whatever in the file is a figure; the rest is left out."""
    rows = []
    for task in content.get("tasks", []):
        figures = task.get("figures") if isinstance(task, dict) else None
        for figure in figures if isinstance(figures, list) else []:
            if isinstance(figure, dict) and get_number(figure, "value") is not None:
                rows.append((_cut(task.get("name", "-")), _cut(figure.get("name", "-")), figure))
    return rows


def _get_interval(figure: dict[str, Any]) -> tuple[float, float] | None:
    low, high = (get_number(figure, end) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _spell(figure: dict[str, Any] | None) -> str:
    value = get_number(figure, "value")
    if figure is None or value is None:
        return "-"
    interval = _get_interval(figure)
    if interval is None:
        return _format(value)
    return f"{_format(value)} ({_format(interval[0])} to {_format(interval[1])})"


def _spell_count(figure: dict[str, Any]) -> str:
    count = get_number(figure, "n_items")
    return "-" if count is None else f"{count:,.0f}"


def _format(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def _draw_interval(figure: dict[str, Any]) -> Html | str:
    """A bar from low to high, for a share of 1; empty for other figures."""
    interval = _get_interval(figure)
    name = str(figure.get("name", ""))
    if interval is None or not name.startswith(("acc", "top", "exact")):
        return ""
    low, high = (min(max(end, 0.0), 1.0) for end in interval)
    style = f"left:{100 * low:.2f}%;width:{max(0.0, 100 * (high - low)):.2f}%"
    return build_tag("span", build_tag("span", style=style), class_="interval")
