"""Blocks of remote files, fetched in threads before they are asked for, within a memory budget.

A row group's column is cut into blocks, so that the memory is the same for row groups of any size,
and so that several connections work on one large row group.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")

BUDGET_BYTES = 96 * 2**20  # of all blocks that are fetched or held
_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, order=True)
class Block:
    """The bytes from `begin` to `end` of the file with that index."""

    file: int
    begin: int
    end: int


def choose_block_bytes(workers: int) -> int:
    """The size of a block, so that each of the workers' two fit into the budget."""
    return min(_BLOCK_BYTES, BUDGET_BYTES // (2 * workers))


def plan_group(file: int, group: Any, columns: list[int], block_bytes: int) -> list[Block]:
    """The blocks of a row group, in about the order in which a reader needs them.

    Args:
        file: the index of its file.
        group: a `pyarrow.parquet.RowGroupMetaData`.
        columns: the numbers of the columns that are read.
    """
    planned = []
    for number in columns:
        begin, size = find_chunk(group.column(number))
        for at in range(0, size, block_bytes):
            block = Block(file, begin + at, begin + min(at + block_bytes, size))
            planned.append((at / size, block))
    return [block for _, block in sorted(planned)]


def find_chunk(column: Any) -> tuple[int, int]:
    """The first byte of a column chunk, and its size, both as they are stored."""
    begin = column.data_page_offset
    if column.dictionary_page_offset is not None and column.has_dictionary_page:
        begin = min(begin, column.dictionary_page_offset)
    return begin, column.total_compressed_size


def start_thread(work: Callable[[], Result]) -> Future[Result]:
    """The result of `work`, done in a thread that does not keep the process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    return future


def wait_for(future: Future[Result], wait: Callable[[], None]) -> Result:
    """The result, or what its thread raised. `wait` is called again and again; it may raise."""
    while not futures.wait([future], timeout=0.2).done:
        wait()
    return future.result()


class ReadAhead:
    """Fetches the blocks of a plan in `workers` threads, in order, and hands out their bytes.

    Args:
        fetch: reads one block.
        plan: all blocks in order. It is taken from as far as the budget allows.
        wait: called while a block is awaited; it may raise.
    """

    def __init__(
        self,
        fetch: Callable[[Block], bytearray],
        plan: Iterator[Block],
        workers: int,
        wait: Callable[[], None],
    ) -> None:
        self._fetch, self._plan, self._workers, self._wait = fetch, plan, workers, wait
        self._held: OrderedDict[Block, Future[bytearray]] = OrderedDict()
        self._n_bytes = 0
        self._next: Block | None = None
        self.largest_bytes = 0  # that were held at once

    def close(self) -> None:
        """Fetch no more. Threads that still wait for the hub are left to end by themselves."""
        self._plan, self._next = iter(()), None
        self._held.clear()

    def top_up(self) -> None:
        """Start what the threads and the budget have room for."""
        while sum(not future.done() for future in self._held.values()) < self._workers:
            if self._next is None:
                self._next = next(self._plan, None)
            block = self._next
            if block is None:
                return
            if self._held and self._n_bytes + block.end - block.begin > BUDGET_BYTES:
                return
            self._next = None
            if block not in self._held:
                self._start(block)

    def _start(self, block: Block) -> Future[bytearray]:
        future = self._held[block] = start_thread(lambda: self._fetch(block))
        self._n_bytes += block.end - block.begin
        self.largest_bytes = max(self.largest_bytes, self._n_bytes)
        return future

    def find(self, file: int, at: int) -> Block | None:
        """The block that is planned or held with that byte; None for what no plan covers."""
        self.top_up()
        for block in self._held:
            if block.file == file and block.begin <= at < block.end:
                return block
        for _ in range(2 * self._workers):  # beyond the budget, since it is needed now
            if self._next is None or self._next.file != file:
                break
            block, self._next = self._next, next(self._plan, None)
            self._start(block)
            if block.begin <= at < block.end:
                return block
        return None

    def read(self, block: Block) -> bytearray:
        """The bytes of a block; raises what its fetch raised."""
        return wait_for(self._held[block], self._wait)

    def release(self, block: Block) -> None:
        """Forget a block whose last byte has been read."""
        if self._held.pop(block, None) is not None:
            self._n_bytes -= block.end - block.begin
            self.top_up()

    def release_until(self, file: int, end: int) -> None:
        """Forget what no reader has asked for, up to that byte of that file."""
        for block in [b for b in self._held if (b.file, b.end) <= (file, end)]:
            self.release(block)
