"""Rows of CSV and TSV files, with the rules of Python's `csv` (its dialect "excel")."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from preflight.core.units import format_bytes
from preflight.corpus.sources import rows
from preflight.corpus.sources.columns import ColumnPath, Wanted, choose_column
from preflight.corpus.sources.compressed import open_stream
from preflight.corpus.sources.cutting import Cutter, Payload, RowForm, Splitter, row_error
from preflight.corpus.sources.encoding import read_head
from preflight.corpus.sources.protocol import Document, text_error
from preflight.corpus.sources.rows import Batch, Row

_DELIMITERS = ",;\t|"
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
_FIELD_LIMIT = 2**31 - 1  # of the csv module: 128 KiB unless it is raised


@dataclass(frozen=True)
class CsvParser:
    """Parses batches in a worker process.

    Attributes:
        path: of the file, for messages.
        delimiter: between the fields.
        n_columns, column: how many the header has, and which is the text.
        others: name and index of the columns that filters need.
    """

    path: str
    delimiter: str
    n_columns: int
    column: int
    others: tuple[tuple[str, int], ...] = ()

    def __call__(self, payload: Payload, first_row: int) -> Iterator[Row]:
        """The rows of a batch. A row of more fields than the header has no text.

        Raises:
            PreflightError: code TEXT, for what is no UTF-8 or no CSV.
        """
        offset, _, data = payload
        row = first_row
        try:
            for fields in read_fields(data.decode(), self.delimiter):
                yield self._build_row(fields)
                row += 1
        except UnicodeDecodeError as error:
            row += CsvSplitter(self.delimiter).find_ends(data[: error.start])[2]
            what = f"not UTF-8: byte 0x{data[error.start]:02x} at {offset + error.start:,}"
            raise row_error(self.path, row, offset, what) from None
        except csv.Error as error:
            raise row_error(self.path, row, offset, f"no CSV: {error}") from None

    def _build_row(self, fields: list[str]) -> Row:
        if not fields:
            return Row("")  # an empty line
        is_sound = self.column < len(fields) <= self.n_columns
        text = fields[self.column] if is_sound else None
        if not self.others:
            return Row(text)
        cells = ((name, _read_cell(fields[i])) for name, i in self.others if i < len(fields))
        return Row(text, {name: cell for name, cell in cells if cell is not None})


def read_fields(text: str, delimiter: str) -> Iterator[list[str]]:
    """The fields of each row; line breaks outside quotes are ``\\n`` or ``\\r\\n``."""
    csv.field_size_limit(_FIELD_LIMIT)
    return csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter)


def _read_cell(text: str) -> Any:
    """A number where it is one; None where it is empty or not finite."""
    try:
        number = float(text)
    except ValueError:
        return text or None
    return number if math.isfinite(number) else None


class CsvSplitter(Splitter):
    """Rows end at line breaks outside quotes; a quotation mark counts at a field's begin only."""

    def __init__(self, delimiter: str) -> None:
        self._opening = re.compile(rb'[\n%s]"' % re.escape(delimiter.encode()))
        self._is_quoted = False
        self._is_closing = False  # the last byte may close the field, or begin a doubled mark
        self._before = b"\n"  # the byte before the chunk, where that is outside quotes

    def find_ends(self, chunk: bytes) -> tuple[int, int, int]:
        """As of `Splitter`."""
        first = last = n_rows = at = 0
        while at < len(chunk):
            if self._is_quoted:
                at = self._pass_quoted(chunk, at)
                continue
            end, found = self._find_opening(chunk, at)
            n_new = chunk.count(b"\n", at, end)
            if n_new:
                first = first or chunk.find(b"\n", at) + 1
                last, n_rows = chunk.rfind(b"\n", at, end) + 1, n_rows + n_new
            at = end + found
            self._is_quoted = found
        if chunk and not self._is_quoted:
            self._before = chunk[-1:]
        return first, last, n_rows

    def _find_opening(self, chunk: bytes, at: int) -> tuple[int, bool]:
        """Where the next quoted field begins, at or behind `at`; or the chunk's end."""
        if at == 0 and chunk[:1] == b'"' and self._opening.match(self._before + b'"'):
            return 0, True
        # A field closes before `at`, so that the byte before it opens none.
        match = self._opening.search(chunk, at)
        return (match.end() - 1, True) if match else (len(chunk), False)

    def _pass_quoted(self, chunk: bytes, at: int) -> int:
        """Go behind the closing mark, or to the chunk's end."""
        if not self._is_closing:
            at = chunk.find(b'"', at)
            if at < 0:
                return len(chunk)
            at += 1
            self._is_closing = True
        if at < len(chunk):
            self._is_closing = False
            if chunk[at] == 0x22:  # doubled: within the field
                return at + 1
            self._is_quoted = False
            self._before = b'"'
        return at

    def check_end(self) -> None:
        """As of `Splitter`."""
        if self._is_quoted and not self._is_closing:
            raise ValueError("a quoted field that begins in this row has no end")


