"""What a data folder is: ids in ``.npy`` shards, and a ``metadata.json`` that proves every byte.

This module verifies data folders and writes single shards. `preflight.corpus.build` makes folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import (
    hash_file,
    open_regular,
    reserve_bytes,
    storage_error,
    verify_all,
)
from preflight.corpus.metadata import (
    METADATA_NAME,
    TOKENIZER_NAME,
    FileEntry,
    Metadata,
    OpenShard,
    ShardEntry,
    SplitEntry,
    damaged_error,
    read_metadata,
    unreadable_error,
)
from preflight.tokenization import (
    MissingLibraryError,
    Tokenizer,
    TokenizerChoice,
    TokenizerRecipe,
    load_saved_tokenizer,
    load_tokenizer,
)

BUILDING_NAME = ".building"  # a folder within, for a build that is not complete yet
SHARD_NAME = re.compile(r"shard_\d{5,}\.npy")
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Shard:
    """One verified ``.npy`` file of ids. ``signature`` is its size and mtime when verified."""

    path: Path
    n_tokens: int
    signature: tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One part of the data. ``n_bytes`` counts the text, for bits per byte."""

    shards: tuple[Shard, ...]
    n_tokens: int
    n_documents: int
    n_bytes: int

    def open(self) -> Iterator[np.ndarray]:
        """The shards as one-dimensional read-only memory maps, in order, each when it is needed."""
        return (np.load(shard.path, mmap_mode="r") for shard in self.shards)


@dataclass(frozen=True)
class DataFolder:
    """A complete, verified data folder. ``fingerprint`` is a digest of every id in it, in order."""

    path: Path
    metadata: Metadata
    fingerprint: str
    train: Split
    val: Split
    vocab_size: int
    dtype: np.dtype

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids: see `load_data_tokenizer`."""
        return load_data_tokenizer(self.path, self.metadata)


def load_data_tokenizer(data_dir: Path, metadata: Metadata) -> Tokenizer:
    """The tokenizer of a data folder, from its files; of an older folder, by its name.

    Raises:
        PreflightError: code DATA, when its files are damaged or it is unknown here.
    """
    facts, files = metadata.tokenizer, [f for f in metadata.files if _is_tokenizer(f)]
    verify_all(partial(_verify_file, data_dir), files)
    try:
        if files or facts.kind == "bytes":
            return load_saved_tokenizer(data_dir / TOKENIZER_NAME, facts.model_dump())
        tokenizer = load_tokenizer(facts.name)
    except MissingLibraryError as error:
        raise PreflightError(ExitCode.DATA, *error.lines) from None
    except PreflightError as error:
        if error.code == ExitCode.STORAGE:
            raise
        raise damaged_error(data_dir / TOKENIZER_NAME, error.lines[0]) from None
    if tokenizer.fingerprint != facts.fingerprint:
        raise _mismatch_error(data_dir, metadata, tokenizer)
    return tokenizer


def _is_tokenizer(entry: FileEntry) -> bool:
    return entry.name.startswith(f"{TOKENIZER_NAME}/")


def find_tokenizer_change(metadata: Metadata, wanted: TokenizerChoice) -> str:
    """How the tokenizer of a data folder differs from the one wanted; empty if it does not."""
    before = metadata.tokenizer
    if isinstance(wanted, TokenizerRecipe):
        asked = f" of {wanted.vocab_size:,} ids" if wanted.vocab_size else ""
        is_same, now = wanted.accepts(before.model_dump()), f"{wanted.name}{asked}"
    else:
        is_same, now = before.fingerprint == wanted.fingerprint, wanted.name
        if before.name == now:
            now = f"another {now}"
    return "" if is_same else f"the tokenizer changed from {before.name} to {now}"


def _mismatch_error(data_dir: Path, metadata: Metadata, wanted: TokenizerChoice) -> PreflightError:
    found = metadata.tokenizer
    if isinstance(wanted, TokenizerRecipe):
        asked = f"{wanted.name} with {wanted.vocab_size or 0:,} ids".removesuffix(" with 0 ids")
    else:
        asked = f"{wanted.name} ({wanted.fingerprint[:12]})"
    return PreflightError(
        ExitCode.DATA,
        f"{data_dir} was made with tokenizer {found.name} ({found.fingerprint[:12]}, "
        f"{found.vocab_size:,} ids), not {asked}",
        f"use --tokenizer {found.name}, or give --text-file to rebuild it",
    )


def load_data_folder(data_dir: Path, wanted: TokenizerChoice) -> DataFolder:
    """Verify every byte of a data folder and return it.

    Raises:
        PreflightError: code DATA for anything missing, damaged, extra, or made with another
            tokenizer than the one `wanted`; it names the file, what was expected and what was
            found.
    """
    metadata = read_metadata(data_dir)
    if find_tokenizer_change(metadata, wanted):
        raise _mismatch_error(data_dir, metadata, wanted)
    tokenizer = wanted
    if isinstance(tokenizer, TokenizerRecipe):
        tokenizer = load_data_tokenizer(data_dir, metadata)
    listed = {entry.name for entry in metadata.files}
    splits = {}
    for name in ("train", "val"):
        part, folder = metadata.get_split(name), data_dir / name
        known = listed | {f"{name}/{entry.name}" for entry in part.shards}
        for present in sorted(os.listdir(folder) if os.path.isdir(folder) else ()):
            if f"{name}/{present}" not in known:
                raise damaged_error(folder / present, f"{METADATA_NAME} does not list it")
        shards = verify_all(partial(verify_shard, folder, tokenizer), part.shards)
        splits[name] = Split(tuple(shards), part.n_tokens, part.n_documents, part.n_bytes)
    verify_all(partial(_verify_file, data_dir), metadata.files)
    return DataFolder(
        data_dir,
        metadata,
        compute_fingerprint(metadata),
        splits["train"],
        splits["val"],
        tokenizer.vocab_size,
        tokenizer.id_dtype,
    )


def compute_fingerprint(metadata: Metadata) -> str:
    """The digest of every id in a data folder, in order, from the digests of its shards."""
    digest = hashlib.sha256(metadata.tokenizer.fingerprint.encode())
    for name in ("train", "val"):
        digest.update(name.encode())
        for entry in metadata.get_split(name).shards:
            digest.update(entry.sha256.encode())
    return digest.hexdigest()


def check_long_enough(part: SplitEntry, name: str) -> None:
    """PreflightError (TEXT) unless the metadata's `part` has a token, and one to predict."""
    if part.n_tokens < 2:
        what = {"train": "training", "val": "validation"}[name]
        raise PreflightError(
            ExitCode.TEXT,
            f"the text is too short to be shared out: its {what} part is empty",
            "give more text; a few words are enough to try everything",
        )


