"""Files of rows, cut into batches in bounded memory without parsing them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from preflight.core.errors import PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources import rows
from preflight.corpus.sources.compressed import PlainReader, open_stream
from preflight.corpus.sources.protocol import Document, SourceFacts, text_error
from preflight.corpus.sources.rows import Batch, LongRow, Parser, RowSource, build_row_facts
from preflight.corpus.sources.stored import StoredFile, hash_stored_file

HEAD_BYTES = 2**20  # of rows that are looked at to find the columns

# What a batch holds: the offset of its first plain byte, its number of rows, and its plain bytes.
Payload = tuple[int, int, bytes]
# (chunks of one long row, its number, the offset of its first plain byte) -> its text.
LongReader = Callable[[Iterator[bytes], int, int], Document]


class Splitter(Protocol):
    """Finds where rows end while the bytes of a file go by.

    Attributes:
        is_done: whether the last row has ended, although bytes may follow.
    """

    is_done: bool = False

    @abstractmethod
    def find_ends(self, chunk: bytes) -> tuple[int, int, int]:
        """Where in the next chunk the first and the last row end, and how many end there.

        An end lies behind the separator. Without any end: three zeros.
        """

    def check_end(self) -> None:
        """Called at the end of the file.

        Raises:
            ValueError: it lacks something.
        """
        return

    def check_rest(self, chunk: bytes) -> None:
        """Called with what follows the last row when `is_done`.

        Raises:
            ValueError: it should not be there.
        """
        return


@dataclass(frozen=True)
class RowForm:
    """How the rows of one file are read.

    Attributes:
        begin: the offset of the plain byte at which the first row begins.
        build_splitter: a new splitter that stands before a row.
        parse: reads a batch's payload in a worker process.
        read_long: reads the text of a row above `MAX_ROW_BYTES`.
        notes: what a user should know of the file.
    """

    begin: int
    build_splitter: Callable[[], Splitter]
    parse: Parser
    read_long: LongReader
    notes: tuple[str, ...] = ()


def row_error(path: Path | str, row: int, offset: int, what: str, *more: str) -> PreflightError:
    """The error to raise for a row, by its number from 0 and the plain offset of its first byte."""
    return text_error(path, f"row {row + 1:,} (at byte {offset:,}): {what}", *more)


class RowFile(RowSource):
    """Rows in a file, compressed or not."""

    def __init__(self, path: Path, name: str | None = None, *, is_skippable: bool = False) -> None:
        self.path = path
        self.name, self.label = name or path.name, str(path)
        self.is_skippable = is_skippable
        self._stored: StoredFile | None = None
        self._form: RowForm | None = None

    @abstractmethod
    def examine(self) -> RowForm:
        """Look at the beginning of the file.

        Raises:
            PreflightError: code TEXT, when it is not of this kind, or has no such column.
        """

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Hash the file as it is stored, and look at its beginning.

        Raises:
            PreflightError: code TEXT; FLAGS for a missing library; SIGINT or SIGTERM.
        """
        self._form = self.examine()
        self.parse = self._form.parse
        self._stored = hash_stored_file(self.path, stop)
        return build_row_facts(self._stored.size, self._stored.sha256, *self._form.notes)

    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        """As of `RowSource`; `scan` comes first.

        Raises:
            PreflightError: code TEXT.
        """
        assert self._form is not None  # `scan` comes first
        assert self._stored is not None
        state = after or {"row": 0, "skip": 0, "position": [0, 0, self._form.begin]}
        with open_stream(self.path, state["position"]) as reader:
            self._stored.check_unchanged(reader)
            cutter = Cutter(reader, self._form.build_splitter(), self._form.read_long, state["row"])
            yield from cutter.cut(bool(state["skip"]))
            self._stored.check_unchanged(reader)


