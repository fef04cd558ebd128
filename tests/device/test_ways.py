"""Which way of computing a step is taken, given figures; and how that is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preflight.device.runtime import build_runtime
from preflight.device.ways import (
    LEAST_GAIN,
    ChosenWay,
    Way,
    WayFigure,
    choose_way,
    describe_figures,
    list_ways,
)
from preflight.settings import SystemSettings

BF16, FP32 = Way(precision="bfloat16"), Way(precision="float32")
COMPILED = Way(precision="bfloat16", compiled=True)
SECONDS = st.floats(1e-3, 1e3)
FIGURES = st.tuples(SECONDS, SECONDS, SECONDS, st.floats(0, 100)).map(
    lambda drawn: [
        WayFigure(way=BF16, step_seconds=drawn[0]),
        WayFigure(way=FP32, step_seconds=drawn[1]),
        WayFigure(way=COMPILED, step_seconds=drawn[2], compile_seconds=drawn[3]),
    ]
)


def total(figure: WayFigure, n_steps: int) -> float:
    return figure.compile_seconds + n_steps * figure.step_seconds


@given(FIGURES, st.integers(1, 10**6))
def test_the_fastest_is_taken_unless_the_gain_is_noise(
    figures: list[WayFigure], n_steps: int
) -> None:
    chosen = total(choose_way(figures, n_steps), n_steps)
    least = min(total(figure, n_steps) for figure in figures)
    first = total(figures[0], n_steps)
    assert chosen in (pytest.approx(least), pytest.approx(first))
    assert chosen * (1 - LEAST_GAIN) <= least * (1 + 1e-9)
    if least >= first * (1 - LEAST_GAIN):
        assert choose_way(figures, n_steps) is figures[0]


@given(FIGURES, st.integers(1, 10**5))
def test_a_longer_run_never_leaves_a_compilation_that_paid(
    figures: list[WayFigure], n_steps: int
) -> None:
    eager_and_compiled = [figures[0], figures[2]]
    if choose_way(eager_and_compiled, n_steps).way.compiled:
        assert choose_way(eager_and_compiled, 2 * n_steps).way.compiled


def test_a_compilation_counts_with_its_seconds() -> None:
    figures = [
        WayFigure(way=BF16, step_seconds=1.0),
        WayFigure(way=COMPILED, step_seconds=0.5, compile_seconds=20.0),
    ]
    assert [choose_way(figures, n).way.compiled for n in (1, 39, 41, 43, 1000)] == [
        *(False, False, False, True, True),
    ]


@pytest.mark.parametrize(
    ("first", "precision", "compilation", "expected"),
    [
        (BF16, True, True, [BF16, FP32, COMPILED]),
        (BF16, False, True, [BF16, COMPILED]),
        (BF16, True, False, [BF16, FP32]),
        (FP32, True, True, [FP32, Way(precision="float32", compiled=True)]),
        (COMPILED, False, False, [COMPILED]),
    ],
)
def test_what_is_tried(first: Way, precision: bool, compilation: bool, expected: list[Way]) -> None:
    found = list_ways(first, precision_is_open=precision, compilation_is_open=compilation)
    assert found == expected


def test_the_figures_are_one_line() -> None:
    figures = [
        WayFigure(way=BF16, step_seconds=1 / 6),
        WayFigure(way=FP32, step_seconds=10 / 23),
        WayFigure(way=COMPILED, step_seconds=10 / 69, compile_seconds=18.2),
    ]
    assert describe_figures(figures, COMPILED, 1000) == (
        "bfloat16, compiled: 6,900 tokens/s after 18 s of compiling; not compiled 6,000; "
        "float32, not compiled 2,300"
    )


def test_flags_override_what_was_chosen() -> None:
    chosen = ChosenWay(Way(precision="float32", compiled=True), "measured", ("tried: x",))
    for mixed in (None, True, False):
        for compiled in (None, True, False):
            system = SystemSettings("cpu", mixed_precision=mixed, compile_model=compiled)
            runtime = build_runtime(system, 10, chosen)
            assert runtime.dtype == (torch.bfloat16 if mixed else torch.float32)
            assert runtime.compile_model == (compiled is not False)
            assert runtime.notes[3:] == ("tried: x",)
            assert ("measured" in runtime.notes[1]) == (mixed is None)
            assert ("measured" in runtime.notes[2]) == (compiled is None)