def _verify_file(data_dir: Path, entry: FileEntry) -> None:
    """Check size and SHA-256 of a file beside the shards: PreflightError (DATA)."""
    path = data_dir / entry.name
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        digest = hash_file(path)
    except OSError as error:
        raise unreadable_error(path, error) from None
    if (size, digest) != (entry.n_bytes, entry.sha256):
        raise damaged_error(path, "its size or its SHA-256 is not the expected one")


# ---- shards -------------------------------------------------------------------------------------


def _build_npy_header(dtype: np.dtype, n_tokens: int) -> bytes:
    """The one header that a shard of `n_tokens` ids has; NumPy pads all to the same length."""
    stream = io.BytesIO()
    description = {
        "descr": dtype.newbyteorder("<").str,
        "fortran_order": False,
        "shape": (n_tokens,),
    }
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def verify_shard(folder: Path, tokenizer: Tokenizer, entry: ShardEntry) -> Shard:
    """Check size, header, SHA-256 and largest id of one shard in one read.

    Raises:
        PreflightError: code DATA when anything differs from its `entry` in the metadata.
    """
    path = folder / entry.name
    header = _build_npy_header(tokenizer.id_dtype, entry.n_tokens)
    expected = len(header) + entry.n_tokens * tokenizer.id_dtype.itemsize
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if status.st_size != expected or entry.n_bytes != expected:
                raise damaged_error(path, f"expected {expected:,} bytes, found {status.st_size:,}")
            head = file.read(len(header))
            digest, largest = hashlib.sha256(head), -1
            while block := file.read(_READ_BYTES):
                digest.update(block)
                whole = len(block) // tokenizer.id_dtype.itemsize * tokenizer.id_dtype.itemsize
                largest = max(largest, int(np.frombuffer(block[:whole], tokenizer.id_dtype).max()))
    except OSError as error:
        raise unreadable_error(path, error) from None
    if digest.hexdigest() != entry.sha256:
        raise damaged_error(
            path, f"its SHA-256 is {digest.hexdigest()[:12]}..., expected {entry.sha256[:12]}..."
        )
    if head != header:
        raise damaged_error(path, "its numpy header is not one of ours")
    if largest != entry.max_id or largest >= tokenizer.vocab_size:
        raise damaged_error(
            path,
            f"its largest id is {largest}, expected {entry.max_id}, below {tokenizer.vocab_size}",
        )
    return Shard(path, entry.n_tokens, (status.st_size, status.st_mtime_ns))


