"""How a file of JSON is read: where its rows are, and which column is the text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preflight.corpus.sources.columns import ColumnPath, Wanted, choose_column, list_columns
from preflight.corpus.sources.compressed import open_stream
from preflight.corpus.sources.cutting import RowForm, Splitter, read_first_rows, row_error
from preflight.corpus.sources.encoding import read_head
from preflight.corpus.sources.json_rows import (
    JsonParser,
    LineSplitter,
    ListSplitter,
    read_long_text,
)
from preflight.corpus.sources.json_stream import JsonFault, JsonStream
from preflight.corpus.sources.protocol import Document, text_error


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of a file are.

    Attributes:
        begin: the offset of the plain byte at which the first row begins.
        splitter: builds what finds the rows' ends.
        notes: what a user should know.
    """

    begin: int
    splitter: Callable[[], Splitter]
    notes: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        """Whether the rows are elements of a list, not lines."""
        return self.splitter is not LineSplitter


def find_lines(path: Path, notes: tuple[str, ...] = ()) -> RowPlace:
    """Where the rows of a file of JSON Lines are.

    Raises:
        PreflightError: code TEXT, when its beginning is none.
    """
    with open_stream(path) as reader:
        begin = len(codecs.BOM_UTF8) * read_head(reader).startswith(codecs.BOM_UTF8)
    return RowPlace(begin, LineSplitter, notes)


def find_list(path: Path) -> RowPlace:
    """Where the rows of a ``.json`` file are: in a list, in an object with one list, or lines.

    Raises:
        PreflightError: code TEXT, when it is none of them.
    """
    with open_stream(path) as reader:
        has_mark = read_head(reader).startswith(codecs.BOM_UTF8)
    mark = len(codecs.BOM_UTF8) * has_mark
    with open_stream(path, [0, 0, mark]) as reader:
        stream = JsonStream(iter(partial(reader.read, 2**18), b""), mark)
        try:
            byte = stream.peek()
            if byte == b"[":
                stream.expect(b"[")
                return RowPlace(stream.offset, ListSplitter)
            if byte == b"{":
                lists, kinds = _find_lists(stream)
                if stream.peek() == b"{":
                    return find_lines(path, ("its rows are lines (JSON Lines)",))
                key, begin = _choose_list(path, lists, kinds)
                return RowPlace(begin, partial(ListSplitter, False), (f'rows: the list "{key}"',))
        except JsonFault as error:
            raise text_error(path, f"no JSON: {error}") from None
    found = {b"": "nothing", b'"': "a string"}.get(byte, f"{byte.decode('latin-1')!a} ...")
    raise text_error(path, f"a list of rows was expected; it holds {found}")


def examine_lines(path: Path, wanted: Wanted) -> RowForm:
    """How a file of JSON Lines is read.

    Raises:
        PreflightError: code TEXT, when its beginning is none, or has no such column.
    """
    return _examine(path, wanted, find_lines(path))


def examine_list(path: Path, wanted: Wanted) -> RowForm:
    """How a ``.json`` file is read, see `find_list`.

    Raises:
        PreflightError: code TEXT, when it is no such file, or has no such column.
    """
    return _examine(path, wanted, find_list(path))


def _examine(path: Path, wanted: Wanted, place: RowPlace) -> RowForm:
    """The form by the first rows, once it is known where they begin and what splits them."""
    found: dict[ColumnPath, bool] = {}
    collect = partial(_collect_keys, path, found)
    payload = read_first_rows(path, place.begin, place.splitter(), collect)
    probe = JsonParser(str(path), (), is_list=place.is_list)
    read = probe.read_list if place.is_list else probe.read_lines
    values = [value for _, _, value in read(*payload, 0)] if payload[1] else []
    found |= list_columns(values)
    n_strings = found.pop((), False) + sum(isinstance(v, str) and v != "" for v in values)
    if not found and not n_strings:
        raise text_error(path, "no row with a text", "each row is an object, or a string")
    keys: ColumnPath = ()
    notes = place.notes
    is_mostly_strings = n_strings > sum(isinstance(value, dict) for value in values)
    if not is_mostly_strings or wanted.text_column is not None:
        chosen = choose_column(path, wanted, found)
        keys, notes = chosen.path, notes + chosen.notes
    return RowForm(
        place.begin,
        place.splitter,
        JsonParser(str(path), keys, wanted.columns, place.is_list),
        partial(read_long_text, path, keys),
        notes,
    )


def _collect_keys(
    path: Path, found: dict[ColumnPath, bool], chunks: Iterator[bytes], row: int, offset: int
) -> Document:
    """Put a long row's keys into `found`, and whether each holds a string; (): the row itself."""
    stream = JsonStream(chunks, offset)
    try:
        byte = stream.peek()
        if byte == b"{":
            _note_keys(stream, (), found)
        elif byte == b'"':
            found[()] = True
    except JsonFault as error:
        raise row_error(path, row, offset, f"no JSON: {error}") from None
    yield from ()


def _note_keys(stream: JsonStream, above: ColumnPath, found: dict[ColumnPath, bool]) -> None:
    for key in stream.read_keys():
        byte = stream.peek()
        found[(*above, key)] = byte == b'"'
        if byte == b"{" and len(above) < 2:
            _note_keys(stream, (*above, key), found)
        else:
            stream.skip_value()


def _find_lists(stream: JsonStream) -> tuple[dict[str, tuple[bytes, int]], dict[str, str]]:
    """Pass an object: its lists, by key: how the first element and where it begins; all kinds."""
    names = {b"{": "an object", b"[": "a list", b'"': "a string"}
    lists, kinds = {}, {}
    for key in stream.read_keys():
        byte = stream.peek()
        kinds[key] = names.get(byte, "a number or word")
        if byte == b"[":
            stream.expect(b"[")
            lists[key] = (stream.peek(), stream.offset)
            stream.skip_nested()
        else:
            stream.skip_value()
    return lists, kinds


def _choose_list(
    path: Path, lists: dict[str, tuple[bytes, int]], kinds: dict[str, str]
) -> tuple[str, int]:
    """Key and beginning of the only list of objects, or else of strings."""
    for byte in (b"{", b'"'):
        chosen = [(key, at) for key, (begins_with, at) in lists.items() if begins_with == byte]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            break
    found = ", ".join(f'"{key}" ({kind})' for key, kind in list(kinds.items())[:20])
    raise text_error(
        path,
        "an object with one list of rows was expected" if kinds else "an empty object, no rows",
        f"its keys: {found or 'none'}",
        "a list of rows, or one row on each line (.jsonl), can be read",
    )
