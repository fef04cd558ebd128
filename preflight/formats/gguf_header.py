"""The header of a GGUF file, read within bounds: a stranger may have written it.

    "GGUF", version, number of tensors, number of keys
    keys: name, type, value; a value may be an array of numbers or of strings
    tensors: name, dimensions (innermost first), type, offset
    padding, then the tensors, each at a multiple of the alignment

Source: ggml's docs/gguf.md, versions 2 and 3, little endian. A count or a length is believed only
where as many bytes are left in the file, and every tensor lies inside it and beside the others.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from preflight.core.errors import ExitCode, PreflightError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 4096
_MAX_TENSORS = 2**16
_MAX_NAME_BYTES = 1024
_MAX_STRING_BYTES = 2**20  # a chat template
_MAX_ITEMS = 2**21  # of an array: the largest vocabularies have 262,144 tokens
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class TensorKind(NamedTuple):
    """A type of tensor: `block_bytes` hold `block_size` numbers, which are neighbours in a row."""

    name: str
    block_size: int
    block_bytes: int

    def count_bytes(self, n_numbers: int) -> int:
        """Bytes of whole rows with so many numbers."""
        return n_numbers // self.block_size * self.block_bytes


# The types that are read, by their number in a file (ggml.h); the sizes are those of ggml-common.h.
TENSOR_KINDS = {
    0: TensorKind("F32", 1, 4),
    1: TensorKind("F16", 1, 2),
    2: TensorKind("Q4_0", 32, 18),
    3: TensorKind("Q4_1", 32, 20),
    6: TensorKind("Q5_0", 32, 22),
    7: TensorKind("Q5_1", 32, 24),
    8: TensorKind("Q8_0", 32, 34),
    10: TensorKind("Q2_K", 256, 84),
    11: TensorKind("Q3_K", 256, 110),
    12: TensorKind("Q4_K", 256, 144),
    13: TensorKind("Q5_K", 256, 176),
    14: TensorKind("Q6_K", 256, 210),
    30: TensorKind("BF16", 1, 2),
}
KINDS = {kind.name: kind for kind in TENSOR_KINDS.values()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file.

    Attributes:
        shape: outermost dimension first, as torch has it.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    offset: int

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return self.kind.count_bytes(math.prod(self.shape))


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors begin.

    Attributes:
        keys: values by name: numbers, strings, lists of strings, arrays of numbers.
        tensors: by name, in the order of the file.
    """

    keys: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(path: Path, file: IO[bytes]) -> Header:
    """The header of an opened file, every part of it checked.

    Args:
        path: the file's, for messages.
        file: at its beginning.

    Raises:
        PreflightError: code CHECKPOINT, naming what is impossible.
    """
    try:
        return _read(_Cursor(file))
    except ValueError as error:
        raise build_error(path, f"no usable GGUF file: {error}") from None


def build_error(path: Path, what: str) -> PreflightError:
    """That the file at `path` cannot be imported: code CHECKPOINT."""
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{path}: {what}",
        "nothing was imported; fetch the file again, or choose another one",
    )


def _read(cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.unpack("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, not 2 or 3 in little endian")
    n_tensors, n_keys = cursor.unpack("Q"), cursor.unpack("Q")
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        raise ValueError(f"it claims {n_tensors:,} tensors and {n_keys:,} keys")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name = cursor.take_text(_MAX_NAME_BYTES)
        if name in keys:
            raise ValueError(f"key {name!r} is given twice")
        keys[name] = _read_value(cursor, cursor.unpack("I"))
    alignment = keys.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not (_is_count(alignment) and alignment <= _MAX_ALIGNMENT and alignment.bit_count() == 1):
        raise ValueError("general.alignment is no power of two up to 65,536")
    entries = [_read_entry(cursor, alignment) for _ in range(n_tensors)]
    if len({entry.name for entry in entries}) < n_tensors:
        raise ValueError("two tensors have the same name")
    begin = -(-cursor.position // alignment) * alignment
    tensors = {
        entry.name: TensorEntry(entry.name, entry.shape, entry.kind, begin + entry.offset)
        for entry in entries
    }
    _check_places(list(tensors.values()), cursor.size)
    return Header(keys, tensors)


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind])
    if kind == _STRING:
        return cursor.take_text(_MAX_STRING_BYTES)
    if kind != _ARRAY:
        raise ValueError(f"a value is of the unknown type {kind}")
    kind, n_items = cursor.unpack("I"), cursor.unpack("Q")
    if n_items > _MAX_ITEMS:
        raise ValueError(f"an array claims {n_items:,} items")
    if kind == _STRING:
        cursor.require(8 * n_items)  # the lengths alone
        return [cursor.take_text(_MAX_STRING_BYTES) for _ in range(n_items)]
    if kind not in _SCALARS:
        raise ValueError(f"an array holds the type {kind}")
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    if kind == 7:
        dtype = np.dtype(np.uint8)  # any byte is a truth value
    return np.frombuffer(cursor.take(n_items * dtype.itemsize), dtype)


def _read_entry(cursor: _Cursor, alignment: int) -> TensorEntry:
    """A tensor, with its offset as the file has it: from where the tensors begin."""
    name = cursor.take_text(_MAX_NAME_BYTES)
    n_dimensions = cursor.unpack("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {n_dimensions} dimensions")
    shape = tuple(cursor.unpack("Q") for _ in range(n_dimensions))[::-1]
    number, offset = cursor.unpack("I"), cursor.unpack("Q")
    kind = TENSOR_KINDS.get(number)
    if kind is None:
        raise ValueError(f"tensor {name[:80]!r} is of type {number}, which is not read here")
    if shape[-1] % kind.block_size:
        raise ValueError(f"tensor {name[:80]!r}: {kind.name} needs rows of {kind.block_size}s")
    if offset % alignment:
        raise ValueError(f"tensor {name[:80]!r} is not aligned")
    return TensorEntry(name, shape, kind, offset)


def _check_places(entries: list[TensorEntry], size: int) -> None:
    """Every tensor has content, lies in a file of `size` bytes, and shares none of it."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        name = repr(entry.name[:80])
        if not entry.n_bytes:
            raise ValueError(f"tensor {name} is empty")
        if entry.offset < end:
            raise ValueError(f"tensors {before} and {name} overlap")
        end, before = entry.offset + entry.n_bytes, name
        if end > size:
            raise ValueError(
                f"tensor {name} ends at byte {end:,} of {size:,}: the file is cut short"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Cursor:
    """Reads a file from its beginning, and never asks for more than is left in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.position = 0
        self.size = os.fstat(file.fileno()).st_size

    def require(self, n_bytes: int) -> None:
        """Raise `ValueError` where fewer bytes are left."""
        if n_bytes > self.size - self.position:
            raise ValueError(f"cut short at byte {self.size:,}, or a length in it is wrong")

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        self.require(n_bytes)
        content = self._file.read(n_bytes)
        if len(content) < n_bytes:
            raise ValueError("it was cut while it was read")
        self.position += n_bytes
        return content

    def unpack(self, code: str) -> Any:
        """The next number, of this type of `struct`."""
        [value] = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def take_text(self, limit: int) -> str:
        """The next string, of at most `limit` bytes."""
        n_bytes = self.unpack("Q")
        if n_bytes > limit:
            raise ValueError(f"a string claims {n_bytes:,} bytes")
        return self.take(n_bytes).decode()  # UnicodeDecodeError is a ValueError
