"""What a data folder is: ids in ``.npy`` shards, and a ``metadata.json`` that proves every byte.

This module describes, verifies and reads data folders, and writes single shards; what goes into
them is the affair of `prepare`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import hash_file, publish_file, verify_all
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json
from preflight.tokenization import Tokenizer

FORMAT = "preflight-shards"
VERSION = 1
SPLITS = ("val", "train")  # in the order of building; each split's ids are one stream
METADATA_NAME = "metadata.json"
BUILDING_NAME = ".building"  # a folder within, for a build that is not complete yet
SHARD_NAME = re.compile(r"shard_\d{5,}\.npy")
_READ_BYTES = 2**20

# The whole of metadata.json: an object has exactly these keys, a list any number of such items,
# a pattern describes a string; no number is negative.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = {
    "n_documents": int,
    "n_tokens": int,
    "n_bytes": int,
    "shards": [{"name": str, "n_tokens": int, "n_bytes": int, "sha256": _SHA256, "max_id": int}],
}
_SCHEMA = {
    "format": re.compile(FORMAT),
    "version": int,
    "tokenizer": {"name": str, "fingerprint": str, "vocab_size": int, "end_of_text_id": int},
    "dtype": re.compile("uint16|uint32"),
    "shard_size": int,
    "document_separator": (str, type(None)),
    "split": {"val_split": float, "by": str},
    "sources": [{"name": str, "size": int, "sha256": _SHA256}],
    "train": _PART,
    "val": _PART,
    "checksum": _SHA256,
}


@dataclass(frozen=True)
class Shard:
    """One verified ``.npy`` file of ids. ``signature`` is its size and mtime when verified."""

    path: Path
    n_tokens: int
    data_offset: int  # bytes of header before the first id
    signature: tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One part of the data. ``n_bytes`` counts the text, for bits per byte."""

    shards: tuple[Shard, ...]
    n_tokens: int
    n_documents: int
    n_bytes: int

    def open(self) -> list[np.ndarray]:
        """The shards as one-dimensional read-only memory maps, in order."""
        return [np.load(shard.path, mmap_mode="r") for shard in self.shards]


@dataclass(frozen=True)
class DataFolder:
    """A complete, verified data folder. ``fingerprint`` stands for every id in it, in order."""

    path: Path
    metadata: dict[str, Any]
    fingerprint: str
    train: Split
    val: Split
    vocab_size: int
    dtype: np.dtype


def load_data_folder(data_dir: Path, tokenizer: Tokenizer) -> DataFolder:
    """Verify every byte of a data folder and return it.

    Raises:
        PreflightError: code DATA for anything missing, damaged, extra, or made with another
            tokenizer; it names the file, what was expected and what was found.
    """
    metadata = read_metadata(data_dir)
    found = metadata["tokenizer"]
    if found["fingerprint"] != tokenizer.fingerprint:
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} was made with tokenizer {found['name']} ({found['fingerprint'][:12]}), "
            f"not {tokenizer.name} ({tokenizer.fingerprint[:12]})",
            f"use --tokenizer {found['name']}, or give --text-file to rebuild it",
        )
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    splits = {}
    for name in ("train", "val"):
        part, folder = metadata[name], data_dir / name
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        for extra in sorted(present - {entry["name"] for entry in part["shards"]}):
            raise _damaged(folder / extra, f"{METADATA_NAME} does not know it")
        digest.update(name.encode())
        for entry in part["shards"]:
            digest.update(entry["sha256"].encode())
        shards = verify_all(partial(verify_shard, folder, tokenizer), part["shards"])
        splits[name] = Split(tuple(shards), part["n_tokens"], part["n_documents"], part["n_bytes"])
    return DataFolder(
        data_dir,
        metadata,
        digest.hexdigest(),
        splits["train"],
        splits["val"],
        tokenizer.vocab_size,
        tokenizer.id_dtype,
    )


def check_long_enough(part: dict[str, Any], name: str, context_length: int) -> None:
    """PreflightError (TEXT) unless the metadata's `part` holds one window and the next token."""
    found = part["n_tokens"]
    if found <= context_length:
        what = {"train": "training", "val": "validation"}[name]
        mend = "a larger --val-split" if name == "val" else "a smaller --val-split"
        raise PreflightError(
            ExitCode.TEXT,
            f"the {what} part has {found:,} token{'s' * (found != 1)}, needs "
            f"{context_length + 1:,}: one window of --context-length {context_length} and the "
            "token behind it",
            f"give more text, a smaller --context-length, or {mend}",
        )


def _damaged(path: Path, what: str) -> PreflightError:
    return PreflightError(
        ExitCode.DATA,
        f"{path} is damaged: {what}",
        "give --text-file to rebuild the data folder, or restore the file",
    )


# ---- metadata -----------------------------------------------------------------------------------


