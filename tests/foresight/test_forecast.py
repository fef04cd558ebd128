"""The forecast on losses that follow a known law."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from preflight.foresight.forecast import choose_lengths, forecast_loss


def test_a_usual_power_law_is_continued_exactly() -> None:
    """A fall of 0.09 for each doubling is both measured and usual."""
    losses = [4 * math.exp(-0.09 * k) for k in range(8)]
    found = forecast_loss((100, 200, 400), losses[:3], 12_800)
    assert found.loss == pytest.approx(losses[7])
    assert found.low < found.loss < found.high < losses[2]


@pytest.mark.parametrize("fall", [0.05, 0.07, 0.12, 0.16])
def test_other_power_laws_are_inside_the_interval(fall: float) -> None:
    losses = [4 * math.exp(-fall * k) for k in range(7)]
    found = forecast_loss((100, 200, 400), losses[:3], 6_400)
    assert found.low < losses[6] < found.high
    near = forecast_loss((100, 200, 400), losses[:3], 800)
    assert near.loss == pytest.approx(losses[3], rel=0.05)
    assert near.high - near.low < 0.4 * (found.high - found.low)


def test_its_interval_holds_nine_of_ten() -> None:
    """Falls drawn as it believes them to be: the interval is what it says."""
    draw = random.Random(5)
    inside = 0
    for _ in range(400):
        measured = 0.09 * math.exp(draw.gauss(0, 0.5))
        following = math.sqrt(0.09 * measured) * math.exp(draw.gauss(0, 0.4))
        losses = [4 * math.exp(-measured * k) for k in range(3)]
        found = forecast_loss((100, 200, 400), losses, 6400)
        inside += found.low <= losses[2] * math.exp(-following * 4) <= found.high
    assert 0.86 < inside / 400 < 0.94


def test_units_and_steps_do_not_matter() -> None:
    losses = (5.0, 4.5, 4.1)
    found = forecast_loss((100, 200, 400), losses, 6400)
    in_bits = forecast_loss((100, 200, 400), [x / 2 for x in losses], 6400)
    in_tokens = forecast_loss((1000, 2000, 4000), losses, 64_000)
    assert dataclasses.astuple(in_bits) == pytest.approx(dataclasses.astuple(found.scale(0.5)))
    assert dataclasses.astuple(in_tokens) == pytest.approx(dataclasses.astuple(found))
    odd = forecast_loss((100, 200, 400), (6.5, 6.6, 6.7), 6400)  # losses that rise
    assert 0 < odd.low < odd.loss < odd.high < 6.7


def test_lengths_are_shares_of_the_run_and_not_too_short() -> None:
    assert choose_lengths(64_000) == (1000, 2000, 4000)
    assert choose_lengths(3200) == (50, 100, 200)
    assert choose_lengths(1600) == (50, 100, 200)
    assert choose_lengths(800) == (50, 100, 200)
    assert choose_lengths(400) == (25, 50, 100)
    assert choose_lengths(64) == (4, 8, 16)
