"""Documents and pieces of them to token ids, in any process. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from preflight.corpus.blocks import BLOCK_BYTES, Block
from preflight.corpus.reading import TokenBlock
from preflight.corpus.tally import Tally
from preflight.tokenization import Tokenizer


@dataclass(slots=True)
class RowCounts:
    """What goes with the documents of a batch of rows.

    Attributes:
        tally: of all rows of the batch.
        tried: documents that rules would drop that nobody asked for, by rule; "": those tried.
        rows: (N,) the row of each document.
        beginnings: of each document, where the parent counts what is kept.
        signatures: of each document, where duplicates are looked for.
    """

    tally: Tally
    tried: dict[str, int]
    rows: np.ndarray
    beginnings: list[str]
    signatures: list[bytes]


@dataclass(slots=True)
class Encoded:
    """The ids of consecutive pieces of text; mostly a piece is a whole document.

    Attributes:
        ids: of all pieces; those of a piece that ends a document end with the end-of-text id.
        lengths: (N,) tokens of each piece.
        n_bytes: (N,) bytes of UTF-8 of each piece.
        is_val: (N,) whether it is for validation.
        ends: (N,) whether it ends a document.
        counted: of rows.
    """

    ids: np.ndarray
    lengths: np.ndarray
    n_bytes: np.ndarray
    is_val: np.ndarray
    ends: np.ndarray
    counted: RowCounts | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, kept: np.ndarray) -> Encoded:
        """Only the pieces that (N,) `kept` marks, without what was counted."""
        if kept.all():
            return self
        ids = self.ids[np.repeat(kept, self.lengths)]
        lengths, n_bytes = self.lengths[kept], self.n_bytes[kept]
        return Encoded(ids, lengths, n_bytes, self.is_val[kept], self.ends[kept])

    def cut(self, begin: int, end: int) -> Encoded:
        """Pieces `begin` to `end`, without what was counted."""
        at = np.concatenate(([0], np.cumsum(self.lengths)))
        ids, inside = self.ids[at[begin] : at[end]], slice(begin, end)
        lengths, n_bytes = self.lengths[inside], self.n_bytes[inside]
        return Encoded(ids, lengths, n_bytes, self.is_val[inside], self.ends[inside])

    def list_splits(self) -> Iterator[tuple[str, Encoded]]:
        """The pieces of each split, where there are any."""
        for split, mask in (("train", ~self.is_val), ("val", self.is_val)):
            if mask.any():
                yield split, self.take(mask)


class EncodedBuilder:
    """Collects pieces for an `Encoded`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._dtype = tokenizer.id_dtype
        self._end = np.array([tokenizer.end_of_text_id], self._dtype)
        self._ids: list[np.ndarray] = []
        self._facts: list[tuple[int, ...]] = []  # as rows of the arrays

    def add(self, ids: np.ndarray, n_bytes: int, *, is_val: bool, ends: bool) -> None:
        """Append a piece."""
        self._ids.append(ids.astype(self._dtype, copy=False))
        if ends:
            self._ids.append(self._end)
        self._facts.append((len(ids) + ends, n_bytes, is_val, ends))

    def build(self, counted: RowCounts | None = None) -> Encoded:
        """All pieces so far."""
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, self._dtype)
        lengths, n_bytes, is_val, ends = np.array(self._facts, np.int64).reshape(-1, 4).T
        return Encoded(ids, lengths, n_bytes, is_val.astype(bool), ends.astype(bool), counted)


def encode_block(block: Block, tokenizer: Tokenizer) -> Encoded:
    """The pieces of a block that is no run."""
    builder = EncodedBuilder(tokenizer)
    for piece in block.pieces:
        ids = tokenizer.encode(str(piece.text, "utf-8"))
        builder.add(ids, piece.n_bytes, is_val=piece.split == "val", ends=piece.ends)
    return builder.build()


def encode_run(block: Block, tokenizer: Tokenizer) -> Iterator[tuple[Encoded, bool]]:
    """(ids, whether they are the last) of a piece without a place to cut, in several parts.

    It is taken out of the block: its text is held only as long as it is needed.
    """
    piece = block.pieces.pop()
    text, n_bytes, is_val, ends = piece.text, piece.n_bytes, piece.split == "val", piece.ends
    del piece
    for ids in tokenizer.encode_parts(text):
        builder = EncodedBuilder(tokenizer)
        builder.add(ids, 0, is_val=is_val, ends=False)
        yield builder.build(), False
    builder = EncodedBuilder(tokenizer)
    builder.add(np.empty(0, tokenizer.id_dtype), n_bytes, is_val=is_val, ends=ends)
    yield builder.build(), True


def encode_ids(block: TokenBlock, tokenizer: Tokenizer) -> Encoded:
    """Ids as they are. What they have of documents is counted by their end-of-text ids."""
    ids = block.ids.astype(tokenizer.id_dtype)
    ends = np.flatnonzero(ids == tokenizer.end_of_text_id) + 1
    bounds = np.unique(np.concatenate(([0], ends, [len(ids)])))
    n_pieces = len(bounds) - 1
    n_bytes = np.zeros(n_pieces, np.int64)
    n_bytes[-1] = block.text_bytes
    is_val = np.full(n_pieces, block.split == "val")
    return Encoded(ids, np.diff(bounds), n_bytes, is_val, np.isin(bounds[1:], ends))


def encode_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of one document that is held in memory, encoded in pieces where it is long."""
    if len(text) <= BLOCK_BYTES:
        return tokenizer.encode(text)
    found, begin = [], 0
    while begin < len(text):
        end = begin + BLOCK_BYTES
        cut = tokenizer.last_cut(text[begin:end]) if end < len(text) else len(text) - begin
        while not cut and end < len(text):  # a run: look further
            end += BLOCK_BYTES
            cut = tokenizer.last_cut(text[begin:end])
        piece = text[begin : begin + cut] if cut else text[begin:]
        parts = (
            tokenizer.encode_parts(piece) if len(piece) > BLOCK_BYTES else [tokenizer.encode(piece)]
        )
        found += list(parts)
        begin += len(piece)
    return np.concatenate(found)
