"""Documents to blocks of bounded size, cut only where the tokenizer allows it.

No torch: worker processes import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from preflight.core.units import format_bytes
from preflight.corpus.sources import Document, Source, text_error
from preflight.corpus.split import Part

BLOCK_BYTES = 512 * 1024
MAX_RUN_BYTES = 208 * 2**20  # text without one place to cut is held whole up to this
CUT_CONTEXT_BYTES = 64  # what a tokenizer sees of the text that it has found no cut in before


@dataclass(frozen=True)
class Block:
    """Consecutive texts, with the place of the first: the number of its part and the offset in it.

    A text is a part of a split, or a piece of one that is longer than a block.
    """

    part: int
    offset: int
    texts: list[tuple[Any, bool]]  # UTF-8, whether its part ends there
    n_bytes: int
    is_run: bool = False  # its one text is a str without a place to cut, of any length


LastCut = Callable[[str], int]  # `Tokenizer.last_cut`


def read_blocks(
    parts: list[Part],
    first: int,
    offset: int,
    block_bytes: int,
    last_cut: LastCut,
    max_run_bytes: int = MAX_RUN_BYTES,
) -> Iterator[Block]:
    """Blocks of about `block_bytes`, from the given offset in part number `first` on.

    Text without a place to cut is held whole up to `max_run_bytes`.

    Raises:
        PreflightError: code TEXT when a source has changed or cannot be cut.
    """
    texts: list[tuple[bytes, bool]] = []
    size, place = 0, (first, offset)
    for number, begin, stream in _open_parts(parts, first, offset):
        for at, data, n_bytes, ends in _cut_document(
            stream, begin, block_bytes, last_cut, max_run_bytes
        ):
            if not texts or isinstance(data, str) or size + n_bytes > block_bytes:
                if texts:
                    yield Block(*place, texts, size)
                texts, size, place = [], 0, (number, at)
            if isinstance(data, str):
                yield Block(*place, [(data, ends)], n_bytes, True)
            else:
                texts.append((data, ends))
                size += n_bytes
    if texts:
        yield Block(*place, texts, size)


def _open_parts(
    parts: list[Part], first: int, offset: int
) -> Iterator[tuple[int, int, _ByteStream]]:
    """(number, offset, stream of its bytes from there) for each part from `first` on."""
    source, documents, following = None, None, 0
    for number, part in enumerate(parts[first:], first):
        if documents is None or part.source is not source or part.begin + offset:
            source, following = part.source, part.index
            documents = source.documents(part.index, part.begin + offset)
        document = None
        while following <= part.index:  # those between are of another split
            document, following = next(documents, None), following + 1
        if document is None:
            raise part.source.changed_error()
        yield number, offset, _ByteStream(part.source, document, part.n_bytes - offset)
        offset = 0


class _ByteStream:
    """The first `left` bytes of a document's chunks, in pieces of any size."""

    def __init__(self, source: Source, chunks: Document, left: int) -> None:
        self.source, self.left = source, left
        self._chunks, self._chunk = chunks, memoryview(b"")

    def read_into(self, buffer: bytearray, size: int) -> None:
        """Append the next `size` bytes to `buffer`, or all that are left.

        Raises:
            PreflightError: code TEXT when the document ends too early.
        """
        size = max(0, min(size, self.left))
        self.left -= size
        while size > 0:
            if not self._chunk:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise self.source.changed_error()
                self._chunk = memoryview(chunk)
            piece, self._chunk = self._chunk[:size], self._chunk[size:]
            buffer += piece
            size -= len(piece)


def _cut_document(
    stream: _ByteStream, begin: int, block_bytes: int, last_cut: LastCut, max_run_bytes: int
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
