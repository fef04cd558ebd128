"""Rows of parquet files, wherever their bytes come from.

Arrow decodes one page and a few rows at a time, so that memory is bounded for row groups of any
size: 110 MB with one row group of 1 GB, against 990 MB with Arrow's own defaults, and faster. Only
a page is read whole. A page with one row of 200 MB takes about 800 MB, which is logged.

A worker process takes a batch apart without Arrow: `Texts` holds plain bytes.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from preflight.core.errors import PreflightError
from preflight.core.libraries import import_library
from preflight.core.log import log_once
from preflight.core.units import format_bytes
from preflight.corpus.sources.protocol import Document, text_error
from preflight.corpus.sources.rows import BATCH_BYTES, MAX_ROW_BYTES, Row
from preflight.settings import DataSettings

USUAL_TEXT_COLUMNS = (
    *("text", "content", "article_body", "body", "document", "raw_content"),
    *("article", "story", "passage", "markdown", "code", "output"),
)
BUFFER_BYTES = 2**18  # of a column, that Arrow reads at once
_CHUNK_BYTES = 2**18  # of a long row
_STEP_BYTES = 2**18  # about, of the text that Arrow decodes at once
_MAX_STEP_ROWS = 256  # a page's dictionary may repeat 1 MB in each row
_EXCESS_BYTES = 8 * 2**20  # decoded at once without the longest row: the steps are too long
_MAX_BATCH_ROWS = 2**16
_LARGE_PAGE_BYTES = 64 * 2**20
_COMPARISON = re.compile(r"([^<>=!]+)(?:>=|<=|>|<|==|!=)")


# ---- what is in a file --------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the rows of a parquet file are.

    Attributes:
        place: how messages call the file.
        size: bytes of the file.
        text: the column with the text.
        columns: the other columns that filters ask for and that the file has.
        rows: the number of rows of each row group.
        text_bytes: of each row group's text, not compressed.
        notes: what a user should know.
    """

    place: str
    size: int
    text: str
    columns: tuple[str, ...]
    rows: tuple[int, ...]
    text_bytes: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each row group's first row, and the number of all rows at last."""
        return tuple(itertools.accumulate(self.rows, initial=0))

    def measure_share(self, begin: int, end: int) -> int:
        """The bytes of the file that stand for its rows from `begin` to `end`.

        All rows together have the file's size, whatever the batches are.
        """
        total = max(self.starts[-1], 1)
        return self.size * end // total - self.size * begin // total


def choose_text_column(names: list[str], wanted: str | None, label: str) -> str:
    """The column that holds the text: `wanted`, or the first with a usual name.

    Raises:
        PreflightError: code TEXT, when there is none; it names those that are there.
    """
    by_name = {name.lower(): name for name in reversed(names)}
    if wanted is not None and wanted in names:
        return wanted
    found = next((by_name[name] for name in USUAL_TEXT_COLUMNS if name in by_name), None)
    if wanted is None and (found is not None or len(names) == 1):
        return found if found is not None else names[0]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    what = f"no column '{wanted}'" if wanted is not None else "no column with a usual name for text"
    raise text_error(label, f"{what}; its columns: {shown}", "name the right one: --text-column")


def find_filter_columns(rules: Iterable[str]) -> tuple[str, ...]:
    """The names that the rules of ``--filter`` compare, such as ``language_score>=0.65``."""
    matches = (_COMPARISON.match(rule) for rule in rules)
    return tuple(dict.fromkeys(match[1].strip() for match in matches if match))


def read_layout(file: Any, size: int, settings: DataSettings, place: str) -> Layout:
    """What an open `pyarrow.parquet.ParquetFile` of `size` bytes holds.

    Raises:
        PreflightError: code TEXT, when there is no such column, or when it holds no strings.
    """
    schema, metadata = file.schema_arrow, file.metadata
    text = choose_text_column(schema.names, settings.text_column, place)
    kind = schema.field(text).type
    if not _is_text(kind):
        raise text_error(
            place,
            f"the column '{text}' holds {kind}, not text",
            f"its columns: {', '.join(schema.names[:20])}; name the right one: --text-column",
        )
    leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    columns = tuple(
        name
        for name in find_filter_columns(settings.filter)
        if name in leaves and name in schema.names
    )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    note = f"the column '{text}' is read as text; --text-column would name another"
    return Layout(
        place,
        size,
        text,
        columns,
        tuple(group.num_rows for group in groups),
        tuple(group.column(leaves[text]).total_uncompressed_size for group in groups),
        (note,) if settings.text_column is None else (),
    )


def _is_text(kind: Any) -> bool:
    types = import_library("pyarrow.types", "pyarrow", "a parquet file")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def open_parquet(
    file: Any, size: int, place: str, metadata: Any = None, *, has_head: bool = True
) -> Any:
    """A `pyarrow.parquet.ParquetFile` of a readable, seekable `file`, set up for little memory.

    Args:
        file: a Python file object.
        size: its bytes.
        place: how messages call it.
        metadata: its footer, if it was read already.
        has_head: whether its first bytes are looked at, too.

    Raises:
        PreflightError: code TEXT, when the file is cut off, or is no parquet; FLAGS without Arrow.
    """
    parquet = import_library("pyarrow.parquet", "pyarrow", place)
    if metadata is None:
        _check_ends(file, size, place, has_head)
    try:
        return parquet.ParquetFile(
            file,
            metadata=metadata,
            pre_buffer=False,  # the default holds all that was read of the file
            buffer_size=BUFFER_BYTES,
            page_checksum_verification=True,
        )
    except _list_faults() as error:
        raise text_error(place, f"its footer is damaged: {_shorten(error)}") from None


def _check_ends(file: Any, size: int, place: str, has_head: bool) -> None:
    """PreflightError (TEXT) unless a parquet file begins and ends as such."""
    head = b"PAR1"
    if has_head:
        file.seek(0)
        head = bytes(file.read(4))
    file.seek(max(size - 8, 0))
    tail = bytes(file.read(8))
    if head == b"PARE" or tail[4:] == b"PARE":
        raise text_error(place, "an encrypted parquet file, which cannot be read")
    if head != b"PAR1":
        raise text_error(place, "no parquet file" if size else "empty")
    if tail[4:] != b"PAR1" or size < 12 or int.from_bytes(tail[:4], "little") > size - 12:
        raise text_error(
            place,
            f"the file is cut off at {size:,} bytes: its footer is missing",
            "without it no row can be found; copy or download the file again",
        )


def _list_faults() -> tuple[type[Exception], ...]:
    """What Arrow raises for damaged files."""
    arrow = import_library("pyarrow", "pyarrow", "a parquet file")
    return (arrow.ArrowException, OSError, ValueError, OverflowError)


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def note_large_page(place: str, n_bytes: int) -> None:
    """Log that a read of so many bytes, which is one page, takes several times its size."""
    if n_bytes > _LARGE_PAGE_BYTES:
        log_once(
            f"{place}: a page of {format_bytes(n_bytes)} (a long row, or many in one page): about "
            f"{format_bytes(4.5 * n_bytes)} of memory are needed"
        )


# ---- decoding -----------------------------------------------------------------------------------


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
    except _list_faults() as error:
        if isinstance(error, MemoryError):
            raise
        raise _damage_error(layout, group, max(row, begin), _shorten(error)) from None


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
