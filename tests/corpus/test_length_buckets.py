"""The order of rows of different lengths: complete, fixed, and with little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preflight.corpus.length_buckets import (
    BUCKET_ROWS,
    CHUNK_ROWS,
    count_padded_tokens,
    find_largest_batch,
    order_rows,
    pad_lengths,
)


def draw_lengths(n_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 500, n_rows)


@given(st.integers(0, 3 * CHUNK_ROWS), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_each_row_comes_once_an_epoch(n_rows: int, seed: int, epoch: int) -> None:
    order = order_rows(draw_lengths(n_rows), seed, "data", epoch)
    assert np.array_equal(np.sort(order), np.arange(n_rows))


def test_the_order_depends_on_seed_data_and_epoch_and_on_nothing_else() -> None:
    lengths = draw_lengths(1000)
    first = order_rows(lengths, 1, "data", 0)
    assert np.array_equal(first, order_rows(lengths, 1, "data", 0))
    for other in ((2, "data", 0), (1, "other", 0), (1, "data", 1)):
        assert not np.array_equal(first, order_rows(lengths, *other))


def test_order_is_fixed_for_ever() -> None:
    assert order_rows(draw_lengths(100), 42, "data", 0)[:8].tolist() == ORDER


ORDER = [42, 44, 7, 34, 41, 27, 5, 96]


@pytest.mark.parametrize(("n_rows", "most"), [(BUCKET_ROWS * 3, 1.4), (1000, 1.1), (2125, 1.1)])
def test_like_lengths_stand_together(n_rows: int, most: float) -> None:
    lengths = draw_lengths(n_rows)
    order = order_rows(lengths, 1, "data", 0)
    for size in (1, 8, 32):
        padded = count_padded_tokens(order, lengths, size).sum()
        shuffled = count_padded_tokens(np.sort(order), lengths, size).sum()
        used = lengths[order[: n_rows // size * size]].sum()
        assert used <= padded <= most * used
        assert size == 1 or shuffled > 1.5 * used


def test_buckets_come_in_random_order() -> None:
    """Else the model would see short chats first, and long ones last."""
    lengths = draw_lengths(CHUNK_ROWS)
    order = order_rows(lengths, 1, "data", 0)
    means = lengths[order].reshape(-1, BUCKET_ROWS).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32, 50])
def test_the_largest_batch(batch_size: int) -> None:
    lengths, n_targets = draw_lengths(49), draw_lengths(49, 1)
    order = order_rows(lengths, 1, "data", 0)
    number, found = find_largest_batch(order, lengths, n_targets, batch_size)
    rows = np.resize(order, -(-49 // batch_size) * batch_size)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    widest = [b for b in batches if lengths[b].max() == lengths.max()]
    assert found == max(n_targets[b].sum() for b in widest) == n_targets[batches[number]].sum()
    assert lengths[batches[number]].max() == lengths.max()


def test_padded_lengths() -> None:
    assert pad_lengths(np.array([1, 8, 9, 97, 100]), 100).tolist() == [8, 8, 16, 100, 100]
    assert pad_lengths(np.int64(3), 5) == 5
