"""Which documents are for training and which for validation."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from preflight.corpus.sources import Document, ScannedSource, Source


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``begin`` to ``end`` of document number ``index`` of a source; mostly all of them."""

    source: Source
    index: int
    begin: int
    end: int

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


def split_documents(
    scanned: list[ScannedSource], val_split: float
) -> tuple[dict[str, list[Part]], str]:
    """The documents of each split, and how they were shared out: by "documents" or "tail".

    By documents where there are many: one of every 1 / `val_split` or so is for validation. Else
    the last bytes of all the text are.
    """
    documents = [
        Part(item.source, index, 0, n_bytes)
        for item in scanned
        for index, n_bytes in enumerate(item.facts.document_bytes)
    ]
    total = sum(document.n_bytes for document in documents)
    largest = max(document.n_bytes for document in documents)
    # One huge document among many would make the validation part huge or all but empty.
    if len(documents) * val_split < 8 or largest > val_split * total:
        return _split_tail(documents, total - math.ceil(total * val_split)), "tail"
    parts: dict[str, list[Part]] = {"train": [], "val": []}
    for index, document in enumerate(documents):
        parts["val" if is_validation(index, val_split) else "train"].append(document)
    return parts, "documents"


def is_validation(index: int, share: float) -> bool:
    """One document of each group of 1/share, picked by a hash: an even share without a period."""
    group = math.floor(index * share)
    first, behind = math.ceil(group / share), math.ceil((group + 1) / share)
    draw = int.from_bytes(hashlib.sha256(b"%d" % group).digest()[:8], "big")
    return index == first + draw % max(1, behind - first)


def _split_tail(documents: list[Part], target: int) -> dict[str, list[Part]]:
    """Documents before and behind `target` bytes of text; the one it falls into becomes two."""
    passed = 0
    for number, document in enumerate(documents):
        if passed + document.n_bytes > target:
            cut = _find_tail_cut(document, target - passed)
            left = Part(document.source, document.index, 0, cut)
            right = Part(document.source, document.index, cut, document.end)
            return {
                "train": documents[:number] + [left] * (left.n_bytes > 0),
                "val": [right, *documents[number + 1 :]],
            }
        passed += document.n_bytes
    return {"train": documents[:-1], "val": documents[-1:]}


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