def read_metadata(data_dir: Path) -> dict[str, Any]:
    """The metadata, with every key, type and range checked; PreflightError (DATA) otherwise."""
    path = data_dir / METADATA_NAME
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        metadata = parse_json(raw)
        if isinstance(metadata, dict) and metadata.get("format") == FORMAT:
            version = metadata.get("version")
            if isinstance(version, int) and version > VERSION:
                raise PreflightError(
                    ExitCode.DATA,
                    f"{data_dir} was made by a newer Preflight (format {version}, this one reads "
                    f"up to {VERSION})",
                    "use that one, or choose another --data-dir",
                )
        _check_schema(metadata, _SCHEMA, "metadata")
        if metadata["version"] != VERSION:
            raise ValueError("metadata.version is unknown")
        for name in SPLITS:
            shards = metadata[name]["shards"]
            for index, entry in enumerate(shards):
                if entry["name"] != f"shard_{index:05d}.npy":
                    raise ValueError(f"metadata.{name}: shard {index} has an unexpected name")
            if sum(entry["n_tokens"] for entry in shards) != metadata[name]["n_tokens"]:
                raise ValueError(f"metadata.{name}: n_tokens is not the sum over its shards")
        if render_metadata(metadata) != raw:
            raise ValueError("its checksum does not match its content")
    except OSError as error:
        raise PreflightError(
            ExitCode.DATA,
            f"{path}: {error.strerror}",
            "give --text-file to build the data folder",
        ) from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return metadata


def render_metadata(metadata: dict[str, Any]) -> bytes:
    """metadata.json's bytes; last in it a checksum of all else, so that any flipped bit shows."""
    content = {key: value for key, value in metadata.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": digest}, indent=2, allow_nan=False).encode() + b"\n"


def _check_schema(value: Any, schema: Any, where: str) -> None:
    """ValueError, naming the key, unless `value` is what `schema` says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            odd = (
                sorted(value.keys() ^ schema.keys())[:3]
                if isinstance(value, dict)
                else "(no object)"
            )
            raise ValueError(f"{where}: missing or unknown keys {odd}"[:200])
        for key in schema:
            _check_schema(value[key], schema[key], f"{where}.{key}")
    elif isinstance(schema, re.Pattern):
        if not isinstance(value, str) or not schema.fullmatch(value):
            raise ValueError(f"{where} is not {schema.pattern}")
    elif isinstance(value, bool) or not isinstance(
        value, list if isinstance(schema, list) else schema
    ):
        raise ValueError(f"{where} has the wrong type")
    elif isinstance(value, int) and not 0 <= value < 2**63:
        raise ValueError(f"{where} is out of range")
    elif isinstance(schema, list):
        for item in value:
            _check_schema(item, schema[0], where)


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


def verify_shard(folder: Path, tokenizer: Tokenizer, entry: dict[str, Any]) -> Shard:
    """Check size, header, SHA-256 and largest id of one shard in one read.

    Raises:
        PreflightError: code DATA when anything differs from its `entry` in the metadata.
    """
    path = folder / entry["name"]
    header = _build_npy_header(tokenizer.id_dtype, entry["n_tokens"])
    expected = len(header) + entry["n_tokens"] * tokenizer.id_dtype.itemsize
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if status.st_size != expected or entry["n_bytes"] != expected:
                raise _damaged(path, f"expected {expected:,} bytes, found {status.st_size:,}")
            head = file.read(len(header))
            digest, largest = hashlib.sha256(head), -1
            while block := file.read(_READ_BYTES):
                digest.update(block)
                whole = len(block) // tokenizer.id_dtype.itemsize * tokenizer.id_dtype.itemsize
                largest = max(largest, int(np.frombuffer(block[:whole], tokenizer.id_dtype).max()))
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    if digest.hexdigest() != entry["sha256"]:
        raise _damaged(
            path, f"its SHA-256 is {digest.hexdigest()[:12]}..., expected {entry['sha256'][:12]}..."
        )
    if head != header:
        raise _damaged(path, "its numpy header is not one of ours")
    if largest != entry["max_id"] or largest >= tokenizer.vocab_size:
        raise _damaged(
            path,
            f"its largest id is {largest}, expected {entry['max_id']}, "
            f"below {tokenizer.vocab_size}",
        )
    return Shard(path, entry["n_tokens"], len(header), (status.st_size, status.st_mtime_ns))


class ShardWriter:
    """One shard being written; it appears under its name when it is closed, or not at all."""

    def __init__(self, path: Path, dtype: np.dtype, capacity: int, bound: int) -> None:
        """`capacity`: tokens when full; `bound`: tokens that it can get at most."""
        self._n_tokens, self._max_id = 0, -1
        self._path, self._dtype, self._capacity = path, dtype, capacity
        header = _build_npy_header(dtype, capacity)
        self._digest = hashlib.sha256(header)
        self._opened = contextlib.ExitStack()
        size = len(header) + min(capacity, bound) * dtype.itemsize
        self._file = self._opened.enter_context(publish_file(path, size))
        self._file.write(header)

    @property
    def is_full(self) -> bool:
        """Whether it has no room left."""
        return self._n_tokens == self._capacity

    def write(self, ids: np.ndarray) -> int:
        """Take as many of the ids, of which there is one at least, as fit, and say how many."""
        ids = ids[: self._capacity - self._n_tokens]
        data = ids.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._max_id = max(self._max_id, int(ids.max()))
        self._n_tokens += len(ids)
        return len(ids)

    def close(self) -> dict[str, Any]:
        """Publish the shard and return its entry for the metadata."""
        self._file.truncate(self._file.tell())
        if not self.is_full:
            self._file.seek(0)
            self._file.write(_build_npy_header(self._dtype, self._n_tokens))
        self._opened.close()
        sha256 = self._digest.hexdigest() if self.is_full else hash_file(self._path)
        return {
            "name": self._path.name,
            "n_tokens": self._n_tokens,
            "n_bytes": self._path.stat().st_size,
            "sha256": sha256,
            "max_id": self._max_id,
        }

    def abandon(self, error: BaseException) -> None:
        """Delete what was written; PreflightError (STORAGE) when `error` is the disk's."""
        self._opened.__exit__(type(error), error, error.__traceback__)
