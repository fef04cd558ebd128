"""Blocks to token ids, in worker processes. No torch: workers stay light."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from preflight.core.log import log
from preflight.core.processes import end_with_parent
from preflight.corpus.blocks import Block, encode_block, encode_run
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer

_worker_tokenizer: Tokenizer | None = None


_blocks_done = 0


def _start_worker(tokenizer_name: str) -> None:
    """Set a worker process up: deaf to Ctrl-C, which the parent handles; gone with its parent."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _worker_tokenizer = load_tokenizer(tokenizer_name)


def _encode_in_worker(parts: list[tuple[bytes, bool]]) -> bytes:
    global _blocks_done
    assert _worker_tokenizer is not None
    _blocks_done += 1
    if _blocks_done % 50 == 0:
        # glibc's heap frays: it grew by 160 KB with each MB of text until it was trimmed.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
    return _encode_parts(parts, _worker_tokenizer).tobytes()


def _encode_parts(parts: list[tuple[bytes, bool]], tokenizer: Tokenizer) -> np.ndarray:
    """Ids of parts of documents, the end-of-text id after each that ends one."""
    encoding, dtype = tokenizer.encoding, tokenizer.dtype
    pieces = []
    for data, ends_document in parts:
        text = str(data, "utf-8")
        try:
            pieces.append(encode_block(encoding, text).astype(dtype))
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in tiktoken's Rust is no Exception
            pieces += [ids.astype(dtype) for ids in encode_run(encoding, text)]
        if ends_document:
            pieces.append(np.array([tokenizer.end_of_text_id], dtype))
    return np.concatenate(pieces)


class Encoders:
    """Blocks in, ids out, in order: in worker processes, or here where they would not pay."""

    def __init__(self, tokenizer: Tokenizer, n_workers: int) -> None:
        self._tokenizer = tokenizer
        self._n_workers = n_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if n_workers:
            # By name: half a megabyte of vocabulary would not go into the pipe at once, and Python
            # waits forever for a worker that dies before it has read all.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                n_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.name,)
            )

    def close(self) -> None:
        """End the workers without waiting for blocks that nobody wants any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, np.ndarray, bool]]:
        """(block, ids, whether these are its last) in order; few blocks are in flight at once."""
        pending: deque[tuple[Block, concurrent.futures.Future[bytes] | None]] = deque()
        for block in blocks:
            if block.is_run:  # held whole: finish everything else first
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
                return self._pool.submit(_encode_in_worker, block.parts)
            except BrokenProcessPool:
                self._go_on_alone()
        return None

    def _collect(
        self, block: Block, future: concurrent.futures.Future[bytes] | None
    ) -> tuple[Block, np.ndarray, bool]:
        if future is not None:
            try:
                return block, np.frombuffer(future.result(), self._tokenizer.dtype), True
            except BrokenProcessPool:
                self._go_on_alone()
        return block, _encode_parts(block.parts, self._tokenizer), True

    def _go_on_alone(self) -> None:
        if self._pool is not None:
            log.info("a tokenising process was lost (out of memory, or killed?); going on without")
            self.close()

    def _encode_run(self, block: Block) -> Iterator[tuple[Block, np.ndarray, bool]]:
        tokenizer = self._tokenizer
        text, ends = block.parts.pop()
        for ids in encode_run(tokenizer.encoding, text):
            yield block, ids.astype(tokenizer.dtype), False
        yield block, np.array([tokenizer.end_of_text_id] if ends else [], tokenizer.dtype), True
