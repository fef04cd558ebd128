"""How a training step is computed: precision and compilation, and which of the ways is taken.

Nothing here measures: times come from `preflight.foresight.way_trial` or from an earlier run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from preflight.core.schema import Schema

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the time of the first way, which another must save to be taken: less is noise.
LEAST_GAIN = 0.03


class Way(Schema):
    """A way to compute a step; `precision` is a name of `PRECISIONS`."""

    precision: Literal["float32", "bfloat16", "float16"]
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What the matmuls compute in."""
        return PRECISIONS[self.precision]


class WayFigure(Schema):
    """What was measured of a way: seconds of a step, and of the compilation before the first."""

    way: Way
    step_seconds: Annotated[float, Field(gt=0)]
    compile_seconds: Annotated[float, Field(ge=0)] = 0.0

    def estimate_seconds(self, n_steps: int) -> float:
        """Of so many steps, with the compilation."""
        return n_steps * self.step_seconds + self.compile_seconds


class WayFigures(Schema):
    """The ways that were measured, the one that is taken unmeasured first."""

    figures: Annotated[list[WayFigure], Field(min_length=1)]


@dataclass(frozen=True)
class ChosenWay:
    """A way that a run takes where its flags do not say otherwise.

    Attributes:
        way: precision and compilation.
        why: in words, for the log.
        notes: more lines for the log: the figures, if it was measured.
    """

    way: Way
    why: str
    notes: tuple[str, ...] = ()


def choose_way(figures: Sequence[WayFigure], n_steps: int) -> WayFigure:
    """The figures of the way that takes the least time for `n_steps`.

    The first, which needs no measurement, stays unless another saves a share of `LEAST_GAIN`.
    """
    first = figures[0]
    best = min(figures, key=lambda figure: figure.estimate_seconds(n_steps))
    limit = (1 - LEAST_GAIN) * first.estimate_seconds(n_steps)
    return best if best.estimate_seconds(n_steps) < limit else first


def list_ways(first: Way, *, precision_is_open: bool, compilation_is_open: bool) -> list[Way]:
    """The ways that a run may take: `first`, which needs no measurement, and what flags leave open.

    Those without a compilation come first, since they cost the least to try. A compiled way is
    tried in the precision of `first` alone: each more would be another compilation.
    """
    ways = [first]
    if precision_is_open and first.precision == "bfloat16":
        ways.append(Way(precision="float32", compiled=first.compiled))
    if compilation_is_open and not first.compiled:
        ways.append(Way(precision=first.precision, compiled=True))
    return ways


def describe_figures(figures: Sequence[WayFigure], chosen: Way, tokens_per_step: int) -> str:
    """One line: the chosen way first, then the others, each with its tokens per second."""
    ordered = sorted(figures, key=lambda figure: figure.way != chosen)
    return "; ".join(
        f"{_describe_way(figure.way, chosen, is_first=figure is ordered[0])} "
        f"{tokens_per_step / figure.step_seconds:,.0f}{' tokens/s' if figure is ordered[0] else ''}"
        + (f" after {figure.compile_seconds:.0f} s of compiling" if figure.way.compiled else "")
        for figure in ordered
    )


def _describe_way(way: Way, chosen: Way, *, is_first: bool) -> str:
    """What differs from the chosen one; of this itself, everything."""
    compilation = "compiled" if way.compiled else "not compiled"
    if is_first:
        return f"{way.precision}, {compilation}:"
    words: list[str] = [way.precision] if way.precision != chosen.precision else []
    words += [compilation] if way.compiled != chosen.compiled else []
    return ", ".join(words)