class Cutter:
    """Cuts the rest of an open file into batches.

    A row is long by its own length alone, so that the same rows are long however they are cut.
    """

    def __init__(
        self,
        reader: PlainReader,
        splitter: Splitter,
        read_long: LongReader,
        row: int = 0,
        batch_bytes: int | None = None,
    ) -> None:
        self._reader, self._splitter, self._read_long = reader, splitter, read_long
        self._batch_bytes = min(batch_bytes or rows.BATCH_BYTES, rows.MAX_ROW_BYTES)
        self._row = row  # the first that was not given yet, and where it begins
        self._at = reader.plain_offset
        self._told = reader.stored_offset if row else 0
        self._carried: list[bytes] = []  # its bytes in earlier chunks
        self._chunk = b""
        self._begin = self._first = self._last = self._n_rows = 0  # in the chunk

    def cut(self, skip_one: bool = False) -> Iterator[Batch | LongRow]:
        """All rows that follow, or with `skip_one` those behind the first."""
        if skip_one:
            for _ in self._read_row():
                pass
            yield from self._cut_chunk()
        while not self._splitter.is_done and self._read_chunk():
            yield from self._cut_chunk()
        try:
            if self._splitter.is_done:
                self._check_rest()
            else:
                self._splitter.check_end()
        except ValueError as error:
            raise row_error(self._reader.path, self._row, self._at, str(error)) from None
        if self._carried and not self._splitter.is_done:
            yield self._build_batch(b"".join(self._carried), 1)

    def _read_chunk(self) -> bool:
        parts, size = [], 0
        while size < self._batch_bytes and (data := self._reader.read(self._batch_bytes - size)):
            parts.append(data)
            size += len(data)
        self._chunk, self._begin = b"".join(parts), 0
        self._first, self._last, self._n_rows = self._splitter.find_ends(self._chunk)
        return bool(parts)

    def _cut_chunk(self) -> Iterator[Batch | LongRow]:
        """The rows that end in the chunk; what is left of it is carried."""
        size = sum(map(len, self._carried))
        if size + (self._first if self._n_rows else len(self._chunk)) > rows.MAX_ROW_BYTES:
            yield from self._cut_long()
        if self._n_rows:
            data = self._chunk[self._begin : self._last]
            self._begin = self._last
            yield self._build_batch(b"".join([*self._carried, data]), self._n_rows)
            self._carried = []
        if self._begin < len(self._chunk):
            self._carried.append(self._chunk[self._begin :])

    def _build_batch(self, data: bytes, n_rows: int) -> Batch:
        payload: Payload = (self._at, n_rows, data)
        row = self._row
        self._row += n_rows
        self._at += len(data)
        return Batch(payload, row, self._describe(self._at), self._count_stored())

    def _describe(self, at: int, skip: int = 0) -> dict[str, Any]:
        return {"row": self._row, "skip": skip, "position": self._reader.position_at(at)}

    def _count_stored(self) -> int:
        """Bytes of the file that were read since the last call."""
        before, self._told = self._told, self._reader.stored_offset
        return self._told - before

    def _cut_long(self) -> Iterator[LongRow]:
        """One row. Where it ends is not known yet: `after` is its beginning, to be skipped."""
        after, sizes = self._describe(self._at, skip=1), []
        chunks = self._read_row(lambda: sizes.append(self._count_stored()))
        document = self._read_long(chunks, self._row, self._at)
        yield LongRow(document, self._row, after, lambda: sum(sizes))
        for _ in chunks:  # what its reader left
            pass

    def _read_row(self, note_end: Callable[[], object] | None = None) -> Iterator[bytes]:
        """The bytes of the row at which the cutter stands; then it stands behind that row."""
        while self._carried:
            part = self._carried.pop(0)
            self._at += len(part)
            yield part
        while not self._n_rows:
            self._at += len(self._chunk)
            yield self._chunk
            if self._splitter.is_done or not self._read_chunk():
                break
        else:
            self._at += self._first
            yield self._chunk[: self._first]
            self._begin, self._n_rows = self._first, self._n_rows - 1
        self._row += 1
        if note_end:
            note_end()

    def _check_rest(self) -> None:
        """Read on behind the last row: a file that is cut off there is damaged too."""
        rest = b"".join(self._carried)
        while rest:
            self._splitter.check_rest(rest)
            rest = self._reader.read(self._batch_bytes)


def read_first_rows(path: Path, begin: int, splitter: Splitter, read_long: LongReader) -> Payload:
    """About 1 MiB of rows; with a long row as the first, nothing after `read_long` has read it.

    Raises:
        PreflightError: code TEXT.
    """
    with open_stream(path, [0, 0, begin]) as reader:
        first = next(Cutter(reader, splitter, read_long, batch_bytes=HEAD_BYTES).cut(), None)
        if isinstance(first, LongRow):
            for _ in first.document:
                pass
        return first.payload if isinstance(first, Batch) else (begin, 0, b"")
