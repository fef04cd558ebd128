"""Parquet files: only the text column is read, and the columns that filters name.

Row groups are the units of resuming: ``after`` is ``[row group, row in it]``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from preflight.core.signals import StopFlag
from preflight.corpus.sources.parquet_layout import Layout, open_parquet, read_layout
from preflight.corpus.sources.parquet_rows import (
    Texts,
    cut_batches,
    note_large_page,
    parse_texts,
    read_group,
    read_long_text,
)
from preflight.corpus.sources.protocol import SourceFacts, text_error
from preflight.corpus.sources.rows import Batch, LongRow, RowSource, build_row_facts
from preflight.settings import DataSettings

_READ_BYTES = 2**20


def find(given: str | None, settings: DataSettings) -> list[ParquetSource] | None:
    """The parquet file called `given`; None for anything else, and for a folder of that name."""
    if given is None or not given.lower().endswith(".parquet") or not os.path.isfile(given):
        return None
    return [ParquetSource(Path(given), settings)]


class ParquetSource(RowSource):
    """The rows of one local parquet file."""

    parse = staticmethod(parse_texts)

    def __init__(
        self,
        path: Path,
        settings: DataSettings,
        name: str | None = None,
        *,
        is_skippable: bool = False,
    ) -> None:
        self.path, self._settings = path, settings
        self.name, self.label = name or path.name, str(path)
        self.is_skippable = is_skippable
        self._signature: tuple[int, ...] = ()

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Check the footer and the column first, then hash the file.

        Raises:
            PreflightError: code TEXT, when the file is cut off, no parquet, or without such a
                column; FLAGS without pyarrow; SIGINT or SIGTERM when `stop` says so.
        """
        digest = hashlib.sha256()
        with self._open() as file:
            self._signature = _read_signature(file)
            layout = self._read_layout(file)
            file.seek(0)
            while block := file.read(_READ_BYTES):
                digest.update(block)
                if stop is not None:
                    stop.leave_if_stopping("stopped while reading the text; nothing was changed")
            if file.tell() != layout.size or _read_signature(file) != self._signature:
                raise self.changed_error()
        return build_row_facts(layout.size, digest.hexdigest(), *layout.notes)

    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        """The rows in order, or those behind the batch with that `after`.

        Raises:
            PreflightError: code TEXT, when a row group is damaged or the file was changed.
        """
        group, row = after or (0, 0)
        with self._open() as file:
            self._check_signature(file)
            layout = self._read_layout(file)
            watched = _WatchedFile(file, self.label)
            metadata = open_parquet(watched, layout.size, self.label).metadata

            def open_again() -> Any:
                return open_parquet(watched, layout.size, self.label, metadata)

            for i in range(group, len(layout.rows)):
                start = row if i == group else 0
                for texts, is_long in cut_batches(read_group(open_again, layout, i, start)):
                    yield self._build(layout, texts, is_long)
                    del texts  # before the next is decoded
                self._check_signature(file)

    def _build(self, layout: Layout, texts: Texts, is_long: bool) -> Batch | LongRow:
        end = texts.row + len(texts.ends) // 8
        is_last = end == layout.rows[texts.group]
        after = [texts.group + 1, 0] if is_last else [texts.group, end]
        start = layout.starts[texts.group]
        number, n_bytes = start + texts.row, layout.measure_share(start + texts.row, start + end)
        if is_long:
            return LongRow(read_long_text(texts, number), number, after, lambda: n_bytes)
        return Batch(texts, number, after, n_bytes)

    def _read_layout(self, file: IO[bytes]) -> Layout:
        size = os.fstat(file.fileno()).st_size
        opened = open_parquet(file, size, self.label)
        return read_layout(opened, size, self._settings, self.label)

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise text_error(self.path, error.strerror or str(error)) from None
        with file:
            yield _KeptOpen(file)  # type: ignore[misc]

    def _check_signature(self, file: IO[bytes]) -> None:
        """PreflightError (TEXT) when the open file is not the one that was scanned."""
        if not self._signature:
            self._signature = _read_signature(file)
        try:
            at_path = os.stat(self.path)
        except OSError:
            raise self.changed_error() from None
        if not _read_signature(file) == _list_signature(at_path) == self._signature:
            raise self.changed_error()


def _read_signature(file: IO[bytes]) -> tuple[int, ...]:
    return _list_signature(os.fstat(file.fileno()))


def _list_signature(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class _KeptOpen:
    """A file that Arrow does not close when it drops it."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.fileno = file.seek, file.tell, file.fileno

    def read(self, n_bytes: int = -1) -> bytes:
        """So many bytes, or fewer at the end of the file."""
        parts = []
        while n_bytes and (part := self._file.read(n_bytes)):
            parts.append(part)
            n_bytes -= len(part) if n_bytes > 0 else 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readable(self) -> bool:
        return True

    seekable = readable

    def close(self) -> None:
        """Leave it to the owner."""


class _WatchedFile(_KeptOpen):
    """Tells when Arrow reads a page that takes much memory."""

    def __init__(self, file: Any, place: str) -> None:
        super().__init__(file)
        self._place = place

    def read(self, n_bytes: int = -1) -> bytes:
        """As of the file."""
        note_large_page(self._place, n_bytes)
        return super().read(n_bytes)
