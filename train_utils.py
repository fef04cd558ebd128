"""Token shards to batches: a permutation of windows per epoch, from the disk or from the device.

And chats to batches of like length. Shapes: B batch, T tokens of a window (see
`preflight.corpus.windows`), or of the longest chat of a batch.
"""

from __future__ import annotations

import abc
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import numpy as np
import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.chats.data import ChatData
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import DataFolder, Split
from preflight.corpus.windows import (
    WindowOrder,
    choose_window,
    count_run_windows,
    count_windows,
)
from preflight.device.ranks import Ranks, local_ranks
from preflight.device.token_store import DataPlace, TokenStore, choose_place, count_stored_bytes
from preflight.models.loss import TargetRows, Targets
from preflight.settings import SystemSettings, TrainingSettings

_CHUNK_TOKENS = 256 * 1024  # read and converted at once: one queue item for many batches
_POLL_SECONDS = 0.5


# ---- batches ------------------------------------------------------------------------------------


class Loader(abc.ABC):
    """Batches of a run's data.

    Attributes:
        cursor: the global index after the last sample that was returned, here or on another rank:
            the only number to save.
    """

    cursor: int

    @abc.abstractmethod
    def next_batch(self) -> tuple[torch.Tensor, Targets]:
        """Inputs (B T) int64 and their targets, on the device.

        Raises:
            PreflightError: code DATA when a file was damaged or changed meanwhile; WORKER_LOST
                when a reading thread ended for any other reason.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Stop reading, and free what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shares:
    """Which samples are whose: each micro-step is split over the ranks.

    The samples of an update are those of one process, whatever the number of ranks.

    Args:
        sizes: samples of each micro-step of an update, over all ranks.
        ranks: that share them; unset: this process alone.
    """

    def __init__(self, sizes: Sequence[int], ranks: Ranks | None = None) -> None:
        self.sizes, self._ranks = tuple(sizes), ranks or local_ranks()

    def iterate(self, cursor: int) -> Iterator[tuple[range, int]]:
        """Of each micro-step, the global indices of this rank's samples, and where it ends.

        `cursor` is the global index of an update's first sample.
        """
        for size in itertools.cycle(self.sizes):
            share = self._ranks.share(size)
            yield range(cursor + share.start, cursor + share.stop), cursor + size
            cursor += size


def split_update(n_samples: int, n_micro_steps: int) -> tuple[int, ...]:
    """The samples of each micro-step of an update; they differ by at most one."""
    ends = [n_samples * number // n_micro_steps for number in range(n_micro_steps + 1)]
    return tuple(end - first for first, end in itertools.pairwise(ends))


def _share_out(count: int, batch_size: int, ranks: Ranks | None) -> Iterator[range]:
    """This rank's share of each batch, which has `batch_size` rows on each rank, of `count`."""
    ranks = ranks or local_ranks()
    for first in range(0, count, batch_size * ranks.world):
        share = ranks.share(min(batch_size * ranks.world, count - first))
        yield range(first + share.start, first + share.stop)


def _split_by_epoch(samples: range, per_epoch: int) -> Iterator[tuple[int, slice]]:
    """Global indices as epochs, and places within each."""
    first = samples.start
    while first < samples.stop:
        epoch, place = divmod(first, per_epoch)
        end = min(per_epoch, place + samples.stop - first)
        yield epoch, slice(place, end)
        first += end - place


def _build_empty_batch(device: torch.device) -> tuple[torch.Tensor, TargetRows]:
    """A token without a target: the batch of a rank whose share of a micro-step is empty.

    It computes nothing, and takes part in what all ranks do together.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return torch.zeros(1, 1, dtype=torch.int64, device=device), TargetRows(nothing, nothing, 0)


class _Rows(Protocol):
    """This rank's windows in their order, batch after batch."""

    def take(self, samples: range) -> torch.Tensor:
        """(B, T + 1) int64 on the device: the next batch, of these global indices."""

    def close(self) -> None:
        """Free what it holds."""


