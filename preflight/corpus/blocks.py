"""Documents to blocks of bounded size, cut only where the tokenizer allows it.

No torch: worker processes import this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from preflight.core.units import format_bytes
from preflight.corpus.sources import Document, Source, text_error
from preflight.corpus.split import Part

BLOCK_BYTES = 512 * 1024
MAX_RUN_BYTES = 208 * 2**20  # text without one place to cut is held whole up to this
CUT_CONTEXT_BYTES = 64  # what a tokenizer sees of the text that it has found no cut in before


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a split, or a piece of one that is longer than a block.

    Attributes:
        text: UTF-8; a str where it has no place to cut.
        split: that of its document.
        n_bytes: of UTF-8.
        ends: whether its part ends there.
    """

    text: Any
    split: str
    n_bytes: int
    ends: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive pieces of text.

    Attributes:
        pieces: at least one.
        after: where reading continues: number of the part, and the offset in it. For a piece of a
            long row None, and for its last piece what the source says.
        is_run: its one piece has no place to cut, and any length.
        row: the number of a long row in its source.
    """

    pieces: list[Piece]
    after: Any
    is_run: bool = False
    row: int | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of UTF-8."""
        return sum(piece.n_bytes for piece in self.pieces)


LastCut = Callable[[str], int]  # `Tokenizer.last_cut`


def read_blocks(
    parts: Iterator[Part],
    first: int,
    offset: int,
    block_bytes: int,
    last_cut: LastCut,
    max_run_bytes: int = MAX_RUN_BYTES,
) -> Iterator[Block]:
    """Blocks of about `block_bytes`.

    Text without a place to cut is held whole up to `max_run_bytes`.

    Args:
        parts: from number `first` on, the first of which is read from its byte `offset` on.

    Raises:
        PreflightError: code TEXT when a source has changed or cannot be cut.
    """
    pieces: list[Piece] = []
    size, after = 0, (first, offset)
    for number, part, begin, stream in _open_parts(parts, first, offset):
        for at, data, n_bytes, ends in cut_document(
            stream, begin, block_bytes, last_cut, max_run_bytes
        ):
            piece = Piece(data, part.split, n_bytes, ends)
            if pieces and (isinstance(data, str) or size + n_bytes > block_bytes):
                yield Block(pieces, after)
                pieces, size = [], 0
            after = (number + 1, 0) if ends else (number, at + n_bytes)
            if isinstance(data, str):
                yield Block([piece], after, is_run=True)
            else:
                pieces.append(piece)
                size += n_bytes
            del data, piece  # a run is large
    if pieces:
        yield Block(pieces, after)


def _open_parts(
    parts: Iterator[Part], first: int, offset: int
) -> Iterator[tuple[int, Part, int, ByteStream]]:
    """(number, part, offset, stream of its bytes from there) for each part."""
    source, documents, following = None, None, 0
    for number, part in enumerate(parts, first):
        if documents is None or part.source is not source or part.begin + offset:
            source, following = part.source, part.index
            documents = source.documents(part.index, part.begin + offset)
        document = None
        while following <= part.index:  # those between are of another split
            document, following = next(documents, None), following + 1
        if document is None:
            raise part.source.changed_error()
        stream = ByteStream(document, part.n_bytes - offset, part.source)
        yield number, part, offset, stream
        offset = 0


class ByteStream:
    """The first `left` bytes of a document's chunks, in pieces of any size; or all of them."""

    def __init__(self, chunks: Document, left: int | None, source: Source) -> None:
        self.source, self.left = source, sys.maxsize if left is None else left
        self._chunks, self._chunk = chunks, memoryview(b"")
        self._is_open_ended = left is None

    def read_into(self, buffer: bytearray, size: int) -> None:
        """Append the next `size` bytes to `buffer`, or all that are left.

        Raises:
            PreflightError: code TEXT when the document ends too early.
        """
        size = max(0, min(size, self.left))
        if not self._is_open_ended:
            self.left -= size
        while size > 0:
            if not self._chunk:
                chunk = next(self._chunks, None)
                if chunk is None and self._is_open_ended:
                    self.left = 0
                    return
                if chunk is None:
                    raise self.source.changed_error()
                self._chunk = memoryview(chunk)
            piece, self._chunk = self._chunk[:size], self._chunk[size:]
            buffer += piece
            size -= len(piece)


def cut_document(
    stream: ByteStream, begin: int, block_bytes: int, last_cut: LastCut, max_run_bytes: int
) -> Iterator[tuple[int, bytes | str, int, bool]]:
    """(offset, text, its bytes, whether it is the last) for each piece of a document.

    A piece is bytes of at most `block_bytes`; one without a place to cut, of any length, is a str.

    Args:
        stream: the document from its offset `begin` on.
    """
    buffer, at = bytearray(), begin  # `at`: offset of the buffer's first byte
    while buffer or stream.left:
        stream.read_into(buffer, block_bytes - len(buffer))
        if not stream.left and len(buffer) <= block_bytes:
            yield at, bytes(buffer), len(buffer), True
            return
        cut = _find_cut(buffer, 0, last_cut)
        is_run = cut == 0
        while cut == 0 and stream.left:
            seen = len(buffer)
            stream.read_into(buffer, block_bytes)
            if len(buffer) > max_run_bytes:
                raise text_error(
                    stream.source.label,
                    f"more than {format_bytes(max_run_bytes)} without a place to cut, from byte "
                    f"{at:,} on",
                    "break the text into lines"
                    if max_run_bytes == MAX_RUN_BYTES
                    else "this tokenizer encodes documents whole: --document-separator shares the "
                    "text out, and --tokenizer bpe needs no places",
                )
            cut = _find_cut(buffer, max(seen - CUT_CONTEXT_BYTES, 0), last_cut)
        cut = cut or len(buffer)
        rest = buffer[cut:]
        del buffer[cut:]
        # A run is decoded here, so that its bytes and its text are held together only once.
        data = buffer.decode() if is_run else bytes(buffer)
        buffer = rest
        yield at, data, cut, not (buffer or stream.left)
        del data
        at += cut


def _find_cut(buffer: bytearray, begin: int, last_cut: LastCut) -> int:
    """Bytes before the last place to cut behind `begin`, 0 when there is none.

    The buffer may end within a character.
    """
    for size in (128, 4096, len(buffer)):  # most texts have one near
        start = max(begin, len(buffer) - size)
        while start < len(buffer) and buffer[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        text = buffer[start:].decode("utf-8", "ignore")
        cut = last_cut(text)
        if cut:
            return start + len(text[:cut].encode())
    return 0
