"""Token shards to batches: a permutation of windows per epoch, read ahead in a thread.

Shapes: B batch, T tokens of a window: the context length, or less where the whole split is
shorter. A window is T + 1 tokens: the inputs, and the same shifted by one. Windows of an epoch do
not overlap in their inputs; each epoch shifts them by another offset, so that the model does not
see the same cuts again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.shards import DataFolder, Split

_CHUNK_TOKENS = 256 * 1024  # read and converted at once: one queue item for many batches
_MAX_OPENED = 1024  # shards of one reader
_POLL_SECONDS = 0.5


def choose_window(n_tokens: int, context_length: int) -> int:
    """Tokens of a window: `context_length`, or all but one of a split that is shorter."""
    return max(1, min(context_length, n_tokens - 1))


def count_windows(n_tokens: int, context_length: int) -> int:
    """Windows in one epoch of `n_tokens`, at least one.

    Every offset below the context length leaves room for all of them, where there are more.
    """
    return max(1, (n_tokens - context_length) // context_length)


@dataclass(frozen=True)
class _Epoch:
    number: int
    offset: int  # tokens left out before the first window
    order: np.ndarray  # (n_windows,) which window comes when


def _build_epoch(
    n_tokens: int, context_length: int, seed: int, fingerprint: str, number: int
) -> _Epoch:
    """Order and offset of one epoch: a function of the arguments only.

    They come from Philox's raw 64-bit draws: NumPy keeps those for ever, unlike its permutations
    (NEP 19), so that a run can be continued under another NumPy.
    """
    n_windows = count_windows(n_tokens, context_length)
    digest = hashlib.sha256(f"{seed} {fingerprint} {number}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(n_windows + 1)
    room = min(context_length - 1, n_tokens - 1 - n_windows * context_length)
    return _Epoch(number, int(draws[0] % (room + 1)), np.argsort(draws[1:], kind="stable"))


class _ShardReader:
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


class BatchLoader:
    """Batches of one split, in an order that is a pure function of the sample's global index.

    The order follows from (`seed`, ``data.fingerprint``, global sample index), so that a resumed
    run, or another batch size, neither repeats nor skips a window within an epoch. ``cursor`` is
    the global index after the last batch that was returned: the only number to save.

    Raises:
        PreflightError: code DATA when a shard cannot be read.
    """

    def __init__(
        self,
        data: DataFolder,
        split: str,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        device: torch.device | str,
        cursor: int = 0,
        prefetch: int = 2,
    ) -> None:
        """`prefetch`: chunks of batches (about 256 thousand tokens each) read ahead."""
        part: Split = getattr(data, split)
        self.n_windows = count_windows(part.n_tokens, context_length)
        self.cursor = cursor
        self._batch_size = batch_size
        self._window = choose_window(part.n_tokens, context_length)
        self._device = torch.device(device)
        self._source = (part.n_tokens, self._window, seed, data.fingerprint)
        self._reader = _ShardReader(part, data.dtype, data.vocab_size)
        self._chunk: torch.Tensor | None = None
        self._chunk_row = 0
        self._queue: queue.Queue[torch.Tensor | BaseException] = queue.Queue(max(1, prefetch))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(cursor,), daemon=True)
        self._thread.start()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both (B, T) int64 on the device.

        Raises:
            PreflightError: code DATA when a shard was damaged or changed meanwhile; WORKER_LOST
                when the reading thread ended for any other reason.
        """
        if self._chunk is None or self._chunk_row >= len(self._chunk):
            self._chunk, self._chunk_row = self._take_chunk(), 0
        rows = self._chunk[self._chunk_row : self._chunk_row + self._batch_size]  # (B, T + 1)
        self._chunk_row += self._batch_size
        self.cursor += self._batch_size
        return _split_rows(rows, self._device)

    def _take_chunk(self) -> torch.Tensor:
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                # It may have put something just before it ended.
                item = RuntimeError("it ended") if self._queue.empty() else self._queue.get()
            if isinstance(item, torch.Tensor):
                return item
            if isinstance(item, (PreflightError, MemoryError)):
                raise item
            raise PreflightError(
                ExitCode.WORKER_LOST,
                f"the thread that reads the data was lost: {type(item).__name__}: {item}",
                "checkpoints are kept; run the same command to continue",
            ) from item

    def _read_ahead(self, cursor: int) -> None:
        """In the thread: chunks of whole batches from `cursor` on, until the loader is closed."""
        try:
            row_tokens = self._window + 1
            n_batches = max(1, _CHUNK_TOKENS // (self._batch_size * row_tokens))
            epoch: _Epoch | None = None
            while not self._closing.is_set():
                starts = []
                end = cursor + n_batches * self._batch_size
                while cursor < end:
                    number, first = divmod(cursor, self.n_windows)
                    if epoch is None or epoch.number != number:
                        epoch = _build_epoch(*self._source, number)
                    windows = epoch.order[first : first + end - cursor]
                    starts.append(windows * self._window + epoch.offset)
                    cursor += len(windows)
                rows = torch.from_numpy(self._reader.read(np.concatenate(starts), row_tokens))
                self._put(rows.pin_memory() if self._device.type == "cuda" else rows)
        except BaseException as error:
            self._put(error)

    def _put(self, item: torch.Tensor | BaseException) -> None:
        while not self._closing.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        return None

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        self._closing.set()
        self._thread.join()
        self._reader.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _split_rows(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T + 1) to inputs and targets, each (B, T) and contiguous."""
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def iterate_windows(
    data: DataFolder,
    split: str,
    *,
    batch_size: int,
    context_length: int,
    n_windows: int,
    device: torch.device | str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`n_windows` fixed windows, evenly spaced over the split, for evaluation.

    Yields inputs and targets, (B, T) int64 on the device; the last batch may be smaller. With
    fewer windows than asked for, each comes once.

    Raises:
        PreflightError: code DATA when a shard cannot be read or was changed.
    """
    part: Split = getattr(data, split)
    window = choose_window(part.n_tokens, context_length)
    available = count_windows(part.n_tokens, window)
    count = min(n_windows, available)
    starts = np.arange(count, dtype=np.int64) * available // count * window
    reader = _ShardReader(part, data.dtype, data.vocab_size)
    try:
        for first in range(0, count, batch_size):
            rows = reader.read(starts[first : first + batch_size], window + 1)
            yield _split_rows(torch.from_numpy(rows), torch.device(device))
    finally:
        reader.close()