class BatchLoader(Loader):
    """Batches of one split, in an order that is a pure function of the sample's global index.

    The order follows from (`seed`, ``data.fingerprint``, global sample index), so that a resumed
    run, another batch size, or another number of ranks neither repeats nor skips a window within
    an epoch.

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
        overlap: float = 0.0,
        on_device: bool = False,
        shares: Shares | None = None,
    ) -> None:
        """Open the split.

        Args:
            data: prepared shards.
            split: ``train`` or ``val``.
            batch_size: B, at most.
            context_length: T, where the split is not shorter.
            seed: of the order.
            device: where batches are.
            cursor: the global index of the first sample.
            prefetch: chunks of batches (about 256 thousand tokens each) read ahead.
            overlap: the share of each window that the next one repeats.
            on_device: the whole split is copied to the device now, and batches are gathered there.
            shares: what this rank reads of each micro-step; unset: `batch_size` samples.
        """
        part: Split = getattr(data, split)
        order = WindowOrder(part.n_tokens, context_length, overlap, seed, data.fingerprint)
        self.n_windows = order.n_windows
        self.cursor = cursor
        shares = shares or Shares([batch_size])
        self._shares = shares.iterate(cursor)
        reader = ShardReader(part, data.dtype, data.vocab_size)
        self._device = place = torch.device(device)
        self._rows: _Rows
        if on_device:
            self._rows = _StoredRows(
                _store_split(reader, part.n_tokens, data.vocab_size, place), order
            )
        else:
            ahead = (samples for samples, _ in shares.iterate(cursor))
            self._rows = _RowsAhead(reader, order, ahead, batch_size, place, prefetch)

    def next_batch(self) -> tuple[torch.Tensor, Targets]:
        """Inputs and targets, both (B, T); the share of a rank may be empty."""
        samples, cursor = next(self._shares)
        batch = (
            _split_rows(self._rows.take(samples)) if samples else _build_empty_batch(self._device)
        )
        self.cursor = cursor
        return batch

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        self._rows.close()


class _RowsAhead:
    """Rows that a thread reads from the shards, chunks of whole batches ahead."""

    def __init__(
        self,
        reader: ShardReader,
        order: WindowOrder,
        batches: Iterator[range],
        batch_size: int,
        device: torch.device,
        prefetch: int,
    ) -> None:
        self._reader, self._order = reader, order
        self._batch_size, self._device = batch_size, device
        self._chunk: torch.Tensor | None = None
        self._chunk_row = 0
        self._queue: queue.Queue[torch.Tensor | BaseException] = queue.Queue(max(1, prefetch))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(batches,), daemon=True)
        self._thread.start()

    def take(self, samples: range) -> torch.Tensor:
        """The next batch."""
        while self._chunk is None or self._chunk_row >= len(self._chunk):
            self._chunk, self._chunk_row = self._take_chunk(), 0
        rows = self._chunk[self._chunk_row : self._chunk_row + len(samples)]
        self._chunk_row += len(samples)
        return rows.to(self._device, non_blocking=True)

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

    def _read_ahead(self, batches: Iterator[range]) -> None:
        """In the thread: chunks of whole `batches`, until the loader is closed."""
        try:
            row_tokens = self._order.window + 1
            n_batches = max(1, _CHUNK_TOKENS // (self._batch_size * row_tokens))
            current, of_epoch = -1, np.empty(0, np.int64)
            while not self._closing.is_set():
                starts = [np.empty(0, np.int64)]
                for samples in itertools.islice(batches, n_batches):
                    for number, places in _split_by_epoch(samples, self._order.n_windows):
                        if number != current:
                            current, of_epoch = number, self._order.list_starts(number)
                        starts.append(of_epoch[places])
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


class _StoredRows:
    """Rows gathered on the device from the whole split; once an epoch its order is copied there."""

    def __init__(self, store: TokenStore, order: WindowOrder) -> None:
        self._store, self._order = store, order
        self._number, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def take(self, samples: range) -> torch.Tensor:
        """The next batch."""
        starts = []
        for number, places in _split_by_epoch(samples, self._order.n_windows):
            if number != self._number:
                self._starts = torch.empty(0, dtype=torch.int64)  # freed before its successor
                listed = torch.from_numpy(self._order.list_starts(number))
                self._number, self._starts = number, listed.to(self._store.device)
            starts.append(self._starts[places])
        together = starts[0] if len(starts) == 1 else torch.cat(starts)
        return self._store.gather(together, self._order.window + 1)

    def close(self) -> None:
        """Free the device's memory."""
        del self._store, self._starts


