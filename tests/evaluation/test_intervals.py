"""Intervals against printed tables, exact binomial sums, plain loops and simulated evaluations."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.evaluation import intervals
from preflight.evaluation.intervals import (
    compare_paired,
    find_t_quantile,
    mean_interval,
    proportion_interval,
    ratio_interval,
)

N_EVALUATIONS = 1000


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_proportion_has_the_printed_interval(
    successes: int, n: int, low: float, high: float
) -> None:
    assert proportion_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = proportion_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def measure_proportion_coverage(n: int, p: float) -> float:
    """The exact probability that the interval of `n` trials holds `p`."""
    held = 0.0
    for k in range(n + 1):
        low, high = proportion_interval(k, n)
        if low <= p <= high:
            log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            held += math.exp(log_term + k * math.log(p) + (n - k) * math.log1p(-p))
    return held


@pytest.mark.parametrize("n", [10, 20, 50, 100, 500])
def test_a_proportion_is_covered_95_percent_over_all_true_values(n: int) -> None:
    # Whole counts make the coverage jump with the true value (Brown, Cai, DasGupta 2001): at ten
    # items no fixed interval keeps 95 +- 2 % at each of them, but the mean over all does.
    grid = (np.arange(200) + 0.5) / 200
    coverage = [measure_proportion_coverage(n, p) for p in grid]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.015)
    if n >= 50:
        assert min(coverage[20:-20]) > 0.925
        assert max(coverage[20:-20]) < 0.975


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 4)])
def test_what_is_no_share_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        proportion_interval(successes, n)


@pytest.mark.parametrize("degrees", [1, 2, 5, 9, 10, 11, 30, 499])
def test_students_quantile_leaves_2_5_percent_beyond(degrees: int) -> None:
    # With t = sqrt(df) tan(u), the density is cos(u) ** (df - 1).
    u = np.linspace(0, math.pi / 2, 400_001)
    density = np.cos(u) ** (degrees - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    end = math.atan(find_t_quantile(degrees) / math.sqrt(degrees))
    assert np.interp(end, u, area) / area[-1] == pytest.approx(0.95, abs=1e-6)


def test_the_half_width_is_that_of_resamples_drawn_one_by_one() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, 12).astype(float)
    tops = rng.gamma(2, 1, 12) * sizes
    ratio = tops.sum() / sizes.sum()

    def estimate(tops: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
        found = tops.sum() / sizes.sum()
        rests = [top - found * size for top, size in zip(tops, sizes, strict=True)]
        variance = sum(rest**2 for rest in rests) / (len(rests) - 1)
        return found, math.sqrt(variance * len(rests)) / sizes.sum()

    drawn = np.random.default_rng(intervals._SEED).integers(0, 12, (1999, 12))
    t_values = []
    for row in drawn:
        found, error = estimate(tops[row], sizes[row])
        t_values.append(abs(found - ratio) / error)
    half = sorted(t_values)[1899] * estimate(tops, sizes)[1]  # 1900 of 2000 parts
    assert ratio_interval(tops, sizes) == pytest.approx((ratio - half, ratio + half))


values = st.lists(st.floats(0.1, 10), min_size=2, max_size=30)


@settings(max_examples=40, deadline=None)
@given(values=values, factor=st.floats(0.5, 100))
def test_an_interval_holds_its_mean_and_scales_with_the_values(
    values: list[float], factor: float
) -> None:
    low, high = mean_interval(values)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    scaled = mean_interval([value * factor for value in values])
    assert scaled == pytest.approx((low * factor, high * factor), rel=1e-6, abs=1e-6)


def test_few_items_have_students_interval_and_one_has_none() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.302653 * 1 / math.sqrt(3))
    assert mean_interval([2.0]) == (-math.inf, math.inf)
    assert mean_interval([0.1] * 20) == pytest.approx((0.1, 0.1), abs=1e-15)


@pytest.mark.parametrize(
    ("tops", "bottoms"),
    [([], []), ([1.0], [1.0, 2.0]), ([math.nan, 1.0], [1, 1]), ([1.0], [0.0]), ([1, 2], [3, -1])],
)
def test_numbers_that_make_no_ratio_are_refused(tops: list[float], bottoms: list[float]) -> None:
    with pytest.raises(ValueError):
        ratio_interval(tops, bottoms)


# ---- paired -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(a=values, shift=st.floats(-1, 1), seed=st.integers(0, 99))
def test_turning_the_models_round_turns_the_difference_round(
    a: list[float], shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    b, sizes = np.array(a) + rng.normal(shift, 1, len(a)), rng.integers(1, 50, len(a))
    there, back = compare_paired(a, b, sizes), compare_paired(b, a, sizes)
    assert there.difference == pytest.approx(
        np.average(b, weights=sizes) - np.average(a, weights=sizes), abs=1e-9
    )
    assert (-there.high, -there.low) == pytest.approx((back.low, back.high))
    assert (there.p_value, there.is_shown) == (back.p_value, back.is_shown)


def test_the_sign_flip_test_gives_the_share_of_all_signs() -> None:
    differences = np.array([0.9, -0.2, 0.4, 0.7, -0.1, 0.5, 0.3, 0.6, -0.3])
    sums = [abs(np.dot(s, differences)) for s in itertools.product((-1, 1), repeat=9)]
    exact = np.mean(np.array(sums) >= differences.sum() - 1e-9)
    assert intervals._find_flip_p_value(differences) == pytest.approx(exact, abs=0.012)


def test_equal_differences_of_few_items_show_nothing() -> None:
    for n, shown in ((2, False), (4, False), (10, True)):
        found = compare_paired([0.0] * n, [1.0] * n)
        assert (found.difference, found.is_shown) == (1.0, shown)
    assert not compare_paired([1.0], [0.0]).is_shown
    assert compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p_value == 1


def test_weights_decide_what_an_item_counts() -> None:
    a, b = np.zeros(30), np.where(np.arange(30) < 10, 1.0, -1.0) + np.arange(30) / 100
    assert compare_paired(a, b).difference < 0
    assert compare_paired(a, b, np.where(np.arange(30) < 10, 9.0, 1.0)).difference > 0


def test_ten_thousand_items_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(1, 0.3, 10_000)
    began = time.process_time()
    assert compare_paired(a, a + rng.normal(0.01, 0.1, 10_000)).is_shown
    assert time.process_time() - began < 10  # 0.6 s measured


# ---- simulated evaluations ----------------------------------------------------------------------


def simulate(kind: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Numerators, denominators, true ratio."""
    if kind == "nats of a last word":
        return rng.gamma(2, 1, n), np.ones(n), 2.0
    sizes = rng.lognormal(6, 0.8, n)  # bytes of a page
    bits_per_byte = rng.gamma(16, 1 / 16, n)
    if kind == "short pages are harder":
        slope = 0.1 * (np.log(sizes) - 6) / 0.8
        return sizes * (bits_per_byte - slope), sizes, 1 - 0.1 * 0.8
    return sizes * bits_per_byte, sizes, 1.0


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 50, 150])
@pytest.mark.parametrize("kind", ["nats of a last word", "pages", "short pages are harder"])
def test_ratios_are_covered_95_percent(kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, held = np.random.default_rng(n), 0
    monkeypatch.setattr(intervals, "_N_RESAMPLES", 399)  # a fifth, to take a fifth of the time
    for _ in range(N_EVALUATIONS):
        tops, bottoms, truth = simulate(kind, n, rng)
        low, high = ratio_interval(tops, bottoms)
        held += low <= truth <= high
    assert held / N_EVALUATIONS == pytest.approx(0.95, abs=0.02)


def simulate_pair(
    kind: str, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Scores of two models that do not differ, and weights."""
    if kind == "accuracy":
        hard = rng.random(n)
        return (rng.random(n) < hard).astype(float), (rng.random(n) < hard).astype(float), None
    common = rng.gamma(4, 0.25, n)
    if kind == "skewed":  # nothing to exchange here, and yet the means are equal
        return common, common + rng.gamma(1, 0.1, n) - 0.1, None
    noise = rng.normal(0, 0.05, (2, n))
    return common + noise[0], common + noise[1], rng.lognormal(6, 0.8, n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 10, 50, 150])
@pytest.mark.parametrize("kind", ["accuracy", "bits per byte", "skewed"])
def test_models_that_do_not_differ_seldom_seem_to(
    kind: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "_N_RESAMPLES", 399)
    rng = np.random.default_rng(n)
    shown = sum(compare_paired(*simulate_pair(kind, n, rng)).is_shown for _ in range(N_EVALUATIONS))
    assert shown / N_EVALUATIONS <= 0.05
