"""Blocks to token ids, in worker processes. No torch: workers stay light."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from preflight.core.log import log
from preflight.core.processes import end_with_parent, shield_children
from preflight.corpus.blocks import Block
from preflight.corpus.encoding import Encoded, encode_block, encode_ids, encode_run
from preflight.corpus.reading import DroppedRow, TokenBlock, Work
from preflight.corpus.row_recipe import RowRecipe, count_dropped_row, encode_rows
from preflight.tokenization import Tokenizer

Item = tuple[int, Work]  # number of the reader, for its recipe


class Encoder:
    """Work to ids, in any process."""

    def __init__(self, tokenizer: Tokenizer, recipes: Mapping[int, RowRecipe]) -> None:
        self.tokenizer, self._recipes = tokenizer, recipes

    def encode(self, item: Item) -> Encoded:
        """The ids of a block that is no run, or of a batch of rows."""
        number, work = item
        if isinstance(work, Block):
            return encode_block(work, self.tokenizer)
        if isinstance(work, TokenBlock):
            return encode_ids(work, self.tokenizer)
        if isinstance(work, DroppedRow):
            return count_dropped_row(work, self._recipes[number], self.tokenizer)
        return encode_rows(work, self._recipes[number], self.tokenizer)


_worker: Encoder | None = None
_blocks_done = 0


def _start_worker(
    kind: type[Tokenizer], folder: Path, facts: dict[str, Any], recipes: Mapping[int, RowRecipe]
) -> None:
    """Set a worker process up: it ends with its parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where `shield_children` has no effect
    end_with_parent()
    _worker = Encoder(kind.load_saved(folder, facts), recipes)


def _encode_in_worker(item: Item) -> Encoded:
    global _blocks_done
    assert _worker is not None
    _blocks_done += 1
    if _blocks_done % 50 == 0:
        # glibc's heap fragments: it grew by 160 KB with each MB of text until it was trimmed.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
    return _worker.encode(item)


def _is_importable(kind: type[Tokenizer]) -> bool:
    """Whether another process can import the tokenizer's class."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__ != "__main__" and getattr(module, kind.__qualname__, None) is kind


class Encoders:
    """Work to ids, in order: in worker processes, or in this process for small texts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_workers: int,
        folder: Path,
        recipes: Mapping[int, RowRecipe] | None = None,
    ) -> None:
        """`folder`: where `tokenizer.save` has written its files; `recipes`: by source."""
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, recipes or {})
        self._n_workers = n_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        kind, facts = type(tokenizer), tokenizer.describe()
        # A worker reads what later runs will read: it has to be the same tokenizer.
        if n_workers and kind.load_saved(folder, facts).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{folder}: the saved tokenizer is not {tokenizer.name}")
        if n_workers and _is_importable(kind):
            # From files: half a megabyte of vocabulary would not go into the pipe at once, and
            # Python waits forever for a worker that dies before it has read all.
            try:
                with shield_children():  # its semaphores start a helper process
                    self._pool = concurrent.futures.ProcessPoolExecutor(
                        n_workers,
                        multiprocessing.get_context("spawn"),
                        _start_worker,
                        (kind, folder, facts, recipes or {}),
                    )
            except (OSError, ImportError) as error:  # no semaphores: /dev/shm is full or missing
                log.info(f"no worker processes ({error}); /dev/shm may be full or missing")

    def close(self) -> None:
        """End the workers without waiting for blocks that are no longer needed."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def encode(self, items: Iterator[Item]) -> Iterator[tuple[Work, Encoded, bool]]:
        """(work, its ids, whether they are its last) in order; little is in flight at once."""
        pending: deque[tuple[Item, concurrent.futures.Future[Encoded] | None]] = deque()
        for item in items:
            work = item[1]
            if isinstance(work, Block) and work.is_run:
                # It is held whole in memory: finish all others first.
                while pending:
                    yield self._collect(*pending.popleft())
                del item  # the block alone holds its text
                for encoded, is_last in encode_run(work, self._tokenizer):
                    yield work, encoded, is_last
                continue
            is_cheap = isinstance(work, (TokenBlock, DroppedRow))
            pending.append((item, None if is_cheap else self._submit(item)))
            if len(pending) > 2 * self._n_workers:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def _submit(self, item: Item) -> concurrent.futures.Future[Encoded] | None:
        if self._pool is not None:
            try:
                with shield_children():  # the pool starts its processes as it needs them
                    return self._pool.submit(_encode_in_worker, item)
            except (BrokenProcessPool, OSError):  # the latter: no process could be started
                self._continue_without_workers()
        return None

    def _collect(
        self, item: Item, future: concurrent.futures.Future[Encoded] | None
    ) -> tuple[Work, Encoded, bool]:
        if future is not None:
            try:
                return item[1], future.result(), True
            except BrokenProcessPool:
                self._continue_without_workers()
        return item[1], self._encoder.encode(item), True

    def _continue_without_workers(self) -> None:
        if self._pool is not None:
            log.info(
                "a tokenising process was lost (out of memory, or killed?); "
                "continuing without worker processes"
            )
            self.close()