def _store_split(
    reader: ShardReader, n_tokens: int, vocab_size: int, device: torch.device
) -> TokenStore:
    """All tokens of a split on the device. The shards are read once, and closed."""
    store = TokenStore(n_tokens, vocab_size, device)
    try:
        for first in range(0, n_tokens, _CHUNK_TOKENS):
            length = min(_CHUNK_TOKENS, n_tokens - first)
            store.fill(first, torch.from_numpy(reader.read(np.array([first]), length)[0]))
    finally:
        reader.close()
    return store


def _split_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T + 1) to inputs and targets, each (B, T) and contiguous."""
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---- chats --------------------------------------------------------------------------------------


class ChatLoader(Loader):
    """Batches of chats of like length, padded on the right; a `Loader`.

    Padding is never seen: attention looks back only, and padding has no targets. The order is a
    pure function of (`seed`, ``chats.fingerprint``, global index), as that of `BatchLoader`.
    """

    def __init__(
        self,
        chats: ChatData,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        cursor: int = 0,
        shares: Shares | None = None,
    ) -> None:
        self.cursor = cursor
        self._shares = (shares or Shares([batch_size])).iterate(cursor)
        self._chats, self._rows = chats, chats.open_rows("train")
        self._seed = seed
        self._epoch, self._of_epoch = -1, np.empty(0, np.int64)
        self._device = torch.device(device)

    def next_batch(self) -> tuple[torch.Tensor, TargetRows]:
        """Inputs (B T), and the rows with a target; the share of a rank may be empty."""
        samples, self.cursor = next(self._shares)
        if not samples:
            return _build_empty_batch(self._device)
        chosen = []
        for epoch, places in _split_by_epoch(samples, len(self._rows)):
            if epoch != self._epoch:
                self._epoch, self._of_epoch = epoch, self._chats.order(self._seed, epoch)
            chosen.append(self._of_epoch[places])
        rows = self._rows.read(np.concatenate(chosen))
        return _pad_chats(rows, self._chats, self._device)

    def close(self) -> None:
        """Close the files."""
        self._rows.close()


def select_targets(labels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a row has targets, and the labels there; those that are masked go nowhere."""
    places = np.flatnonzero(mask)
    return places, labels[places]


def _pad_chats(
    rows_read: Sequence[tuple[np.ndarray, np.ndarray]], chats: ChatData, device: torch.device
) -> tuple[torch.Tensor, TargetRows]:
    """Ids and masks (T,) of some rows as inputs (B T) and their targets."""
    width = int(chats.pad(np.array([len(ids) - 1 for ids, _ in rows_read])).max())
    inputs = np.zeros((len(rows_read), width), np.int64)
    rows, targets = [], []
    for number, (ids, mask) in enumerate(rows_read):
        inputs[number, : len(ids) - 1] = ids[:-1]
        places, labels = select_targets(ids[1:], mask[1:])
        rows.append(number * width + places)
        targets.append(labels)
    n_tokens = sum(len(ids) - 1 for ids, _ in rows_read)
    packed = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(targets)]))
    tensors = [torch.from_numpy(inputs), packed.long()]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    tokens, both = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return tokens, TargetRows(both[0], both[1], n_tokens)


