"""Rows of JSON: one on each line (JSON Lines), or the elements of one list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.core.errors import PreflightError
from preflight.corpus.sources.columns import (
    ColumnPath,
    collect_columns,
    look_up,
)
from preflight.corpus.sources.cutting import (
    Payload,
    Splitter,
    row_error,
)
from preflight.corpus.sources.json_stream import JsonFault, JsonStream, read_text
from preflight.corpus.sources.protocol import Document
from preflight.corpus.sources.rows import Row

_SPACES = " \t\r\n"
_SPACE = re.compile(f"[{_SPACES}]*+")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder()


# ---- parsing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonParser:
    """Parses batches in a worker process.

    Attributes:
        path: of the file, for messages.
        keys: where the text is in a row; (): the row itself is the text.
        columns: the other columns that filters need.
        is_list: the rows are elements of a list, not lines.
    """

    path: str
    keys: ColumnPath
    columns: tuple[str, ...] = ()
    is_list: bool = False

    def __call__(self, payload: Payload, first_row: int) -> Iterator[Row]:
        """The rows of a batch; an empty line is a row with an empty text.

        Raises:
            PreflightError: code TEXT, for what is no JSON, and for half a surrogate pair.
        """
        offset, n_rows, data = payload
        may_have_halves = _HALF.search(data) is not None
        values = self.read_list if self.is_list else self.read_lines
        for row, at, value in values(offset, n_rows, data, first_row):
            yield self._build_row(value, row, at, may_have_halves)

    def _build_row(self, value: Any, row: int, at: int, may_have_halves: bool) -> Row:
        text = look_up(value, self.keys)
        if not isinstance(text, str):
            text = None
        elif may_have_halves and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = ascii(text[error.start])[1:-1]
                raise row_error(
                    self.path, row, at, f"half a surrogate pair ({half}) in the text: no UTF-8"
                ) from None
        return Row(text, collect_columns(value, self.columns)) if self.columns else Row(text)

    def read_lines(
        self, offset: int, n_rows: int, data: bytes, row: int
    ) -> Iterator[tuple[int, int, Any]]:
        """Number, byte and value of each line."""
        parse = _DECODER.raw_decode
        for line in data.removesuffix(b"\n").split(b"\n"):  # decoding line by line was the fastest
            try:
                text = line.decode()
                if text[:1] != "{":
                    text = text.strip(_SPACES)
                value, end = parse(text) if text else ("", 0)
                if end != len(text) and text[end:].strip(_SPACES):
                    raise json.JSONDecodeError("more after the value", text, end)
            except (ValueError, RecursionError) as error:
                raise self._explain(error, row, offset) from None
            # An empty line is an empty text, wherever the text is in other rows.
            yield row, offset, value if text else _nest("", self.keys)
            row += 1
            offset += len(line) + 1

    def read_list(
        self, offset: int, n_rows: int, data: bytes, row: int
    ) -> Iterator[tuple[int, int, Any]]:
        """Number, byte (of the first one) and value of each element."""
        try:
            text = data.decode().rstrip(_SPACES).removesuffix(",")
        except UnicodeDecodeError as error:
            raise self._explain(error, row, offset) from None
        try:
            values = json.loads(f"[{text}]")
            if len(values) != n_rows:
                raise ValueError("nothing between two commas")
        except (ValueError, RecursionError) as error:
            n_sound, at = _find_fault(text)
            if isinstance(error, json.JSONDecodeError):
                error.colno = error.pos - at  # in the element, from 1; "[" was added
            at = offset + len(text[:at].encode())
            raise self._explain(error, row + n_sound, at) from None
        for value in values:
            yield row, offset, value
            row += 1

    def _explain(self, error: Exception, row: int, offset: int) -> PreflightError:
        if isinstance(error, UnicodeDecodeError):
            what = f"not UTF-8: byte 0x{error.object[error.start]:02x} at {offset + error.start:,}"
        elif isinstance(error, RecursionError):
            what = "nested too deeply"
        elif isinstance(error, json.JSONDecodeError):
            what = f"no JSON: {error.msg}, at character {error.colno}"
        else:
            what = f"no JSON: {error}"
        return row_error(self.path, row, offset, what)


def _nest(value: Any, keys: ColumnPath) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _find_fault(text: str) -> tuple[int, int]:
    """How many elements of a list's inside are sound, and where the next one begins."""
    n_sound = at = 0
    try:
        while True:
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            end = _DECODER.raw_decode(text, at)[1]
            end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            if text[end : end + 1] != ",":
                return n_sound, at
            n_sound, at = n_sound + 1, end + 1
    except (ValueError, RecursionError):
        return n_sound, at


