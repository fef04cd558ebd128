"""Writes the small files of a checkpoint and records the size and SHA-256 of each."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from preflight.checkpoints.damage import unequal_error
from preflight.checkpoints.manifest import OWN_NAMES, FileEntry
from preflight.core import storage


class HashingFile:
    """A file for `torch.save` to write to. It hashes all bytes and keeps the first OSError.

    An OSError raised in `write` would pass through torch's C++ zip writer, which replaces it by an
    error of its own ("unexpected pos"). `FolderWriter.create` raises it when the writing has ended.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, hash and count `data`, any bytes-like object."""
        count = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self.digest.update(data)
        self.size_bytes += count
        return count

    def flush(self) -> None:
        """Do nothing: the whole file is fsynced once, at its end."""


class FolderWriter:
    """Writes files into a new folder. ``files`` holds the manifest's entry of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileEntry] = {}

    @contextlib.contextmanager
    def create(self, name: str, size_bytes: int = 0) -> Iterator[HashingFile]:
        """A new file, fsynced when the block ends.

        Args:
            name: its name in the folder.
            size_bytes: about its size, if that is known. The space is reserved, so that a full
                disk shows before the first write.
        """
        with open(self.folder / name, "xb") as file:
            storage.reserve_bytes(file, size_bytes)
            hashing = HashingFile(file)
            yield hashing
            if hashing.error is not None:
                raise hashing.error
            file.truncate(hashing.size_bytes)  # releases what was reserved too much
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = FileEntry(bytes=hashing.size_bytes, sha256=hashing.digest.hexdigest())

    def write(self, name: str, content: bytes) -> None:
        """A new file with this content."""
        with self.create(name) as file:
            file.write(content)

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Let `tokenizer` save its files into the folder, and record them.

        `storage.publish_folder` fsyncs them with all others.

        Raises:
            ValueError: it saved a file elsewhere, or under a name that a checkpoint uses itself.
        """
        for path in tokenizer.save(self.folder):
            if path.parent != self.folder or path.name in OWN_NAMES:
                raise ValueError(f"{tokenizer} may not save {path}")
            self.files[path.name] = _describe_file(path)

    def read_back(self) -> None:
        """Compare every file on disk with what was recorded; files of tensors already have been.

        Raises:
            PreflightError: code STORAGE, when one differs.
        """
        for name, entry in self.files.items():
            if entry.chunk_bytes is None and _describe_file(self.folder / name) != entry:
                raise unequal_error(self.folder / name)


def _describe_file(path: Path) -> FileEntry:
    file: Any
    with storage.open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(bytes=os.fstat(file.fileno()).st_size, sha256=digest.hexdigest())
