"""What identifies a file as it is stored: its size and digest, and whether it has changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from preflight.core.errors import PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources.compressed import PlainReader
from preflight.corpus.sources.protocol import text_error

_READ_BYTES = 2**18


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when it was hashed.

    Attributes:
        path: the file.
        size, sha256: of its stored bytes.
        signature: what `PlainReader.read_signature` says of the same, unchanged file.
    """

    path: Path
    size: int
    sha256: str
    signature: tuple[int, ...]

    def check_unchanged(self, reader: PlainReader) -> None:
        """Compare the signature of the open file with the one of the scan.

        Raises:
            PreflightError: code TEXT, when they differ.
        """
        if reader.read_signature() != self.signature:
            raise changed_error(self.path)


def hash_stored_file(path: Path, stop: StopFlag | None) -> StoredFile:
    """Read the whole file as it is stored, compressed or not.

    Raises:
        PreflightError: code TEXT when it cannot be read; SIGINT or SIGTERM when `stop` says so.
    """
    digest = hashlib.sha256()
    with PlainReader(path) as reader:
        signature = reader.read_signature()
        while block := reader.read(_READ_BYTES):
            digest.update(block)
            if stop is not None:
                stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        return StoredFile(path, reader.plain_offset, digest.hexdigest(), signature)


def changed_error(path: Path) -> PreflightError:
    """The error to raise when a file is not what it was in the scan."""
    return text_error(
        path,
        "changed while it was being read; nothing was published",
        "run the same command again when nothing writes to it any more",
    )
