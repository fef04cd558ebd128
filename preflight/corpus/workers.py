"""Blocks to token ids, in worker processes. No torch: workers stay light."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from preflight.core.log import log
from preflight.core.processes import end_with_parent, shield_children
from preflight.corpus.blocks import Block
from preflight.tokenization import Tokenizer

_worker_tokenizer: Tokenizer | None = None
_blocks_done = 0


def _start_worker(kind: type[Tokenizer], folder: Path, facts: dict[str, Any]) -> None:
    """Set a worker process up: it ends with its parent."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where `shield_children` has no effect
    end_with_parent()
    _worker_tokenizer = kind.load_saved(folder, facts)


def _encode_in_worker(texts: list[tuple[bytes, bool]]) -> bytes:
    global _blocks_done
    assert _worker_tokenizer is not None
    _blocks_done += 1
    if _blocks_done % 50 == 0:
        # glibc's heap fragments: it grew by 160 KB with each MB of text until it was trimmed.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
    return _encode_texts(texts, _worker_tokenizer).tobytes()


def _encode_texts(texts: list[tuple[bytes, bool]], tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the texts of a block, the end-of-text id after each that ends its part."""
    dtype = tokenizer.id_dtype
    pieces = []
    for data, ends in texts:
        pieces.append(tokenizer.encode(str(data, "utf-8")).astype(dtype))
        if ends:
            pieces.append(np.array([tokenizer.end_of_text_id], dtype))
    return np.concatenate(pieces)


def _is_importable(kind: type[Tokenizer]) -> bool:
    """Whether another process can import the tokenizer's class."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__ != "__main__" and getattr(module, kind.__qualname__, None) is kind


class Encoders:
    """Blocks to ids, in order: in worker processes, or in this process for small texts."""

    def __init__(self, tokenizer: Tokenizer, n_workers: int, folder: Path) -> None:
        """`folder`: where `tokenizer.save` has written its files."""
        self._tokenizer = tokenizer
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
                self._pool = concurrent.futures.ProcessPoolExecutor(
                    n_workers,
                    multiprocessing.get_context("spawn"),
                    _start_worker,
                    (kind, folder, facts),
                )
            except (OSError, ImportError) as error:  # no semaphores: /dev/shm is full or missing
                log.info(f"no worker processes ({error}); /dev/shm may be full or missing")

    def close(self) -> None:
        """End the workers without waiting for blocks that are no longer needed."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, np.ndarray, bool]]:
        """(block, ids, whether these are its last) in order; few blocks are in flight at once."""
        pending: deque[tuple[Block, concurrent.futures.Future[bytes] | None]] = deque()
        for block in blocks:
            if block.is_run:  # it is held whole in memory: finish all other blocks first
                while pending:
                    yield self._collect(*pending.popleft())
                yield from self._encode_run(block)
                continue
            pending.append((block, self._submit(block)))
            if len(pending) > 2 * self._n_workers:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def _submit(self, block: Block) -> concurrent.futures.Future[bytes] | None:
        if self._pool is not None:
            try:
                with shield_children():  # the pool starts its processes as it needs them
                    return self._pool.submit(_encode_in_worker, block.texts)
            except (BrokenProcessPool, OSError):  # the latter: no process could be started
                self._continue_without_workers()
        return None

    def _collect(
        self, block: Block, future: concurrent.futures.Future[bytes] | None
    ) -> tuple[Block, np.ndarray, bool]:
        if future is not None:
            try:
                return block, np.frombuffer(future.result(), self._tokenizer.id_dtype), True
            except BrokenProcessPool:
                self._continue_without_workers()
        return block, _encode_texts(block.texts, self._tokenizer), True

    def _continue_without_workers(self) -> None:
        if self._pool is not None:
            log.info(
                "a tokenising process was lost (out of memory, or killed?); "
                "continuing without worker processes"
            )
            self.close()

    def _encode_run(self, block: Block) -> Iterator[tuple[Block, np.ndarray, bool]]:
        tokenizer = self._tokenizer
        text, ends = block.texts.pop()
        for ids in tokenizer.encode_parts(text):
            yield block, ids.astype(tokenizer.id_dtype), False
        yield block, np.array([tokenizer.end_of_text_id] if ends else [], tokenizer.id_dtype), True
