"""Rows of parquet files, wherever their bytes come from.

Arrow decodes one page and a few rows at a time, so that memory is bounded for row groups of any
size: 120 MB with one row group of 1 GB, against 990 MB with Arrow's own defaults, and faster. Only
a page is read whole. A page with one row of 200 MB takes about 700 MB, which is logged.

A worker process takes a batch apart without Arrow: `Texts` holds plain bytes.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from preflight.core.errors import PreflightError
from preflight.core.libraries import import_library
from preflight.core.log import log_once
from preflight.core.units import format_bytes
from preflight.corpus.sources.parquet_layout import Layout, list_faults, shorten
from preflight.corpus.sources.protocol import Document, text_error
from preflight.corpus.sources.rows import BATCH_BYTES, MAX_ROW_BYTES, Row

_CHUNK_BYTES = 2**18  # of a long row
_STEP_BYTES = 2**18  # about, of the text that Arrow decodes at once
_MAX_STEP_ROWS = 256  # a page's dictionary may repeat 1 MB in each row
_EXCESS_BYTES = 8 * 2**20  # decoded at once without the longest row: the steps are too long
_MAX_BATCH_ROWS = 2**16
_LARGE_PAGE_BYTES = 64 * 2**20


# ---- decoding -----------------------------------------------------------------------------------


def note_large_page(place: str, n_bytes: int) -> None:
    """Log that a read of so many bytes, which is one page, takes several times its size."""
    if n_bytes > _LARGE_PAGE_BYTES:
        log_once(
            f"{place}: a page of {format_bytes(n_bytes)} (a long row, or many in one page): about "
            f"{format_bytes(4 * n_bytes)} of memory are needed"
        )


class Texts(NamedTuple):
    """Consecutive rows of one row group, as plain bytes: the payload of a batch.

    Attributes:
        place, group, row: where the first of them is, for messages.
        data: the UTF-8 of all of them.
        ends: int64 in this machine's order: where each ends in `data`.
        nulls: a byte for each row, not 0 where it is null; empty where none is.
        columns: the values of the other columns.
    """

    place: str
    group: int
    row: int
    data: Any
    ends: bytes
    nulls: bytes
    columns: dict[str, list[Any]]


def parse_texts(texts: Texts, first_row: int) -> Iterator[Row]:
    """The rows of a batch, in a worker process.

    Raises:
        PreflightError: code TEXT, when a row is not UTF-8, which Arrow does not check.
    """
    view, begin = memoryview(texts.data), 0
    for i, end in enumerate(memoryview(texts.ends).cast("q")):
        text = None
        if not (texts.nulls and texts.nulls[i]):
            try:
                text = str(view[begin:end], "utf-8")
            except UnicodeDecodeError as error:
                raise _utf8_error(texts, texts.row + i, first_row + i, error) from None
        begin = end
        yield Row(text, {name: values[i] for name, values in texts.columns.items()})


def _utf8_error(
    texts: Texts, row: int, number: int, error: UnicodeDecodeError, base: int = 0
) -> PreflightError:
    return text_error(
        texts.place,
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {base + error.start:,} of "
        f"row {row:,} in row group {texts.group} (row {number:,} of all)",
        "the rows before it are sound; write the column again as UTF-8",
    )


def read_long_text(texts: Texts, number: int) -> Document:
    """The UTF-8 of the only row in `texts`, in chunks; PreflightError (TEXT) if it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(texts.data), _CHUNK_BYTES):
        chunk = bytes(texts.data[begin : begin + _CHUNK_BYTES])
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=begin + len(chunk) == len(texts.data))
        except UnicodeDecodeError as error:
            raise _utf8_error(texts, texts.row, number, error, begin - waiting) from None
        yield chunk