def _iterate_chats(
    chats: ChatData,
    split: str,
    batch_size: int,
    n_rows: int,
    device: torch.device,
    ranks: Ranks | None,
) -> Iterator[tuple[torch.Tensor, TargetRows]]:
    """`n_rows` fixed chats of a split, evenly spaced over it; like lengths share a batch."""
    rows = chats.open_rows(split)
    try:
        count = min(n_rows, len(rows))
        chosen = np.arange(count, dtype=np.int64) * len(rows) // count
        chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
        for share in _share_out(count, batch_size, ranks):
            if share:
                batch = rows.read(chosen[share.start : share.stop])
                yield _pad_chats(batch, chats, device)
            else:
                yield _build_empty_batch(device)
    finally:
        rows.close()


# ---- of a run -----------------------------------------------------------------------------------


def choose_data_place(
    data: DataFolder,
    training: TrainingSettings,
    system: SystemSettings,
    context_length: int,
    device_type: str,
    free_bytes: int,
) -> DataPlace:
    """Where the training part is kept: see `token_store.choose_place`."""
    if isinstance(data, ChatData):
        return DataPlace(False, 0, "chats are read from disk")
    windows = count_run_windows(data, training, context_length)
    n_bytes = count_stored_bytes(data.train.n_tokens, data.vocab_size, windows.n_train)
    return choose_place(system.data_on_gpu, device_type, n_bytes, free_bytes)


def measure_target_share(data: DataFolder | None, training: TrainingSettings) -> float:
    """Of the tokens of the largest micro-batch, those that are learned; of a text all are."""
    if not isinstance(data, ChatData):
        return 1.0
    n_targets = data.find_largest_batch(training)[1]
    return n_targets / (training.batch_size * data.longest_tokens)


def find_heaviest_sample(data: DataFolder, training: TrainingSettings) -> int:
    """The cursor of the micro-batch that needs most memory; windows are all alike."""
    if not isinstance(data, ChatData):
        return 0
    return data.find_largest_batch(training)[0] * training.batch_size


def open_training_loader(
    data: DataFolder,
    training: TrainingSettings,
    context_length: int,
    device: torch.device,
    *,
    on_device: bool,
    cursor: int = 0,
    shares: Shares | None = None,
) -> Loader:
    """The training part as a run with these settings reads it, from sample `cursor` on.

    By default one process reads all of it, a micro-step of `training.batch_size` after the other.
    """
    if isinstance(data, ChatData):
        return ChatLoader(
            data,
            batch_size=training.batch_size,
            seed=training.seed,
            device=device,
            cursor=cursor,
            shares=shares,
        )
    return BatchLoader(
        data,
        "train",
        batch_size=training.batch_size,
        context_length=training.choose_window(context_length),
        seed=training.seed,
        device=device,
        cursor=cursor,
        overlap=training.overlap,
        on_device=on_device,
        shares=shares,
    )


def iterate_windows(
    data: DataFolder,
    split: str,
    *,
    batch_size: int,
    context_length: int,
    n_windows: int,
    device: torch.device | str,
    ranks: Ranks | None = None,
) -> Iterator[tuple[torch.Tensor, Targets]]:
    """`n_windows` fixed windows, or chats, evenly spaced over the split, for evaluation.

    Yields inputs (B, T) int64 and targets, on the device; the last batch may be smaller. With
    fewer windows than asked for, each comes once. Each of several ranks has its share, in as many
    batches as the others.

    Raises:
        PreflightError: code DATA when a shard cannot be read or was changed.
    """
    if isinstance(data, ChatData):
        yield from _iterate_chats(data, split, batch_size, n_windows, torch.device(device), ranks)
        return
    part: Split = getattr(data, split)
    window = choose_window(part.n_tokens, context_length)
    available = count_windows(part.n_tokens, window)
    count = min(n_windows, available)
    starts = np.arange(count, dtype=np.int64) * available // count * window
    reader = ShardReader(part, data.dtype, data.vocab_size)
    try:
        for share in _share_out(count, batch_size, ranks):
            if share:
                read = reader.read(starts[share.start : share.stop], window + 1)
                yield _split_rows(torch.from_numpy(read).to(device, non_blocking=True))
            else:
                yield _build_empty_batch(torch.device(device))
    finally:
        reader.close()
