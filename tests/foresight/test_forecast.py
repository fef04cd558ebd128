"""The forecast on losses that follow a known law."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeConfig
from preflight.core.signals import StopFlag
from preflight.corpus.shards import Split
from preflight.foresight.forecast import choose_lengths, forecast_loss, measure_unigram_loss
from preflight.modes.setup import RunSetup


def law(n: float, start: float, onset: float, exponent: float, floor: float) -> float:
    return float(floor + (start - floor) * (1 + n / onset) ** -exponent)


def test_curves_of_the_law_are_continued() -> None:
    lengths, total = choose_lengths(3200), 3200
    for onset, exponent, floor in ((20, 0.2, 0.5), (60, 0.25, 0.0), (200, 0.3, 1.0)):
        losses = [law(n, 6.0, onset, exponent, floor) for n in lengths]
        found = forecast_loss(lengths, losses, total, 6.0)
        truth = law(total, 6.0, onset, exponent, floor)
        assert found.loss == pytest.approx(truth, rel=0.12)
        assert found.low < truth < found.high < losses[-1]


def test_a_pure_power_law_is_continued() -> None:
    """Far behind its beginning the law is the usual one, whatever the unigram loss is."""
    for exponent in (0.1, 0.2, 0.3):
        losses = [9 * n**-exponent for n in (1000, 2000, 4000)]
        found = forecast_loss((1000, 2000, 4000), losses, 64_000, 7.0)
        truth = 9 * 64_000**-exponent
        assert found.low < truth < found.high
        assert found.loss == pytest.approx(truth, rel=0.15)
        near = forecast_loss((1000, 2000, 4000), losses, 8_000, 7.0)
        assert near.loss == pytest.approx(9 * 8_000**-exponent, rel=0.02)
        assert near.high - near.low < 0.6 * (found.high - found.low)


def test_its_interval_holds_nine_of_ten() -> None:
    """Laws drawn as it believes them to be, with its noise: the interval is what it says."""
    draw = random.Random(5)
    inside = 0
    for _ in range(40):
        exponent = 0.2 * math.exp(0.6 * draw.gauss(0, 1))
        onset, floor = math.exp(draw.uniform(-1, 9)), abs(draw.gauss(0, 0.25)) * 3
        losses = [
            law(n, 6.0, onset, exponent, floor) * (1 + 0.018 * draw.gauss(0, 1))
            for n in (100, 200, 400)
        ]
        found = forecast_loss((100, 200, 400), losses, 6400, 6.0)
        inside += found.low <= law(6400, 6.0, onset, exponent, floor) <= found.high
    assert 32 <= inside <= 40


def test_units_and_steps_do_not_matter() -> None:
    losses = (5.0, 4.5, 4.1)
    found = forecast_loss((100, 200, 400), losses, 6400, 6.0)
    in_bits = forecast_loss((100, 200, 400), [x / 2 for x in losses], 6400, 3.0)
    in_tokens = forecast_loss((1000, 2000, 4000), losses, 64_000, 6.0)
    assert dataclasses.astuple(in_bits) == pytest.approx(dataclasses.astuple(found.scale(0.5)))
    assert dataclasses.astuple(in_tokens) == pytest.approx(dataclasses.astuple(found))
    # Losses that rise, or lie above the unigram loss, still give an interval.
    odd = forecast_loss((100, 200, 400), (6.5, 6.6, 6.7), 6400, 6.0)
    assert 0 < odd.low < odd.loss <= odd.high <= 6.7


def test_lengths_are_shares_of_the_run_and_not_too_short() -> None:
    assert choose_lengths(64_000) == (1000, 2000, 4000)
    assert choose_lengths(3200) == (50, 100, 200)
    assert choose_lengths(1600) == (50, 100, 200)
    assert choose_lengths(800) == (50, 100, 200)
    assert choose_lengths(400) == (25, 50, 100)
    assert choose_lengths(64) == (4, 8, 16)


def test_the_unigram_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    data = RunSetup(make_config(), StopFlag()).data
    train, val = np.array([0] * 7 + [1] * 3, np.uint16), np.array([0, 1, 3], np.uint16)
    parts = []
    for name, tokens in (("train", train), ("val", val)):
        np.save(tmp_path / f"{name}.npy", tokens)
        shard = dataclasses.replace(data.train.shards[0], path=tmp_path / f"{name}.npy")
        parts.append(Split((shard,), len(tokens), 1, len(tokens)))
    small = dataclasses.replace(data, train=parts[0], val=parts[1], vocab_size=4)
    expected = -(math.log(8 / 14) + math.log(4 / 14) + math.log(1 / 14)) / 3
    assert measure_unigram_loss(small) == pytest.approx(expected)