def read_group(open_file: Callable[[], Any], layout: Layout, group: int, row: int) -> Iterator[Any]:
    """The rows of a row group from `row` on, as `Texts` of a few rows each.

    Args:
        open_file: called for a fresh `pyarrow.parquet.ParquetFile`, more than once if need be.

    Raises:
        PreflightError: code TEXT, when the row group is damaged; it says from which row on.
    """
    mean = layout.text_bytes[group] // max(layout.rows[group], 1)
    step, excess = min(max(_STEP_BYTES // max(mean, 1), 1), _MAX_STEP_ROWS), True
    while excess:
        excess = False
        for texts in _decode(open_file(), layout, group, row, step):
            ends = np.frombuffer(texts.ends, np.int64)
            row += len(ends)
            largest = int(np.diff(ends, prepend=0).max(initial=0))
            too_much = len(texts.data) - largest
            yield texts
            del texts  # before the next is decoded
            if too_much > _EXCESS_BYTES and step > 1:
                log_once(f"{layout.place}: rows unpack to far more than their share of the file")
                step, excess = max(step * _EXCESS_BYTES // (4 * too_much), 1), True
                break
    if row != layout.rows[group]:
        raise _damage_error(layout, group, row, f"it ends there, not at {layout.rows[group]:,}")


def _decode(file: Any, layout: Layout, group: int, row: int, step: int) -> Iterator[Texts]:
    """The rows from `row` on, at most `step` at once. Arrow has to decode those before it too."""
    names, begin = [layout.text, *layout.columns], 0
    try:
        for batch in file.iter_batches(step, [group], columns=names, use_threads=False):
            skip = min(max(row - begin, 0), len(batch))
            begin += len(batch)
            if skip < len(batch):
                yield _unpack(batch.slice(skip), layout, group, begin - len(batch) + skip)
            del batch
    except PreflightError:
        raise
    except list_faults() as error:
        if isinstance(error, MemoryError):
            raise
        raise _damage_error(layout, group, max(row, begin), shorten(error)) from None


def _damage_error(layout: Layout, group: int, row: int, why: str) -> PreflightError:
    return text_error(
        layout.place,
        f"row group {group} of {len(layout.rows)} is damaged after its row {row:,}: {why}",
        f"the {layout.starts[group] + row:,} rows before it are sound; nothing partial is "
        "published: copy or download the file again",
    )


def _unpack(batch: Any, layout: Layout, group: int, row: int) -> Texts:
    """The buffers of an Arrow record batch. The text's bytes are not copied."""
    types = import_library("pyarrow.types", "pyarrow", layout.place)
    array = batch.column(layout.text)
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string_view(array.type):
        array = array.cast("large_string")
    width = np.int64 if types.is_large_string(array.type) else np.int32
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, width, len(array) + 1, array.offset * width().itemsize)
    bounds = bounds.astype(np.int64)
    nulls = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else np.empty(0)
    view = memoryview(data)[bounds[0] : bounds[-1]] if data is not None else memoryview(b"")
    return Texts(
        layout.place,
        group,
        row,
        view,
        (bounds[1:] - bounds[0]).tobytes(),
        nulls.astype(np.uint8).tobytes(),
        {name: batch.column(name).to_pylist() for name in layout.columns},
    )


# ---- batches ------------------------------------------------------------------------------------


def cut_batches(parts: Iterable[Texts]) -> Iterator[tuple[Texts, bool]]:
    """The same rows in batches of about `BATCH_BYTES`, and whether it is one long row.

    The bytes of a batch are its own; those of a long row are still Arrow's.
    """
    waiting = _Collector()
    for part in parts:
        for piece, is_long in _split_long(part):
            if is_long or waiting.is_full:
                yield from waiting.take()
            if is_long:
                yield piece, True
            else:
                waiting.add(piece)
        del part
    yield from waiting.take()


def _split_long(texts: Texts) -> Iterator[tuple[Texts, bool]]:
    """The rows of `texts`: those above `MAX_ROW_BYTES` alone, those between them together."""
    ends = np.frombuffer(texts.ends, np.int64)
    at = 0
    for i in np.flatnonzero(np.diff(ends, prepend=0) > MAX_ROW_BYTES).tolist():
        if i > at:
            yield _slice(texts, ends, at, i), False
        yield _slice(texts, ends, i, i + 1), True
        at = i + 1
    if at < len(ends):
        yield (_slice(texts, ends, at, len(ends)) if at else texts), False


def _slice(texts: Texts, ends: Any, begin: int, end: int) -> Texts:
    base = int(ends[begin - 1]) if begin else 0
    return Texts(
        texts.place,
        texts.group,
        texts.row + begin,
        texts.data[base : int(ends[end - 1])],
        (ends[begin:end] - base).tobytes(),
        texts.nulls[begin:end],
        {name: values[begin:end] for name, values in texts.columns.items()},
    )


@dataclass
class _Collector:
    """Joins rows that follow each other."""

    parts: list[Texts] = field(default_factory=list)
    n_bytes: int = 0
    n_rows: int = 0

    @property
    def is_full(self) -> bool:
        return self.n_bytes >= BATCH_BYTES or self.n_rows >= _MAX_BATCH_ROWS

    def add(self, part: Texts) -> None:
        """Copy the bytes, so that Arrow can release its own."""
        self.parts.append(part._replace(data=bytes(part.data)))
        self.n_bytes += len(part.data)
        self.n_rows += len(part.ends) // 8

    def take(self) -> Iterator[tuple[Texts, bool]]:
        """All that was added, as one batch; nothing where nothing was."""
        if self.parts:
            yield self._join(), False
        self.parts, self.n_bytes, self.n_rows = [], 0, 0

    def _join(self) -> Texts:
        first = self.parts[0]
        bases = itertools.accumulate((len(part.data) for part in self.parts), initial=0)
        ends = [
            np.frombuffer(part.ends, np.int64) + base
            for part, base in zip(self.parts, bases, strict=False)
        ]
        has_nulls = any(part.nulls for part in self.parts)
        return first._replace(
            data=b"".join(part.data for part in self.parts),
            ends=np.concatenate(ends).tobytes(),
            nulls=b"".join(part.nulls or bytes(len(part.ends) // 8) for part in self.parts)
            if has_nulls
            else b"",
            columns={
                name: [value for part in self.parts for value in part.columns[name]]
                for name in first.columns
            },
        )
