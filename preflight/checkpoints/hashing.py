"""The SHA-256 of a file, of all its bytes or of its chunks, which several ranks hash at once."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import IO, Any

from preflight.checkpoints.ranks import ONE_RANK, Ranks, do_together

CHUNK_BYTES = 4 * 2**20
_BLOCK_BYTES = 4 * 2**20  # read at once


def hash_opened(file: Any, chunk_bytes: int | None) -> str:
    """The SHA-256 of an opened file as `FileEntry` defines it, in hexadecimal."""
    if chunk_bytes is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return combine_digests([hash_chunks(file, chunk_bytes, ONE_RANK)])


def hash_chunks(file: IO[bytes], chunk_bytes: int, ranks: Ranks) -> list[bytes]:
    """The SHA-256 of each chunk of an opened file that is this rank's: every `world`-th."""
    size = os.fstat(file.fileno()).st_size
    block = memoryview(bytearray(min(_BLOCK_BYTES, chunk_bytes, max(size, 1))))
    digests = []
    for start in range(ranks.rank * chunk_bytes, size, ranks.world * chunk_bytes):
        digest, left = hashlib.sha256(), min(chunk_bytes, size - start)
        file.seek(start)
        while left:
            count = file.readinto(block[:left])  # type: ignore[attr-defined]
            if not count:
                break  # cut short meanwhile: the hash tells
            digest.update(block[:count])
            left -= count
        digests.append(digest.digest())
    return digests


def combine_digests(by_rank: Sequence[Sequence[bytes]]) -> str:
    """The file's SHA-256, in hexadecimal, from what `hash_chunks` gave on each rank."""
    in_order = (digest for each in itertools.zip_longest(*by_rank) for digest in each if digest)
    return hashlib.sha256(b"".join(in_order)).hexdigest()


def hash_together(open_file: Callable[[], IO[bytes]], chunk_bytes: int, ranks: Ranks) -> str:
    """The SHA-256 of a file in chunks, of which each rank hashes its share.

    Args:
        open_file: opens the file to read, on each rank.
        chunk_bytes: of the file's entry.
        ranks: all of them call this.

    Raises:
        PreflightError: as `do_together`.
    """

    def hash_mine() -> list[bytes]:
        with open_file() as file:
            return hash_chunks(file, chunk_bytes, ranks)

    return combine_digests(ranks.gather(do_together(ranks, hash_mine)))
