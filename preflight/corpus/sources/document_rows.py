"""Documents of plain texts as rows, for runs that clean, filter, count or mix them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

from preflight.core.signals import StopFlag
from preflight.corpus.sources.protocol import Source, SourceFacts
from preflight.corpus.sources.rows import (
    BATCH_BYTES,
    MAX_ROW_BYTES,
    Batch,
    LongRow,
    Row,
    RowSource,
    build_row_facts,
)


def parse_documents(payload: list[bytes], first_row: int) -> Iterator[Row]:
    """Each document as a row."""
    for data in payload:
        yield Row(data.decode())


class DocumentRows(RowSource):
    """The documents of another source, whose sizes its scan finds."""

    parse = staticmethod(parse_documents)

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.name, self.label, self.split = inner.name, inner.label, inner.split
        self.is_skippable, self.is_copied = inner.is_skippable, inner.is_copied
        self._sizes = array("q")

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """As the other source, but for its documents."""
        facts = self._inner.scan(stop)
        self._sizes = facts.document_bytes
        return build_row_facts(facts.size, facts.sha256, *facts.notes)

    def check_unchanged(self, facts: SourceFacts) -> None:
        """As the other source."""
        self._inner.check_unchanged(facts)

    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        """Documents by their number."""
        first = after or 0
        texts: list[bytes] = []
        size = 0
        for number, document in enumerate(self._inner.documents(first), first):
            n_bytes = self._sizes[number]
            if texts and size + n_bytes > BATCH_BYTES:
                yield Batch(texts, first, number, size)
                texts, size = [], 0
            if n_bytes > MAX_ROW_BYTES:
                first = number + 1
                yield LongRow(document, number, first, partial(int, n_bytes))
                continue
            if not texts:
                first = number
            texts.append(b"".join(document))
            size += n_bytes
        if texts:
            yield Batch(texts, first, first + len(texts), size)
