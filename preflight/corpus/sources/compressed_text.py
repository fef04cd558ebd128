"""Compressed text files: one document, or several with a separator. Read once, as a stream."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preflight.core.errors import PreflightError
from preflight.corpus.sources.compressed import open_stream
from preflight.corpus.sources.cutting import Payload, RowFile, RowForm, Splitter, row_error
from preflight.corpus.sources.encoding import read_head
from preflight.corpus.sources.protocol import Document
from preflight.corpus.sources.rows import Row

_MARK_NOTE = "a byte order mark at the beginning is left out"


class SeparatorSplitter(Splitter):
    """A row ends behind each separator; without one, the whole file is a row."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator
        self._before = b""  # the end of earlier chunks, in which a separator may have begun

    def find_ends(self, chunk: bytes) -> tuple[int, int, int]:
        """As of `Splitter`."""
        first = last = n_rows = 0
        if not self._separator:
            return first, last, n_rows
        data, at = self._before + chunk, 0
        while (found := data.find(self._separator, at)) >= 0:
            at = found + len(self._separator)
            last = at - len(self._before)
            first, n_rows = first or last, n_rows + 1
        self._before = data[max(at, len(data) - len(self._separator) + 1) :]
        return first, last, n_rows


@dataclass(frozen=True)
class TextParser:
    """Parses batches in a worker process.

    Attributes:
        path: of the file, for messages.
        separator: of the documents, or empty.
    """

    path: str
    separator: bytes

    def __call__(self, payload: Payload, first_row: int) -> Iterator[Row]:
        """The documents of a batch, without the separators.

        Raises:
            PreflightError: code TEXT, when one is not UTF-8.
        """
        offset, n_rows, data = payload
        parts = data.split(self.separator)[:n_rows] if self.separator else [data]
        for i, part in enumerate(parts):
            try:
                yield Row(part.decode())
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise _explain(self.path, first_row + i, offset, part[error.start], at) from None
            offset += len(part) + len(self.separator)


def _explain(path: Path | str, row: int, offset: int, byte: int, at: int) -> PreflightError:
    return row_error(
        path,
        row,
        offset,
        f"not UTF-8: byte 0x{byte:02x} at offset {at:,} of its plain text",
        "convert it with iconv, such as: iconv -f ISO-8859-1 -t UTF-8",
    )


def _read_long(
    path: Path, separator: bytes, chunks: Iterator[bytes], row: int, offset: int
) -> Document:
    """A document that is too large for memory; its bytes are checked, and given as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, at = b"", offset
    for chunk in chunks:
        data = held + chunk
        end = max(len(data) - len(separator), 0)
        held, data = data[end:], data[:end]
        yield _check_utf8(decoder, data, path, row, offset, at)
        at += len(data)
    data = held.removesuffix(separator)
    yield _check_utf8(decoder, data, path, row, offset, at, is_last=True)


def _check_utf8(
    decoder: codecs.IncrementalDecoder,
    data: bytes,
    path: Path,
    row: int,
    offset: int,
    at: int,
    is_last: bool = False,
) -> bytes:
    waiting = len(decoder.getstate()[0])
    try:
        decoder.decode(data, final=is_last)
    except UnicodeDecodeError as error:
        place = at - waiting + error.start
        raise _explain(path, row, offset, error.object[error.start], place) from None
    return data


class CompressedText(RowFile):
    """A compressed file of UTF-8; a separator splits it into documents."""

    def __init__(
        self,
        path: Path,
        separator: str | None,
        name: str | None = None,
        *,
        is_skippable: bool = False,
    ) -> None:
        super().__init__(path, name, is_skippable=is_skippable)
        self._separator = (separator or "").encode()

    def examine(self) -> RowForm:
        """As of `RowFile`."""
        with open_stream(self.path) as reader:
            has_mark = read_head(reader).startswith(codecs.BOM_UTF8)
        return RowForm(
            len(codecs.BOM_UTF8) * has_mark,
            partial(SeparatorSplitter, self._separator),
            TextParser(str(self.path), self._separator),
            partial(_read_long, self.path, self._separator),
            (_MARK_NOTE,) * has_mark,
        )
