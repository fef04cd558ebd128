"""What is read, in order: texts by blocks, rows by batches, arrays by ids."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from preflight.corpus.blocks import Block, ByteStream, Piece, cut_document, read_blocks
from preflight.corpus.sources.rows import Batch, LongRow, RowSource
from preflight.corpus.sources.token_arrays import TokenArray, count_text_bytes
from preflight.corpus.split import TextSplit
from preflight.tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is dropped without being parsed."""

    row: int
    reason: str
    after: Any
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Ids that need no encoding."""

    ids: np.ndarray
    text_bytes: int
    split: str
    after: Any
    n_bytes: int


Work = Block | Batch | DroppedRow | TokenBlock


class Reader(Protocol):
    """Something that is read from a place on, in bounded pieces.

    Attributes:
        name: the source's name, see `Source`.
        label: how messages call it.
        n_bytes: of all that is to be read, as it is stored.
    """

    name: str
    label: str
    n_bytes: int

    @abstractmethod
    def read(self, after: Any) -> Iterator[Work]:
        """What comes behind the place that an earlier work called `after`; None: everything."""


class TextReader(Reader):
    """All texts whose documents are known before they are read."""

    def __init__(self, split: TextSplit, tokenizer: Tokenizer, block_bytes: int) -> None:
        self.split = split
        self.n_bytes = split.count_bytes("train", "val")
        self.name = self.label = "text"
        self._tokenizer, self._block_bytes = tokenizer, block_bytes

    def read(self, after: Any) -> Iterator[Work]:
        """Blocks of text."""
        number, offset = after or (0, 0)
        yield from read_blocks(
            self.split.list_parts(number),
            number,
            offset,
            self._block_bytes,
            self._tokenizer.last_cut,
            self._tokenizer.max_unit_bytes,
        )


class RowReader(Reader):
    """One source of rows."""

    def __init__(
        self,
        source: RowSource,
        n_bytes: int,
        tokenizer: Tokenizer,
        block_bytes: int,
        limit: int | None,
        *,
        drops_long: bool,
        is_val: Any,
    ) -> None:
        """`drops_long`: rows that are too long to be cleaned and filtered are dropped."""
        self.source, self.n_bytes = source, n_bytes
        self.name, self.label = source.name, source.label
        self._tokenizer, self._block_bytes, self._limit = tokenizer, block_bytes, limit
        self._drops_long, self._is_val = drops_long, is_val

    def read(self, after: Any) -> Iterator[Work]:
        """Batches, and long rows in blocks."""
        for item in self.source.batches(after):
            row = item.first_row if isinstance(item, Batch) else item.row
            if self._limit is not None and row >= self._limit:
                return
            if isinstance(item, Batch):
                yield item
            elif self._drops_long:
                for _ in item.document:
                    pass
                yield DroppedRow(row, "too long to be cleaned or filtered", item.after, 0)
            else:
                yield from self._cut(item)

    def _cut(self, item: LongRow) -> Iterator[Block]:
        split = "val" if self._is_val(item.row) else "train"
        pieces = cut_document(
            ByteStream(item.document, None, self.source),
            0,
            self._block_bytes,
            self._tokenizer.last_cut,
            self._tokenizer.max_unit_bytes,
        )
        for _, data, n_bytes, ends in pieces:
            piece, after = Piece(data, split, n_bytes, ends), item.after if ends else None
            yield Block([piece], after, is_run=isinstance(data, str), row=item.row)
            del data, piece


class TokenReader(Reader):
    """One array of ids."""

    def __init__(self, array: TokenArray, tokenizer: Tokenizer, val_split: float) -> None:
        self.array, self.name, self.label = array, array.name, array.label
        self.n_bytes = array.n_tokens * tokenizer.id_dtype.itemsize
        self._tokenizer = tokenizer
        n_val = {"train": 0, "val": array.n_tokens, None: round(array.n_tokens * val_split)}
        self._first_val = array.n_tokens - n_val[array.split]

    def read(self, after: Any) -> Iterator[Work]:
        """Ids in blocks, of which none is of two splits."""
        at, sizes = after or 0, count_text_bytes(self._tokenizer)
        for ids in self.array.read(at):
            self.array.check_ids(ids, self._tokenizer.vocab_size, at)
            for piece in np.split(ids, [self._first_val - at] if at < self._first_val else []):
                split = "val" if at >= self._first_val else "train"
                at += len(piece)
                if len(piece):
                    n_bytes = len(piece) * self._tokenizer.id_dtype.itemsize
                    yield TokenBlock(piece, int(sizes[piece].sum()), split, at, n_bytes)


def count_few_rows(source: RowSource, enough: int) -> int | None:
    """The number of rows, where they are fewer than `enough`."""
    n_rows = 0
    for item in source.batches():
        if isinstance(item, LongRow):
            for _ in item.document:
                pass
            n_rows = item.row + 1
        else:
            rows = source.parse(item.payload, item.first_row)
            n_rows = item.first_row + sum(1 for _ in itertools.islice(rows, enough))
        if n_rows >= enough:
            return None
    return n_rows
