"""What a parquet file holds: its row groups, its text column, and the columns that filters name."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from preflight.core.libraries import import_library
from preflight.corpus.sources.protocol import text_error
from preflight.settings import DataSettings

USUAL_TEXT_COLUMNS = (
    *("text", "content", "article_body", "body", "document", "raw_content"),
    *("article", "story", "passage", "markdown", "code", "output"),
)
_BUFFER_BYTES = 2**18  # of a column, that Arrow reads at once
_COMPARISON = re.compile(r"([^<>=!]+)(?:>=|<=|>|<|==|!=)")


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
            buffer_size=_BUFFER_BYTES,
            page_checksum_verification=True,
        )
    except list_faults() as error:
        raise text_error(place, f"its footer is damaged: {shorten(error)}") from None


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


def list_faults() -> tuple[type[Exception], ...]:
    """What Arrow raises for damaged files."""
    arrow = import_library("pyarrow", "pyarrow", "a parquet file")
    return (arrow.ArrowException, OSError, ValueError, OverflowError)


def shorten(error: Exception) -> str:
    """The first words of what Arrow says, on one line."""
    return " ".join(str(error).split())[:200]