class ShardWriter:
    """One shard being written, in the folder of a build.

    It has its final name from the first byte on. A journal says how much of it counts.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype,
        capacity: int,
        bound: int | None = None,
        kept: OpenShard | None = None,
    ) -> None:
        """Begin a shard, or go on with one.

        Args:
            path: of the file, which is new unless `kept` is given.
            capacity: tokens when full.
            bound: tokens that it can get at most, where that is known: room is reserved for them.
            kept: what of it counts; what comes behind is cut off.

        Raises:
            PreflightError: code STORAGE; DATA, when what is there is not what was kept.
        """
        self._path, self._dtype, self._capacity = path, dtype, capacity
        self.n_tokens, self._max_id = 0, -1
        header = _build_npy_header(dtype, capacity)
        self._digest = hashlib.sha256(header)
        with self._explaining():
            self._file = open(path, "xb" if kept is None else "rb+")  # noqa: SIM115
            self._file.write(header)
            if kept is not None:
                self._go_on(kept)
            if bound is not None:
                room = len(header) + min(capacity, self.n_tokens + bound) * dtype.itemsize
                reserve_bytes(self._file, room)

    def _go_on(self, kept: OpenShard) -> None:
        left = kept.n_tokens * self._dtype.itemsize
        while left:
            block = self._file.read(min(left, _READ_BYTES))
            if not block:
                raise damaged_error(self._path, "it is shorter than the journal of the build says")
            self._digest.update(block)
            left -= len(block)
        if self._digest.hexdigest() != kept.sha256:
            raise damaged_error(self._path, "its SHA-256 is not the one in the build's journal")
        self.n_tokens, self._max_id = kept.n_tokens, kept.max_id
        self._file.seek(0, os.SEEK_CUR)  # between reading and writing
        self._file.truncate()

    @property
    def is_full(self) -> bool:
        """Whether it has no room left."""
        return self.n_tokens == self._capacity

    def write(self, ids: np.ndarray) -> int:
        """Take as many of the ids, of which there is one at least, as fit, and say how many."""
        ids = ids[: self._capacity - self.n_tokens]
        data = ids.tobytes()
        with self._explaining():
            self._file.write(data)
        self._digest.update(data)
        self._max_id = max(self._max_id, int(ids.max()))
        self.n_tokens += len(ids)
        return len(ids)

    def save(self) -> OpenShard:
        """Make what was written so far durable; it goes on from there if it is cut."""
        with self._explaining():
            self._file.flush()
            os.fsync(self._file.fileno())
        sha256 = self._digest.hexdigest()
        return OpenShard(n_tokens=self.n_tokens, max_id=self._max_id, sha256=sha256)

    def close(self) -> ShardEntry:
        """Finish the shard and return its entry for the metadata."""
        with self._explaining():
            self._file.truncate(self._file.tell())
            if not self.is_full:
                self._file.seek(0)
                self._file.write(_build_npy_header(self._dtype, self.n_tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sha256 = self._digest.hexdigest() if self.is_full else hash_file(self._path)
            n_bytes = self._path.stat().st_size
        return ShardEntry(
            name=self._path.name,
            n_tokens=self.n_tokens,
            n_bytes=n_bytes,
            sha256=sha256,
            max_id=self._max_id,
        )

    def abandon(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """PreflightError (STORAGE) for a failure of the disk."""
        try:
            yield
        except OSError as error:
            raise storage_error(self._path, error) from error
