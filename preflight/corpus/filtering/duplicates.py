"""Which documents are copies of earlier ones: an index that is bounded, durable and deterministic.

A file holds a record of each document: its signature, which document it copies, and the bands under
which it is filed. In memory is a hash table of the documents that were kept; what it proposes is
compared with the record, so that chance drops nothing. A record is written once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import refuse_other_kind, storage_error
from preflight.core.units import format_bytes
from preflight.corpus.filtering import minhash
from preflight.corpus.filtering.slots import SlotTable, count_slots

MAX_BYTES = 256 * 2**20
# So many kept documents are filed under one value of a band. At a value that more have, such as
# that of a template, comparing each with all would take quadratic time; the other bands remain.
MAX_ALIKE = 32
_READ_RECORDS = 4096  # at once, when the table is built again


@dataclass(frozen=True)
class _Layout:
    """How signatures of one kind are compared.

    Attributes:
        n_words: of uint32 in a signature.
        n_bands: equal parts of it, under each of which a document is filed.
        min_equal: so many equal words make a copy.
        slot: the type of the hash table's slots.
        number_bits: of a slot, for the document's number.
    """

    n_words: int
    n_bands: int
    min_equal: int
    slot: type[np.unsignedinteger]
    number_bits: int

    @property
    def record(self) -> np.dtype:
        """One document in the file; `copy_of` is -1 where it is kept, `filed` has a bit a band."""
        return np.dtype([("words", "<u4", (self.n_words,)), ("copy_of", "<i8"), ("filed", "<u8")])

    def compute_keys(self, words: np.ndarray) -> np.ndarray:
        """Keys of signatures: uint32 (documents, n_words) -> uint64 (documents, n_bands)."""
        if self.n_bands > 1:
            return minhash.compute_bands(words)
        return words[:, :1].astype(np.uint64) << np.uint64(32) | words[:, 1:2]


_LAYOUTS = {
    "exact": _Layout(4, 1, 4, np.uint64, 32),
    "near": _Layout(minhash.N_PERMUTATIONS, minhash.N_BANDS, minhash.MIN_EQUAL, np.uint32, 24),
}


def estimate_bytes(n_documents: int, kind: str) -> int:
    """Memory of the hash table for so many kept documents, at most: it grows by doubling."""
    layout = _LAYOUTS[kind]
    return 2 * count_slots(n_documents * layout.n_bands) * np.dtype(layout.slot).itemsize


def estimate_capacity(kind: str, max_bytes: int = MAX_BYTES) -> int:
    """So many kept documents fit into `max_bytes`."""
    layout = _LAYOUTS[kind]
    n_slots = max_bytes // np.dtype(layout.slot).itemsize
    return min(n_slots * 2 // 3 // layout.n_bands, 2**layout.number_bits - 2)


class DuplicateIndex:
    """Finds copies among documents; the first of several is kept. Build it with `open`.

    A document is compared with those that were kept before it. What is found depends on the
    documents and their order alone, not on how they come in calls, or on a new opening.

    Attributes:
        n_documents: signatures so far.
    """

    def __init__(self, path: Path, kind: str, max_bytes: int) -> None:
        self.path, self.kind, self.n_documents = path, kind, 0
        self._layout, self._max_bytes = _LAYOUTS[kind], max_bytes
        self._table = SlotTable(self._layout.slot, self._layout.number_bits, max_bytes)
        self._file = -1

    @classmethod
    def open(
        cls, folder: Path, kind: str, n_documents: int = 0, max_bytes: int = MAX_BYTES
    ) -> DuplicateIndex:
        """The index in `folder`, cut to its first `n_documents`; made, where there is none.

        Raises:
            PreflightError: code DATA, when the file has fewer documents; STORAGE.
        """
        index = cls(folder / f"signatures-{kind}.bin", kind, max_bytes)
        size = index._layout.record.itemsize
        n_found = index.path.stat().st_size // size if refuse_other_kind(index.path) else 0
        if n_found < n_documents:
            raise PreflightError(
                ExitCode.DATA,
                f"{index.path}: signatures of {n_found:,} documents, {n_documents:,} expected",
                "the build cannot continue; delete this folder, then run the same command again",
            )
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            index._file = os.open(index.path, flags, 0o666)
            os.ftruncate(index._file, n_documents * size)
        except OSError as error:
            index.close()
            raise storage_error(index.path, error) from error
        index.n_documents = n_documents
        index._rebuild()
        return index

    @property
    def n_bytes(self) -> int:
        """Memory of the hash table."""
        return self._table.n_bytes

    def sync(self) -> None:
        """Make the documents so far durable, before their number is recorded.

        Raises:
            PreflightError: code STORAGE.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Close the file. The index is of no use then."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def find(self, signatures: Sequence[bytes]) -> list[int]:
        """Take in the next documents.

        Returns: for each the number of the earlier document that it copies, of several the first,
            or -1. Numbers count all documents from 0, copies too.

        Raises:
            PreflightError: code OUT_OF_MEMORY, when the table would be larger than allowed, or
                STORAGE. The documents of this call are not taken in then.
        """
        if not signatures:
            return []
        records = np.zeros(len(signatures), self._layout.record)
        words = np.frombuffer(b"".join(signatures), "<u4").reshape(len(signatures), -1)
        records["words"] = words
        keys = self._layout.compute_keys(words)
        self._make_room(keys.size)
        _Search(self, records, keys).run()
        self._append(records)
        self._file_kept(records, keys, self.n_documents)
        self.n_documents += len(records)
        return [int(number) for number in records["copy_of"]]

    def _make_room(self, n_keys: int) -> None:
        is_full = self.n_documents + n_keys // self._layout.n_bands > self._table.max_number
        if not is_full and self._table.has_room(n_keys):
            return
        if is_full or not self._table.grow(n_keys):
            capacity = estimate_capacity(self.kind, self._max_bytes)
            raise PreflightError(
                ExitCode.OUT_OF_MEMORY,
                f"--deduplicate {self.kind}: too many documents after {self.n_documents:,}; the "
                f"table of {format_bytes(self._max_bytes)} holds {capacity:,} that are no copies",
                "use --deduplicate exact, or fewer documents by --limit-documents"
                if self.kind == "near"
                else "use fewer documents by --limit-documents, or --deduplicate none",
            )
        self._rebuild()

    def _rebuild(self) -> None:
        """Fill the table from the file."""
        size = self._layout.record.itemsize
        for start in range(0, self.n_documents, _READ_RECORDS):
            n_records = min(_READ_RECORDS, self.n_documents - start)
            records = np.frombuffer(self._read(start * size, n_records * size), self._layout.record)
            keys = self._layout.compute_keys(np.ascontiguousarray(records["words"]))
            if not self._table.has_room(keys.size):  # only when it is opened
                self._make_room(self.n_documents * self._layout.n_bands)
                return
            self._file_kept(records, keys, start)

    def _file_kept(self, records: np.ndarray, keys: np.ndarray, first: int) -> None:
        """File documents under the bands of their records; `first` is the number of the first."""
        bands = np.arange(self._layout.n_bands, dtype=np.uint64)
        is_filed = (records["filed"][:, None] >> bands & np.uint64(1)).astype(bool)
        self._table.insert(keys[is_filed], first + np.nonzero(is_filed)[0])

    def propose(self, keys: np.ndarray) -> list[set[int]]:
        """Numbers of kept documents that each of the next documents may copy."""
        found: list[set[int]] = [set() for _ in keys]
        places, numbers = self._table.find(keys.ravel())
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            found[place // self._layout.n_bands].add(number)
        return found

    def read_record(self, number: int) -> np.void:
        """The record of a document of an earlier call."""
        size = self._layout.record.itemsize
        return np.frombuffer(self._read(number * size, size), self._layout.record)[0]

    def _read(self, offset: int, n_bytes: int) -> bytes:
        try:
            content = os.pread(self._file, n_bytes, offset)
        except OSError as error:
            raise storage_error(self.path, error) from error
        if len(content) != n_bytes:
            raise PreflightError(
                ExitCode.DATA, f"{self.path}: was cut by another program at byte {offset:,}"
            )
        return content

    def _append(self, records: np.ndarray) -> None:
        """Write the records behind the others: all, or as if none."""
        offset, content = self.n_documents * records.itemsize, memoryview(records.tobytes())
        try:
            while content:
                n_written = os.pwrite(self._file, content, offset)
                offset, content = offset + n_written, content[n_written:]
        except OSError as error:
            raise storage_error(self.path, error) from error


class _Search:
    """Decides about the documents of one call, in order."""

    def __init__(self, index: DuplicateIndex, records: np.ndarray, keys: np.ndarray) -> None:
        self._index, self._records = index, records
        self._layout, self._first = _LAYOUTS[index.kind], index.n_documents
        self._proposed = index.propose(keys)
        self._keys = keys.tolist()
        self._earlier: dict[int, np.void] = {}  # records that were read from the file
        self._recent: dict[int, list[int]] = {}  # by key, the documents of this call

    def run(self) -> None:
        """Set `copy_of` and `filed` of each record."""
        for place, keys in enumerate(self._keys):
            record = self._records[place]
            numbers = self._proposed[place].union(*(self._recent.get(key, ()) for key in keys))
            copy_of, n_alike = self._compare(record["words"], sorted(numbers))
            record["copy_of"] = copy_of
            if copy_of >= 0:
                continue
            for band in np.flatnonzero(n_alike < MAX_ALIKE).tolist():
                record["filed"] |= np.uint64(1 << band)
                self._recent.setdefault(keys[band], []).append(self._first + place)

    def _compare(self, words: np.ndarray, numbers: list[int]) -> tuple[int, np.ndarray]:
        """The first document that these words copy, or -1; and how many are filed in each band."""
        bits = np.arange(self._layout.n_bands, dtype=np.uint64)
        n_alike = np.zeros(self._layout.n_bands, np.int64)
        for number in numbers:
            other = self._find_record(number)
            is_equal = words == other["words"]
            is_filed = (other["filed"] >> bits & np.uint64(1)).astype(bool)
            # A chance hit of the table counts for nothing: another opening may not have it.
            is_alike = is_equal.reshape(self._layout.n_bands, -1).all(axis=1) & is_filed
            if is_alike.any() and np.count_nonzero(is_equal) >= self._layout.min_equal:
                return number, n_alike
            n_alike += is_alike
        return -1, n_alike

    def _find_record(self, number: int) -> np.void:
        if number >= self._first:
            return self._records[number - self._first]
        if number not in self._earlier:
            self._earlier[number] = self._index.read_record(number)
        return self._earlier[number]
