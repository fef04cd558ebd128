"""Line charts of a page: an SVG of the lines, stretched to its place, and labels as plain text.

Because only the lines are stretched, labels keep their size on a narrow screen and in print.
Colours come from the page's style sheet, which has six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from preflight.core.page_parts import Html, build_tag

N_COLOURS = 6
_MAX_POINTS = 400  # of a line: more than a page has columns for
_SIDE = 1000  # of the SVG, in its own units
_N_TICKS = 5
_DIGITS = 4

Format = Callable[[float], str]
Style = Literal["line", "faint", "dots", "dashed"]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        xs, ys: its points; those that are not finite are left out.
        colour: number of the colour, from 0.
        label: in the legend; an empty one has no entry.
        style: ``dashed`` is for a value that was predicted.
    """

    xs: Sequence[float] | np.ndarray
    ys: Sequence[float] | np.ndarray
    colour: int
    label: str = ""
    style: Style = "line"


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        from_zero: the axis of the values begins at 0.
        is_wide: it takes the whole width of the page.
    """

    title: str
    unit: str
    lines: list[Line]
    format_value: Format
    from_zero: bool = False
    is_wide: bool = False


def draw_chart(chart: Chart, format_x: Format) -> Html:
    """The chart as a figure; empty where no line has a point."""
    lines = [(line, *_reduce(line)) for line in chart.lines]
    lines = [(line, xs, ys) for line, xs, ys in lines if len(xs)]
    if not lines:
        return Html("")
    x_axis = _Axis.build([xs for _, xs, _ in lines], is_tight=True)
    y_axis = _Axis.build([ys for _, _, ys in lines], from_zero=chart.from_zero)
    grid = "".join(f"M0 {_SIDE - y_axis.place(tick)}H{_SIDE}" for tick in y_axis.ticks)
    paths = [build_tag("path", class_="grid", d=grid)]
    for line, xs, ys in lines:
        name = f"s{line.colour % N_COLOURS}" + ("" if line.style == "line" else f" {line.style}")
        paths.append(
            build_tag("path", class_=name, d=_spell_path(line.style, xs, ys, x_axis, y_axis))
        )
    picture = build_tag(
        "svg",
        *paths,
        viewBox=f"0 0 {_SIDE} {_SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{chart.title}, {chart.unit}",
    )
    labels = [
        build_tag("span", chart.format_value(tick), class_="y", style=f"bottom:{share:.1f}%")
        for tick in y_axis.ticks
        for share in [100 * y_axis.place(tick) / _SIDE]
    ] + [
        build_tag("span", format_x(tick), class_="x", style=f"left:{share:.1f}%")
        for tick in x_axis.ticks
        for share in [100 * x_axis.place(tick) / _SIDE]
    ]
    entries = {line.label: line.colour for line, _, _ in lines if line.label}
    legend = [
        build_tag("li", build_tag("span", class_=f"s{colour % N_COLOURS}"), label)
        for label, colour in entries.items()
    ]
    return build_tag(
        "figure",
        build_tag("figcaption", f"{chart.title} ", build_tag("span", chart.unit)),
        build_tag("div", picture, *labels, class_="plot"),
        *([build_tag("ul", *legend, class_="legend")] if legend else []),
        class_="chart wide" if chart.is_wide else "chart",
    )


def _reduce(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """The finite points, beyond `_MAX_POINTS` as means of neighbours; the ends stay."""
    xs, ys = np.asarray(line.xs, float), np.asarray(line.ys, float)
    finite = np.isfinite(xs) & np.isfinite(ys) & (np.abs(ys) < 1e300)
    xs, ys = xs[finite], ys[finite]
    if len(xs) <= _MAX_POINTS:
        return xs, ys
    edges = np.linspace(1, len(xs) - 1, _MAX_POINTS - 1).astype(int)
    counts = np.diff(edges)
    means = [np.add.reduceat(values[:-1], edges[:-1]) / counts for values in (xs, ys)]
    reduced = [np.r_[v[0], mean, v[-1]] for v, mean in zip((xs, ys), means, strict=True)]
    return reduced[0], reduced[1]


def _spell_path(style: Style, xs: np.ndarray, ys: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> str:
    points = [f"{x_axis.place(x)} {_SIDE - y_axis.place(y)}" for x, y in zip(xs, ys, strict=True)]
    if style == "dots":  # a line without length has round ends: a dot that no stretching bends
        return "".join(f"M{point}h0" for point in points)
    return "M" + "L".join(points)


@dataclass(frozen=True)
class _Axis:
    """A range of values and its round numbers."""

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def build(
        cls, values: list[np.ndarray], *, from_zero: bool = False, is_tight: bool = False
    ) -> _Axis:
        """The axis of these values; a tight one ends at the last value, others at a tick."""
        low, high = (float(end(np.concatenate(values))) for end in (np.min, np.max))
        low = min(low, 0.0) if from_zero else low
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            margin = abs(high) / 10 or 1.0
            low, high = low - margin * (not is_tight), high + margin
        step = _choose_step((high - low) / _N_TICKS)
        if not is_tight:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, [float(f"{n * step:.12g}") for n in range(first, last + 1)])

    def place(self, value: Any) -> float:
        """Where a value is, from 0 to `_SIDE`."""
        return round(_SIDE * (float(value) - self.low) / (self.high - self.low), 1)


def _choose_step(least: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def format_count(value: float) -> str:
    """A count in few characters: ``1.5K``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.{_DIGITS}g}{unit}"
    return f"{value:.{_DIGITS}g}"


def format_plain(value: float) -> str:
    """A number in few digits."""
    return f"{value:.{_DIGITS}g}"