def read_long_text(
    path: Path, keys: ColumnPath, chunks: Iterator[bytes], row: int, offset: int
) -> Document:
    """The text of a row that is too large for memory."""
    stream = JsonStream(chunks, offset)
    try:
        for piece in read_text(stream, keys):
            yield piece.encode()
        if stream.peek() == b",":  # between the elements of a list
            stream.expect(b",")
        if stream.peek():
            raise stream.fail("more after the value")
    except JsonFault as error:
        raise row_error(path, row, offset, f"no JSON: {error}") from None


# ---- cutting ------------------------------------------------------------------------------------


class LineSplitter(Splitter):
    """Each line is a row."""

    def find_ends(self, chunk: bytes) -> tuple[int, int, int]:
        """As of `Splitter`."""
        return chunk.find(b"\n") + 1, chunk.rfind(b"\n") + 1, chunk.count(b"\n")


class ListSplitter(Splitter):
    """Each element of a JSON list is a row; it stands behind the opening bracket, or a comma."""

    _STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
    _MARK = re.compile(rb'["{}\[\],]')
    _NESTED_MARK = re.compile(rb'["{}\[\]]')

    def __init__(self, is_alone: bool = True) -> None:
        self._is_alone = is_alone  # the list is all that is in the file
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self._is_blank = True  # since the last comma
        self._is_passed = False  # the closing bracket, by `check_rest`

    def find_ends(self, chunk: bytes) -> tuple[int, int, int]:
        """As of `Splitter`."""
        first = last = n_rows = 0
        while (end := self._find_end(chunk, last)) is not None:
            is_blank = self._is_blank and not chunk[last:end].strip()
            if not (self.is_done and is_blank):  # behind the last comma, or an empty list
                first, last, n_rows = first if n_rows else end, end, n_rows + 1
            self._is_blank = True
            if self.is_done:
                return first, last, n_rows
        self._is_blank = self._is_blank and not chunk[last:].strip()
        return first, last, n_rows

    def _find_end(self, chunk: bytes, at: int) -> int | None:
        """Where the row ends that goes on at `at`; None: not in this chunk."""
        if self._is_escaped and chunk:
            at, self._is_escaped = 1, False
        while True:
            if self._is_in_string:
                at = self._STRING.match(chunk, at).end()  # type: ignore[union-attr]
                if at >= len(chunk) or chunk[at] != 0x22:
                    self._is_escaped = at < len(chunk)  # a backslash, the chunk's last byte
                    return None
                self._is_in_string = False
                at += 1
            match = (self._NESTED_MARK if self._depth else self._MARK).search(chunk, at)
            if match is None:
                return None
            at, mark = match.end(), match[0]
            if mark == b'"':
                self._is_in_string = True
            elif mark == b",":
                return at
            elif mark in b"{[":
                self._depth += 1
            elif self._depth:
                self._depth -= 1
            else:
                self.is_done = True
                return match.start()

    def check_end(self) -> None:
        """As of `Splitter`."""
        raise ValueError("cut off: the list of rows has no end")

    def check_rest(self, chunk: bytes) -> None:
        """As of `Splitter`."""
        if not self._is_passed:
            chunk, self._is_passed = chunk.lstrip().removeprefix(b"]"), True
        if self._is_alone and chunk.strip():
            raise ValueError("more behind the end of the list")