def _read_long(
    path: Path, delimiter: str, column: int, chunks: Iterator[bytes], row: int, offset: int
) -> Document:
    """The text of a row that is too large for memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in read_one_field(chunks, delimiter, column):
            decoder.decode(piece)
            yield piece
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{error.object[error.start]:02x} in its text"
        raise row_error(path, row, offset, what) from None
    except ValueError as error:
        raise row_error(path, row, offset, str(error)) from None


def read_one_field(chunks: Iterator[bytes], delimiter: str, column: int) -> Iterator[bytes]:
    """The field at index `column` of one row, in pieces.

    Raises:
        ValueError: a quoted field has no end.
    """
    plain = re.compile(rb"[^\n%s]*+" % re.escape(delimiter.encode()))
    index, data, at = 0, b"", 0
    is_at_begin, is_quoted = True, False
    while True:
        # The last mark or \r of a chunk means what the next chunk says.
        if at >= len(data) - (data[at:] == (b'"' if is_quoted else b"\r")):
            more = next(chunks, None)
            if more is not None:
                data, at = data[at:] + more, 0
                continue
            if is_quoted and at >= len(data):
                raise ValueError("a quoted field that begins in this row has no end")
            return
        if is_at_begin and data[at] == 0x22:
            at, is_quoted, is_at_begin = at + 1, True, False
            continue
        if is_quoted:
            end = data.find(b'"', at)
            if end == at:  # doubled, or the closing one
                is_quoted = data[at + 1] == 0x22
                piece, at = b'"' * is_quoted, at + 1 + is_quoted
            else:
                end = end if end >= 0 else len(data)
                piece, at = data[at:end], end
        else:
            end = plain.match(data, at).end()  # type: ignore[union-attr]
            is_at_begin = end < len(data)
            piece, at = data[at:end], end + is_at_begin
            if is_at_begin and data[end] == 0x0A:
                if index == column:
                    yield piece.removesuffix(b"\r")
                return
            if piece[-1:] == b"\r" and not is_at_begin:
                piece, at = piece[:-1], at - 1
        if piece and index == column:
            yield piece
        if not is_quoted and is_at_begin:
            index += 1


def examine_csv(path: Path, wanted: Wanted, delimiter: str | None) -> RowForm:
    """How a CSV file is read.

    Args:
        path: the file.
        wanted: the columns.
        delimiter: None: the one that the header has most of.

    Raises:
        PreflightError: code TEXT, when it is none, or its header has no such column.
    """
    with open_stream(path) as reader:
        head = read_head(reader)
    mark = len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)
    if delimiter is None:
        line = _QUOTED.sub(b"", head[mark:]).split(b"\n")[0].decode("latin-1")
        delimiter = max(_DELIMITERS, key=line.count)
    names, size = _read_header(path, mark, delimiter)
    found: dict[ColumnPath, bool] = {(name,): True for name in names}
    chosen = choose_column(path, wanted, found)
    column = names.index(chosen.path[0])
    others = tuple((name, names.index(name)) for name in wanted.columns if name in names)
    return RowForm(
        mark + size,
        partial(CsvSplitter, delimiter),
        CsvParser(str(path), delimiter, len(names), column, others),
        partial(_read_long, path, delimiter, column),
        chosen.notes,
    )


def _read_header(path: Path, begin: int, delimiter: str) -> tuple[list[str], int]:
    """The names of the columns, and how many bytes the header has."""
    with open_stream(path, [0, 0, begin]) as reader:
        first = next(Cutter(reader, CsvSplitter(delimiter), lambda *_: iter(())).cut(), None)
    if first is None:
        raise text_error(path, "empty: a table begins with the names of its columns")
    if not isinstance(first, Batch):
        limit = format_bytes(rows.MAX_ROW_BYTES)
        raise text_error(path, f"its header has more than {limit}")
    data: bytes = first.payload[2]
    try:
        splitter, size = CsvSplitter(delimiter), 0
        size = splitter.find_ends(data)[0] or len(data)
        names = next(read_fields(data[:size].decode(), delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise text_error(path, f"its header is no CSV in UTF-8: {error}") from None
    return [name.strip() for name in names], size
