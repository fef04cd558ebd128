"""Sources of rows: tables, dumps, streams. They are read once, and mostly in worker processes.

The parent cuts a source into batches of raw rows. A worker process parses a batch, cleans and
filters each text and encodes it. Row numbers are the documents' names: whether a row is for
validation, and what a message calls it, depend on its number alone.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from preflight.core.signals import StopFlag
from preflight.corpus.sources.protocol import Document, Source, SourceFacts

BATCH_BYTES = 2**20  # about; a batch with one long row has more
MAX_ROW_BYTES = 16 * 2**20  # of a row that is parsed, cleaned and filtered in a worker process


@dataclass(frozen=True, slots=True)
class Row:
    """One document as it was found.

    Attributes:
        text: None where the row is null, or holds no text.
        columns: the other columns that filters ask for, as far as the row has them.
    """

    text: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive raw rows, of about `BATCH_BYTES`.

    Attributes:
        payload: what the source's `parse` takes; it can be pickled.
        first_row: the number of its first row in the source, from 0.
        after: a JSON value; ``batches(after)`` continues behind this batch.
        n_bytes: of the source, as it is stored, that were read for this batch.
    """

    payload: Any
    first_row: int
    after: Any
    n_bytes: int


@dataclass(frozen=True, slots=True)
class LongRow:
    """One row above `MAX_ROW_BYTES`. It is encoded in pieces, and neither cleaned nor filtered.

    Attributes:
        document: its text in chunks of UTF-8, to be read once.
        row: its number in the source.
        after, n_bytes: as of a `Batch`; `n_bytes` is known only when the document was read.
    """

    document: Document
    row: int
    after: Any
    n_bytes: Callable[[], int]


# A picklable callable: (payload, number of its first row) -> its rows, none left out.
Parser = Callable[[Any, int], Iterator[Row]]


class RowSource(Source):
    """Rows from one place, read once.

    Attributes:
        parse: reads a batch's payload in a worker process. It raises `PreflightError` (TEXT) with
            file and row for what is no row at all.
        is_cleaned: `parse` gives clean text, so that no other cleaner may follow.
    """

    parse: Parser
    is_cleaned: bool = False

    @abstractmethod
    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """What identifies the content: size and digest. `document_bytes` stays empty.

        For a file that is its SHA-256. Whatever can be refused by the beginning is refused here:
        a column that is not there, a wrong kind of file, a missing library.

        Raises:
            PreflightError: code TEXT; FLAGS for a missing library; SIGINT or SIGTERM.
        """

    @abstractmethod
    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        """All rows in order, or those behind the batch whose `after` is given.

        Raises:
            PreflightError: code TEXT, when the source cannot be read, was changed or is cut off;
                it says at which row or byte, and how much before it is sound.
        """

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        """Rows are no documents before they are parsed."""
        raise NotImplementedError(f"{self.label} is read by batches")


def build_row_facts(size: int, sha256: str, *notes: str) -> SourceFacts:
    """The facts of a source whose documents are not known yet."""
    return SourceFacts(size, sha256, array("q"), notes)
