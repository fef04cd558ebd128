"""Which documents are for training and which for validation."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from preflight.corpus.metadata import SPLITS
from preflight.corpus.sources import Document, ScannedSource, Source


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``begin`` to ``end`` of document number ``index`` of a source; mostly all of them."""

    source: Source
    index: int
    begin: int
    end: int
    split: str = "train"

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.end - self.begin

    def open(self, offset: int) -> Document:
        """Its bytes, and all that follows in the document, from `offset` within the part on."""
        documents = self.source.documents(self.index, self.begin + offset)
        document = next(documents, None)
        if document is None:
            raise self.source.changed_error()
        yield from document


class TextSplit:
    """The documents of scanned sources, shared out.

    ``by`` says how: "documents" where there are many: one of every 1 / `val_split` or so is for
    validation; else "tail": the last bytes of all the text are. "given": all of them are of one
    split.
    """

    def __init__(
        self, scanned: list[ScannedSource], val_split: float, split: str | None = None
    ) -> None:
        """`split`: that of all documents, where flags say so."""
        self.scanned, self._val_split, self._split = scanned, val_split, split
        self._tail = (0, 0)  # number of the document in which validation begins, and offset there
        n_documents = sum(len(item.facts.document_bytes) for item in scanned)
        total = sum(sum(item.facts.document_bytes) for item in scanned)
        largest = max((max(item.facts.document_bytes, default=0) for item in scanned), default=0)
        if split is not None:
            self.by = "given"
        # One huge document among many would make the validation part huge or all but empty.
        elif n_documents * val_split < 8 or largest > val_split * total:
            self.by = "tail"
            self._tail = self._find_tail(total - math.ceil(total * val_split), n_documents)
        else:
            self.by = "documents"

    def list_parts(self, first: int = 0) -> Iterator[Part]:
        """All parts in the order of the text, from number `first` on; none of them is empty."""
        return itertools.islice(self._list_all(), first, None)

    def count_parts(self, split: str) -> int:
        """How many parts a split has."""
        return self._totals[split][0]

    def count_bytes(self, *splits: str) -> int:
        """Bytes of text in these splits."""
        return sum(self._totals[split][1] for split in splits)

    @functools.cached_property
    def _totals(self) -> dict[str, tuple[int, int]]:
        totals = {split: [0, 0] for split in SPLITS}
        for part in self._list_all():
            totals[part.split][0] += 1
            totals[part.split][1] += part.n_bytes
        return {split: (n_parts, n_bytes) for split, (n_parts, n_bytes) in totals.items()}

    def _list_all(self) -> Iterator[Part]:
        for number, document in enumerate(self._list_documents()):
            source, index, end = document.source, document.index, document.end
            if self.by == "given":
                yield Part(source, index, 0, end, self._split or "train")
            elif self.by == "documents":
                is_val = is_validation(number, self._val_split)
                yield Part(source, index, 0, end, "val" if is_val else "train")
            else:
                tail, cut = self._tail
                if number < tail or (number == tail and cut):
                    yield Part(source, index, 0, cut if number == tail else end, "train")
                if number >= tail:
                    yield Part(source, index, cut if number == tail else 0, end, "val")

    def _list_documents(self) -> Iterator[Part]:
        for item in self.scanned:
            for index, n_bytes in enumerate(item.facts.document_bytes):
                yield Part(item.source, index, 0, n_bytes)

    def _find_tail(self, target: int, n_documents: int) -> tuple[int, int]:
        """The document that `target` bytes of text end in, and where to cut it."""
        passed = 0
        for number, document in enumerate(self._list_documents()):
            if passed + document.n_bytes > target:
                return number, _find_tail_cut(document, target - passed)
            passed += document.n_bytes
        return n_documents - 1, 0


def is_validation(index: int, share: float) -> bool:
    """One document of each group of 1/share, picked by a hash: an even share without a period."""
    group = math.floor(index * share)
    first, behind = math.ceil(group / share), math.ceil((group + 1) / share)
    draw = int.from_bytes(hashlib.sha256(b"%d" % group).digest()[:8], "big")
    return index == first + draw % max(1, behind - first)


def _find_tail_cut(document: Part, target: int) -> int:
    """An offset at or behind `target`: behind a line break or space where one is near."""
    if target == 0:
        return target
    near, size = b"", min(64 * 1024, document.end - target)
    for chunk in document.open(target):
        near += chunk[: size - len(near)]
        if len(near) == size:
            break
    for mark in (b"\n", b" "):
        found = near.find(mark) + 1
        if 0 < found < len(near):
            return target + found
    inside = 0
    while inside < len(near) and near[inside] & 0xC0 == 0x80:
        inside += 1
    return target + inside
