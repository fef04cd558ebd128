"""The learning-rate range test on functions whose answers are known in closed form."""

from __future__ import annotations

import math

import pytest

from preflight.foresight.learning_rate import analyse_range, has_diverged, smooth


def list_rates(n: int, low: float = 1e-4, high: float = 10.0) -> list[float]:
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]


def test_one_step_on_a_quadratic() -> None:
    """f(x) = k/2 x^2 after one step: k/2 (1 - u)^2 with u = k * rate.

    Its minimum is at u = 1, and its slope over log u, -k u (1 - u), is steepest at u = 1/2.
    """
    for k in (0.5, 4.0, 30.0):
        rates = list_rates(2000, 1e-3 / k, 3 / k)
        found = analyse_range([(rate, k / 2 * (1 - k * rate) ** 2) for rate in rates], 0.9)
        assert found.minimum == pytest.approx(1 / k, rel=0.02)
        assert found.steepest == pytest.approx(0.5 / k, rel=0.05)
        assert found.tenth == pytest.approx(0.1 / k, rel=0.02)
        assert found.suggested == found.steepest
        assert not found.fault


def test_gradient_descent_diverges_beyond_two_over_k() -> None:
    k, x = 5.0, 1.0
    points: list[tuple[float, float]] = []
    for rate in list_rates(150, 1e-3, 100.0):
        points.append((rate, 1 + k / 2 * x * x))
        if has_diverged([loss for _, loss in points], 0.9):
            break
        x -= rate * k * x
    found = analyse_range(points, 0.9)
    assert found.diverged
    assert 2 / k < points[-1][0] < 10
    assert found.steepest is not None
    assert found.minimum is not None
    assert found.steepest < 2 / k
    assert found.steepest < found.minimum < points[-1][0]


def test_smoothing_keeps_constants_and_belongs_to_the_smoothed_learning_rate() -> None:
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0], 0.9) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])
    # A loss that is linear in the log of the learning rate stays on its line.
    points = [(rate, 9 - math.log10(rate)) for rate in list_rates(60)]
    for rate, loss in analyse_range(points, 0.9).smoothed:
        assert loss == pytest.approx(9 - math.log10(rate))


def test_what_gives_no_learning_rate_says_so() -> None:
    rates = list_rates(40)
    for losses in ([5.0] * 40, [5.0 + i for i in range(40)], [math.nan] * 40):
        found = analyse_range(list(zip(rates, losses, strict=True)), 0.9)
        assert found.suggested is None
        assert "--find-lr-min" in found.fault
    assert found.diverged
    assert found.points == []


def test_a_loss_that_is_not_finite_ends_the_descent() -> None:
    points = [(rate, 5 - i / 10) for i, rate in enumerate(list_rates(30))]
    found = analyse_range([*points, (20.0, math.inf)], 0.9)
    assert found.diverged
    assert has_diverged([5.0, math.nan], 0.9)
    assert len(found.points) == 30
    assert found.minimum == pytest.approx(found.smoothed[-1][0])
