"""A safetensors file that all ranks write at once, each the rows that it holds.

Nothing is gathered: a rank copies a few MiB at a time to the host and writes them to their place.
The file is the same, byte for byte, for any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

from preflight.checkpoints.damage import unequal_error
from preflight.checkpoints.hashing import CHUNK_BYTES, hash_together
from preflight.checkpoints.manifest import FileEntry
from preflight.checkpoints.ranks import Ranks
from preflight.checkpoints.rows import Rows
from preflight.checkpoints.weights import lay_out
from preflight.core import storage

_PIECE_BYTES = 4 * 2**20


class TensorFile:
    """A file of tensors that is to be written.

    Args:
        name: its plain name.
        tensors: this rank's rows of each tensor of the file.
        dtype_names: the types that a tensor may have.

    Raises:
        ValueError: a tensor is of another type.
    """

    def __init__(
        self, name: str, tensors: Mapping[str, Rows], dtype_names: Mapping[torch.dtype, str]
    ) -> None:
        self.name = name
        self._header, offsets = lay_out(tensors, dtype_names)
        self._rows = sorted((offsets[key] + r.start_bytes, key, r) for key, r in tensors.items())
        self.size_bytes = len(self._header) + sum(rows.whole_bytes for rows in tensors.values())

    def create(self, folder: Path) -> None:
        """Make the file in its full size, with its header. One rank does, before any writes.

        Raises:
            OSError: there is no room.
        """
        with open(folder / self.name, "xb") as file:
            storage.reserve_bytes(file, self.size_bytes)
            file.truncate(self.size_bytes)
            file.write(self._header)

    def write(self, folder: Path) -> None:
        """Write this rank's rows to their place, durably, and compare them with the file.

        Raises:
            PreflightError: code STORAGE, when the file holds something else.
            OSError: there is no room, or the disk is failing.
        """
        path = folder / self.name
        with open(path, "rb+", buffering=0) as file:
            for start, piece in self._iterate_pieces():
                _write_at(file, start, piece)
            os.fsync(file.fileno())
        with open(path, "rb", buffering=0) as file:
            if self._header != file.read(len(self._header)) or not self._is_written(file):
                raise unequal_error(path)

    def _iterate_pieces(self) -> Iterator[tuple[int, memoryview]]:
        """This rank's bytes, in the order of the file, and where each piece begins in it."""
        for start, _, rows in self._rows:
            at = start
            for piece in rows.iterate_bytes(_PIECE_BYTES):
                yield at, piece
                at += piece.nbytes

    def _is_written(self, file: IO[bytes]) -> bool:
        """Whether an opened file holds what was written."""
        found = np.empty(_PIECE_BYTES, dtype=np.uint8)
        for start, piece in self._iterate_pieces():
            if len(found) < piece.nbytes:
                found = np.empty(piece.nbytes, dtype=np.uint8)
            file.seek(start)
            part, at = found[: piece.nbytes], 0
            while at < piece.nbytes and (count := file.readinto(part[at:])):  # type: ignore[attr-defined]
                at += count
            if at < piece.nbytes or not np.array_equal(part, np.asarray(piece)):
                return False
        return True

    def describe(self, folder: Path, ranks: Ranks) -> FileEntry:
        """The manifest's entry of the written file, which all ranks hash together.

        Raises:
            PreflightError: as `do_together`.
        """
        digest = hash_together(lambda: storage.open_regular(folder / self.name), CHUNK_BYTES, ranks)
        return FileEntry(bytes=self.size_bytes, sha256=digest, chunk_bytes=CHUNK_BYTES)


def _write_at(file: IO[bytes], start: int, content: memoryview) -> None:
    """Write all of `content` from byte `start` on: a disk that fills up takes a part first."""
    file.seek(start)
    while content:
        content = content[file.write(content) :]
