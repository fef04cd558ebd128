"""Tokens by their position in a split, out of shards that stay memory-mapped."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.shards import Split

_MAX_OPENED = 1024  # shards of one reader


class ShardReader:
    """Copies tokens by position out of a split's shards, which stay memory-mapped.

    A process that touches a map of a file that was cut short is killed with SIGBUS. So the times
    and sizes of all shards concerned are compared before each chunk, and the size of the open file
    again right before the copy from it. What remains is a cut within the copy of a chunk, which
    takes a fraction of a millisecond, or longer where it waits for the disk. It ends the process
    without a message; the next run continues from the last checkpoint.
    """

    def __init__(self, split: Split, dtype: np.dtype, vocab_size: int) -> None:
        self._dtype, self._vocab_size = dtype, vocab_size
        self._shards = split.shards
        self._starts = np.cumsum([0, *(shard.n_tokens for shard in split.shards)])
        self._files: dict[int, tuple[int, int]] = {}  # device and inode by shard
        # By shard, the least recently used first: the tokens, and the map that they look into.
        self._opened: OrderedDict[int, tuple[np.ndarray, mmap.mmap]] = OrderedDict()
        self._max_opened = _choose_max_opened()
        self.check_unchanged(range(len(self._shards)))
        for index in range(min(len(self._shards), self._max_opened)):
            self._open(index)

    def _open(self, index: int) -> None:
        """Map a shard, and unmap another where there are too many: each map holds a descriptor."""
        shard = self._shards[index]
        try:
            mapped = np.load(shard.path, mmap_mode="r")
        except OSError as error:
            raise PreflightError(
                ExitCode.DATA,
                f"{shard.path}: {error.strerror}",
                "rerun with --text-file to rebuild the data folder",
            ) from None
        except (ValueError, EOFError):  # another header, or fewer tokens than it says
            raise self._explain(shard.path, "changed while it was in use") from None
        while len(self._opened) >= self._max_opened:
            self._opened.popitem(last=False)
        # A plain array is sliced faster than a memmap.
        self._opened[index] = np.asarray(mapped), mapped.base
        self._files.pop(index, None)
        self.check_unchanged([index])

    def close(self) -> None:
        """Unmap the shards."""
        self._opened.clear()

    def check_unchanged(self, indices: Iterable[int]) -> None:
        """PreflightError (DATA) when one of these shards is no longer as it was verified."""
        for index in indices:
            shard = self._shards[index]
            try:
                status = os.stat(shard.path)
            except OSError:  # deleted or moved: what is mapped stays readable
                continue
            place = (status.st_dev, status.st_ino)
            is_same_file = place == self._files.setdefault(index, place)
            is_read = index in self._opened  # a file that took the name of a mapped one is not
            is_same_content = (status.st_size, status.st_mtime_ns) == shard.signature
            if (is_same_file or not is_read) and not is_same_content:
                raise self._explain(shard.path, "changed while it was in use")

    def _explain(self, path: object, what: str) -> PreflightError:
        return PreflightError(
            ExitCode.DATA,
            f"{path} {what}",
            "checkpoints are kept; restore or rebuild the data folder, then run the same command",
        )

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(n, length) int64: `length` tokens from each of the `starts`."""
        rows = np.empty((len(starts), length), self._dtype)
        shards, last = (
            np.searchsorted(self._starts, places, side="right") - 1
            for places in (starts, starts + length - 1)
        )
        self.check_unchanged(np.unique([shards, last]).tolist())
        firsts = starts - self._starts[shards]
        is_whole = shards == last
        for index in np.unique(shards[is_whole]).tolist():
            chosen = np.flatnonzero(is_whole & (shards == index))
            rows[chosen] = sliding_window_view(self._map(index), length)[firsts[chosen]]
        for row in np.flatnonzero(~is_whole).tolist():
            self._copy_across(int(shards[row]), int(firsts[row]), rows[row])
        largest = int(rows.max())
        if largest >= self._vocab_size:
            raise PreflightError(
                ExitCode.DATA,
                f"the data holds token id {largest}, but the vocabulary has "
                f"{self._vocab_size:,} ids",
                "rebuild the data folder with --text-file",
            )
        return rows.astype(np.int64)

    def _copy_across(self, index: int, first: int, row: np.ndarray) -> None:
        """Fill `row` from token `first` of shard `index` on, and from the shards that follow."""
        while len(row):
            tokens = self._map(index)[first : first + len(row)]
            row[: len(tokens)] = tokens
            row, index, first = row[len(tokens) :], index + 1, 0

    def _map(self, index: int) -> np.ndarray:
        """The tokens of a shard, to copy from at once; PreflightError (DATA) if it was cut."""
        if index not in self._opened:
            self._open(index)
        self._opened.move_to_end(index)
        tokens, mapped = self._opened[index]
        if mapped.size() < self._shards[index].signature[0]:
            raise self._explain(self._shards[index].path, "was cut short while it was in use")
        return tokens


def _choose_max_opened() -> int:
    """Shards that one reader keeps mapped: a quarter of the descriptors that a process may have."""
    try:
        import resource
    except ImportError:  # Windows
        return _MAX_OPENED
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_OPENED if limit < 0 else max(1, min(_MAX_OPENED, limit // 4))
