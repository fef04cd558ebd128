"""Files of chats: where their rows are, and each row as a chat.

Tables are cut and parsed by the readers of `preflight.corpus.sources`. Memory is bounded: one batch
of rows at a time, and no row above `MAX_ROW_BYTES`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.units import format_bytes
from preflight.corpus.chats.formats import (
    COLUMNS,
    FORMATS,
    ChatFault,
    ChatFormat,
    describe_row,
    find_format,
    read_messages,
    shorten,
)
from preflight.corpus.sources.compressed import strip_suffix
from preflight.corpus.sources.cutting import RowFile, RowForm, row_error
from preflight.corpus.sources.json_files import find_lines, find_list
from preflight.corpus.sources.json_rows import JsonParser
from preflight.corpus.sources.parquet import ParquetSource
from preflight.corpus.sources.parquet_layout import Layout, list_faults, open_parquet
from preflight.corpus.sources.parquet_layout import shorten as shorten_fault
from preflight.corpus.sources.protocol import Document, Source, text_error
from preflight.corpus.sources.rows import MAX_ROW_BYTES, Batch
from preflight.settings import DataSettings
from preflight.tokenization.chats import Chat

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_N_SHOWN_FAULTS = 3
_STEP_BYTES, _MAX_STEP_ROWS = 2**20, 256  # of a parquet file that are decoded at once, about


@dataclass(frozen=True, slots=True)
class ReadChat:
    """One row as a chat.

    Attributes:
        chat: its messages, up to the last answer.
        is_open: a message of the user without an answer was left out at its end.
        n_bytes: of the file, as it is stored, that were read since the row before.
    """

    chat: Chat
    is_open: bool
    n_bytes: int


class ChatFile(Source, Protocol):
    """A file of chats.

    Attributes:
        unit: what a row is called: ``line`` or ``row``.
    """

    unit: str

    @abstractmethod
    def read_rows(self) -> Iterator[tuple[int, Any, int]]:
        """Number from 1, parsed value, and stored bytes since the row before; `scan` comes first.

        Raises:
            PreflightError: code TEXT, for a damaged file.
        """


def open_chat_file(path: Path) -> ChatFile:
    """The file, by the end of its name; nothing is read yet.

    Raises:
        PreflightError: code TEXT, when the name is of no kind that can be read.
    """
    plain, packing = strip_suffix(path)
    suffix = plain.suffix.lower()
    if suffix not in SUFFIXES or (suffix == ".parquet" and packing):
        raise text_error(
            path,
            "not a file of chats by its name",
            "expected: .jsonl, .ndjson or .json, also with .gz, .bz2, .xz or .zst; or .parquet",
        )
    return ParquetChats(path) if suffix == ".parquet" else JsonChats(path)


def read_chats(file: ChatFile) -> Iterator[tuple[ChatFormat, ReadChat]]:
    """All chats of a file that was scanned, each with the file's form.

    Rows at fault are left out; they are told at the end, so that one reading shows all of them.

    Raises:
        PreflightError: code TEXT, when the file is damaged, holds no chat, or holds rows that are
            none; it names the first of them.
    """
    form: ChatFormat | None = None
    faults: list[str] = []
    n_rows = n_faults = 0
    for number, value, n_bytes in file.read_rows():
        n_rows += 1
        place = f"{file.unit} {number:,}"
        form = form or _detect(file, place, value)
        try:
            messages, is_open = read_messages(value, form)
        except ChatFault as fault:
            n_faults += 1
            if len(faults) < _N_SHOWN_FAULTS:
                faults.append(f"{place}: {fault}")
            continue
        yield form, ReadChat(Chat(messages, f"{file.name}, {place}"), is_open, n_bytes)
    if form is None:
        raise text_error(file.label, "holds no chat", "give a file with a chat in each row")
    if faults:
        raise text_error(
            file.label,
            *faults,
            f"{n_faults:,} of {n_rows:,} rows cannot be used; correct them, or leave them out",
        )


def _detect(file: ChatFile, place: str, value: Any) -> ChatFormat:
    """The form of a file by its first row; PreflightError (TEXT) for an unknown one."""
    form = find_format(value)
    if form is not None:
        return form
    raise text_error(
        file.label,
        f"{place} is not a chat of a known form: {describe_row(value)}",
        f"known are: {', '.join(form.name for form in FORMATS)}",
        f"such as {FORMATS[0].example}",
    )


# ---- JSON ---------------------------------------------------------------------------------------


class JsonChats(RowFile, ChatFile):
    """Chats as lines, or as the elements of a list; compressed or not."""

    unit = "line"

    def examine(self) -> RowForm:
        """As of `RowFile`."""
        is_json = strip_suffix(self.path)[0].suffix.lower() == ".json"
        place = find_list(self.path) if is_json else find_lines(self.path)
        self.unit = "row" if place.is_list else "line"
        self._parser = JsonParser(str(self.path), (), is_list=place.is_list)
        refuse = partial(_refuse_long, self.path)
        return RowForm(place.begin, place.splitter, self._parser, refuse, place.notes)

    def read_rows(self) -> Iterator[tuple[int, Any, int]]:
        """As of `ChatFile`; empty lines are no rows."""
        parser = self._parser
        read = parser.read_list if parser.is_list else parser.read_lines
        for batch in self.batches():
            assert isinstance(batch, Batch)  # long rows are refused
            n_bytes = batch.n_bytes
            offset, n_rows, data = batch.payload
            for row, _, value in read(offset, n_rows, data, batch.first_row):
                if value != "" or parser.is_list:
                    yield row + 1, value, n_bytes
                    n_bytes = 0


def _refuse_long(path: Path, chunks: Iterator[bytes], row: int, offset: int) -> Document:
    raise row_error(path, row, offset, *_explain_long())


def _explain_long() -> tuple[str, str]:
    return f"more than {format_bytes(MAX_ROW_BYTES)} in one chat", "split it, or leave it out"


# ---- parquet ------------------------------------------------------------------------------------


class ParquetChats(ParquetSource, ChatFile):
    """Chats as the rows of a parquet file; only the columns of known forms are read."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        super().__init__(path, DataSettings())

    def _read_layout(self, file: IO[bytes]) -> Layout:
        size = file.seek(0, 2)
        opened = open_parquet(file, size, self.label)
        names = opened.schema_arrow.names
        columns = tuple(name for name in COLUMNS if name in names)
        if not columns:
            shown = ", ".join(f'"{shorten(name)}"' for name in names[:8])
            raise text_error(
                self.label,
                f"no column of a chat; its columns: {shown or 'none'}",
                f"known are: {', '.join(COLUMNS)}",
            )
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        return Layout(
            self.label,
            size,
            columns[0],
            columns,
            tuple(group.num_rows for group in groups),
            tuple(group.total_byte_size for group in groups),
        )

    def read_rows(self) -> Iterator[tuple[int, Any, int]]:
        """As of `ChatFile`."""
        with self._open() as file:
            self._check_signature(file)
            layout = self._read_layout(file)
            opened = open_parquet(file, layout.size, self.label)
            row = 0
            for group, n_rows in enumerate(layout.rows):
                for value in self._decode(opened, layout, group):
                    yield row + 1, value, layout.measure_share(row, row + 1)
                    row += 1
                if row != layout.starts[group] + n_rows:
                    raise self._damage_error(group, row, "it has another number of rows")
                self._check_signature(file)

    def _decode(self, opened: Any, layout: Layout, group: int) -> Iterator[Any]:
        """The rows of a row group as Python values, a few at a time."""
        mean = layout.text_bytes[group] // max(layout.rows[group], 1)
        step = min(max(_STEP_BYTES // max(mean, 1), 1), _MAX_STEP_ROWS)
        row = layout.starts[group]
        try:
            for batch in opened.iter_batches(
                step, [group], columns=list(layout.columns), use_threads=False
            ):
                is_large = batch.nbytes > MAX_ROW_BYTES
                for begin in range(0, len(batch), 1 if is_large else len(batch)):
                    part = batch.slice(begin, 1) if is_large else batch
                    if is_large and part.nbytes > MAX_ROW_BYTES:
                        what, fix = _explain_long()
                        raise text_error(self.label, f"row {row + 1:,}: {what}", fix)
                    yield from part.to_pylist()
                    row += len(part)
        except PreflightError:
            raise
        except list_faults() as error:
            raise self._damage_error(group, row, shorten_fault(error)) from None

    def _damage_error(self, group: int, row: int, why: str) -> PreflightError:
        return PreflightError(
            ExitCode.TEXT,
            f"{self.label}: row group {group} is damaged behind row {row:,}: {why}",
            "copy or download the file again",
        )
