"""Documents to blocks of bounded size, cut only where the tokenizer allows it.

No torch: worker processes import this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from preflight.core.units import format_bytes
from preflight.corpus.sources import Document, changed_error, open_source, text_error

BLOCK_BYTES = 512 * 1024
MAX_RUN_BYTES = 208 * 2**20  # text without one place to cut is held whole up to this
CUT_CONTEXT_BYTES = 64  # what a tokenizer sees of the text that it has found no cut in before


@dataclass(frozen=True)
class Block:
    """Consecutive parts of documents, with the place of the first: document number and offset."""

    document: int
    offset: int
    parts: list[tuple[Any, bool]]  # text, whether its document ends there
    n_bytes: int
    is_run: bool = False  # its one part is a str without a place to cut, of any length


LastCut = Callable[[str], int]  # `Tokenizer.last_cut`


def read_blocks(
    documents: list[Document], document: int, offset: int, block_bytes: int, last_cut: LastCut
) -> Iterator[Block]:
    """Blocks of about `block_bytes` from the given place on.

    Raises:
        PreflightError: code TEXT when a source has changed or cannot be cut.
    """
    parts: list[tuple[bytes, bool]] = []
    size, place = 0, (document, offset)
    with contextlib.ExitStack() as opened:
        source, file = None, None
        for number in range(document, len(documents)):
            item = documents[number]
            if file is None or item.source is not source:
                opened.close()
                source, file = item.source, opened.enter_context(open_source(item.source))
            begin = item.begin + (offset if number == document else 0)
            for at, data, n_bytes, ends in _cut_document(item, file, begin, block_bytes, last_cut):
                if not parts or isinstance(data, str) or size + n_bytes > block_bytes:
                    if parts:
                        yield Block(*place, parts, size)
                    parts, size, place = [], 0, (number, at - item.begin)
                if isinstance(data, str):
                    yield Block(*place, [(data, ends)], n_bytes, True)
                else:
                    parts.append((data, ends))
                    size += n_bytes
    if parts:
        yield Block(*place, parts, size)


def _cut_document(
    document: Document, file: IO[bytes], begin: int, block_bytes: int, last_cut: LastCut
) -> Iterator[tuple[int, bytes | str, int, bool]]:
    """(offset in the file, text, its bytes, ends the document) for each part of a document.

    A part is bytes of at most `block_bytes`; one without a place to cut, of any length, is a str.
    """
    file.seek(begin)
    buffer, at = bytearray(), begin  # `at`: offset in the file of the buffer's first byte

    def fill(buffer: bytearray, size: int) -> None:
        wanted = max(0, min(size, document.end - at - len(buffer)))
        data = file.read(wanted)
        if len(data) < wanted:
            raise changed_error(document.source)
        buffer.extend(data)

    while at < document.end:
        fill(buffer, block_bytes - len(buffer))
        if at + len(buffer) == document.end and len(buffer) <= block_bytes:
            yield at, bytes(buffer), len(buffer), True
            return
        cut = _find_cut(buffer, 0, last_cut)
        is_run = cut == 0
        while cut == 0 and at + len(buffer) < document.end:
            seen = len(buffer)
            fill(buffer, block_bytes)
            if len(buffer) > MAX_RUN_BYTES:
                raise text_error(
                    document.source.path,
                    f"more than {format_bytes(MAX_RUN_BYTES)} without a place to cut, from byte "
                    f"{at:,} on",
                    "break the text into lines",
                )
            cut = _find_cut(buffer, max(seen - CUT_CONTEXT_BYTES, 0), last_cut)
        cut = cut or len(buffer)
        rest = buffer[cut:]
        del buffer[cut:]
        # A run is decoded here, so that its bytes and its text are held together only once.
        data = buffer.decode() if is_run else bytes(buffer)
        buffer = rest
        yield at, data, cut, at + cut == document.end
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
