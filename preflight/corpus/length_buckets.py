"""The order of rows that differ in length: like lengths stand together, and padding is small.

An epoch is a permutation. In it, every stretch of `CHUNK_ROWS` rows is sorted by length and cut
into buckets of `BUCKET_ROWS`, which come in random order. None of this depends on the batch size,
so that a resumed run, or another batch size, neither repeats nor skips a row within an epoch. A
batch of at most `BUCKET_ROWS` rows lies within one bucket where its size divides it.
"""

from __future__ import annotations

import hashlib

import numpy as np

BUCKET_ROWS = 32
CHUNK_ROWS = 64 * BUCKET_ROWS
LENGTH_MULTIPLE = 8  # of a padded row: tensor cores want it, and fewer shapes occur


def pad_lengths(n_tokens: np.ndarray, longest: int) -> np.ndarray:
    """The tokens of padded rows: multiples of `LENGTH_MULTIPLE`, at most `longest`."""
    return np.minimum(longest, -(-n_tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def order_rows(lengths: np.ndarray, seed: int, fingerprint: str, epoch: int) -> np.ndarray:
    """(n,) int64: the rows of one epoch in their order, a function of the arguments only.

    From Philox's raw 64-bit draws, as `windows.build_epoch` does.

    Args:
        lengths: (n,) tokens of each row.
        seed: of the run.
        fingerprint: of the data.
        epoch: its number.
    """
    digest = hashlib.sha256(f"rows {seed} {fingerprint} {epoch}".encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
    shuffled = np.argsort(philox.random_raw(len(lengths)), kind="stable")
    parts = []
    for first in range(0, len(shuffled), CHUNK_ROWS):
        chunk = shuffled[first : first + CHUNK_ROWS]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        n_whole = len(chunk) // BUCKET_ROWS
        # What is left over is drawn from all lengths, and comes last: it breaks no later bucket.
        n_left = len(chunk) - n_whole * BUCKET_ROWS
        left = np.linspace(0, len(chunk) - 1, n_left).astype(np.int64)
        whole = np.delete(chunk, left).reshape(n_whole, BUCKET_ROWS)
        parts.append(whole[np.argsort(philox.random_raw(n_whole), kind="stable")].ravel())
        parts.append(chunk[left])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def find_largest_batch(
    order: np.ndarray, widths: np.ndarray, n_targets: np.ndarray, batch_size: int
) -> tuple[int, int]:
    """The batch that needs most memory: of those as wide as any, the one with most targets.

    Args:
        order: rows of an epoch in their order.
        widths: (n,) tokens of each row, padded.
        n_targets: (n,) of each row.
        batch_size: rows of a batch; an epoch that it does not divide goes on with its beginning.

    Returns:
        its number in the epoch, and its targets.
    """
    rows = np.resize(order, -(-len(order) // batch_size) * batch_size).reshape(-1, batch_size)
    targets = n_targets[rows].sum(axis=1)
    is_widest = widths[rows].max(axis=1) == widths.max()
    number = int(np.argmax(np.where(is_widest, targets, -1)))
    return number, int(targets[number])


def count_padded_tokens(order: np.ndarray, widths: np.ndarray, batch_size: int) -> np.ndarray:
    """(n_batches,) tokens of each whole batch of an epoch, padding included."""
    n_batches = max(1, len(order) // batch_size)
    rows = np.resize(order, n_batches * batch_size).reshape(n_batches, batch_size)
    return widths[rows].max(axis=1) * batch_size
