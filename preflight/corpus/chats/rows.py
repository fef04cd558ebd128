"""The rows of a part of a chat folder: ids and masks, out of files that stay memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preflight.corpus.metadata import (
    MASK_NAME,
    OFFSETS_NAME,
    damaged_error,
    unreadable_error,
)
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import Shard, Split

MASK_DTYPE, OFFSET_DTYPE = np.dtype(np.uint8), np.dtype(np.int64)
_COUNTED_TOKENS = 2**20  # whose mask is looked at in one go


class ChatRows:
    """The rows of one part. Each is the beginning of a text; none follows on another.

    All files are read as shards are: see `ShardReader` for what happens to one that changes while
    it is in use.

    Attributes:
        lengths: (R,) int64, tokens of each row.
        n_targets: (R,) int64, tokens of each row that are learned, at least one.
    """

    def __init__(self, folder: Path, ids: Split, dtype: np.dtype, vocab_size: int) -> None:
        """Open the files of a part in its own `folder`, whose SHA-256 were checked.

        Raises:
            PreflightError: code DATA, when a file does not have the shape that it should.
        """
        mask, offsets = folder / MASK_NAME, folder / OFFSETS_NAME
        n_rows = _count_items(offsets, OFFSET_DTYPE) - 1
        if n_rows < 1 or _count_items(mask, MASK_DTYPE) != ids.n_tokens:
            raise damaged_error(mask if n_rows > 0 else offsets, "it has not the expected length")
        self._ids = ShardReader(ids, dtype, vocab_size)
        self._mask = _open_single(mask, ids.n_tokens, MASK_DTYPE)
        places = _open_single(offsets, n_rows + 1, OFFSET_DTYPE)
        bounds = places.read(np.zeros(1, np.int64), n_rows + 1)[0]
        places.close()
        self._starts, self.lengths = bounds[:-1], np.diff(bounds)
        if bounds[0] != 0 or bounds[-1] != ids.n_tokens or self.lengths.min() < 2:
            raise damaged_error(offsets, "its rows are not one behind the other")
        self.n_targets = self._count_targets(mask)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    def read(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (T,) int64 and mask (T,) bool of each of these rows.

        Raises:
            PreflightError: code DATA, when a file was changed since it was verified.
        """
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(rows)
        lengths = self.lengths[rows]
        for length in np.unique(lengths).tolist():
            chosen = np.flatnonzero(lengths == length)
            starts = self._starts[rows[chosen]]
            ids, masks = (reader.read(starts, length) for reader in (self._ids, self._mask))
            for i, place in enumerate(chosen.tolist()):
                found[place] = ids[i], masks[i].astype(bool)
        return found

    def close(self) -> None:
        """Unmap the files."""
        self._ids.close()
        self._mask.close()

    def __enter__(self) -> ChatRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_targets(self, path: Path) -> np.ndarray:
        """(R,) the targets of each row; PreflightError (DATA) for a row without one."""
        sums = []
        for first, behind in _cut(self.lengths):
            starts = self._starts[first:behind]
            n_tokens = int(self.lengths[first:behind].sum())
            mask = self._mask.read(starts[:1], n_tokens)[0]
            sums.append(np.add.reduceat(mask, starts - starts[0]))
            if mask.max() > 1 or mask[starts - starts[0]].any() or not sums[-1].all():
                raise damaged_error(path, "it is no mask: each row has targets, but not its first")
        return np.concatenate(sums)


def _cut(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows of about `_COUNTED_TOKENS`, at least one row each."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        behind = int(np.searchsorted(ends, before + _COUNTED_TOKENS, side="right"))
        behind = max(behind, first + 1)
        yield first, behind
        first = behind


def _count_items(path: Path, dtype: np.dtype) -> int:
    """The length of a one-dimensional array in a file; PreflightError (DATA) for anything else."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # `np.load` would open archives, too
    except OSError as error:
        raise unreadable_error(path, error) from None
    except (ValueError, EOFError) as error:
        raise damaged_error(path, str(error)[:200]) from None
    if array.dtype != dtype or array.ndim != 1:
        raise damaged_error(path, f"expected one row of {dtype}, found {array.dtype}")
    return len(array)


def _open_single(path: Path, n_items: int, dtype: np.dtype) -> ShardReader:
    """One file as a reader of shards."""
    status = os.stat(path)
    shard = Shard(path, n_items, (status.st_size, status.st_mtime_ns))
    return ShardReader(Split((shard,), n_items, 0, 0), dtype, np.iinfo(dtype).max)
