"""``checkpoint.pt``: the training state, tensors and plain types only.

`torch.save` writes the file: a zip archive, uncompressed, of a pickle and of one entry of raw bytes
for each tensor. It is read here and not by `torch.load`, which calls some fifty functions that a
pickle may name, with any arguments, and accepts tensors that overlap or repeat their memory. This
reader obeys only what `torch.save` needs for plain types and whole tensors. What it allocates is
bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from preflight.checkpoints.damage import damage_error, first_line
from preflight.checkpoints.weights import is_finite
from preflight.core.errors import PreflightError

_OVERHEAD_BYTES = 2**20  # of the zip archive
_MAX_DEPTH = 32
# Bounds the archive's directory, of about 100 bytes for each tensor, and the pickle, of about 300.
_MAX_READ_BYTES = 4 * 2**20
_STORAGE_NAMES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


def estimate_state_bytes(state: Any) -> int:
    """The bytes that `state` takes on disk, estimated rather high than low.

    Raises:
        TypeError: it holds something that is neither a whole tensor nor a plain type.
    """
    total, pending = _OVERHEAD_BYTES, [(state, 0)]
    while pending:
        item, depth = pending.pop()
        total += 64
        if depth > _MAX_DEPTH:
            raise TypeError("the state is nested too deeply, or contains itself")
        if type(item) is Tensor:
            if item.dtype not in _STORAGE_NAMES.values() or item.requires_grad:
                raise TypeError(f"a tensor of {item.dtype} is not a plain type")
            if not item.is_contiguous() or item.nbytes != item.untyped_storage().nbytes():
                raise TypeError("a tensor that is only a part of its memory is not a plain type")
            total += item.nbytes + 512
        elif type(item) in (dict, list, tuple):
            pending.extend((part, depth + 1) for part in item)
            pending.extend((v, depth + 1) for v in (item.values() if type(item) is dict else ()))
        elif type(item) is str:
            total += 4 * len(item)
        elif item is not None and type(item) not in (bool, int, float):
            raise TypeError(f"{type(item).__name__} is not a plain type")
    return total


def read_state(path: Path, file: IO[bytes]) -> dict[str, Any]:
    """The training state of an opened file on the CPU. Nothing in the file is executed.

    Every tensor is finite, contiguous and alone in its memory. No container is shared.

    Args:
        path: the file's, for messages.
        file: opened and verified, at its beginning.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    try:
        with _BoundedFile(file.fileno(), closefd=False) as raw, zipfile.ZipFile(raw) as archive:
            state = _StateReader(archive, os.fstat(file.fileno()).st_size).read()
        if type(state) is not dict:
            raise ValueError("it is not a dict")
    except (PreflightError, MemoryError):
        raise
    except Exception as error:  # a hostile archive makes zipfile and pickle raise any kind
        raise damage_error(
            path, f"not a training state of Preflight ({first_line(error)})"
        ) from None
    return state


class _BoundedFile(io.FileIO):
    """A file that refuses long reads: `zipfile` reads an archive's whole directory at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # where the end of the directory is looked for
            size = _MAX_READ_BYTES
        if size > _MAX_READ_BYTES:
            raise ValueError(f"its directory of {size:,} bytes is too large")
        return super().read(size) or b""


class _StateReader:
    """Reads one archive. Any exception means that it is not what `torch.save` wrote."""

    def __init__(self, archive: zipfile.ZipFile, size_bytes: int) -> None:
        entries = archive.infolist()
        self._archive = archive
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("it names an entry twice")
        # A compressed archive, or one whose entries overlap, could be far larger than its file.
        if any(e.compress_type or e.file_size != e.compress_size for e in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > size_bytes:
            raise ValueError("its entries are larger than the file")
        (self._folder,) = (n[: -len("data.pkl")] for n in self._entries if n.endswith("/data.pkl"))
        if self._read_entry("byteorder") != sys.byteorder.encode():
            raise ValueError("its byte order is not this machine's")
        self._items_left = 0

    def read(self) -> Any:
        """The state."""
        pickled = self._read_entry("data.pkl")
        self._items_left = len(pickled)  # each takes a byte at least, unless it is shared
        return self._realise(_PlainUnpickler(io.BytesIO(pickled)).load(), depth=0)

    def _read_entry(self, name: str) -> bytes:
        entry = self._entries[self._folder + name]
        if entry.file_size > _MAX_READ_BYTES:
            raise ValueError(f"{name} of {entry.file_size:,} bytes is too large")
        return self._archive.read(entry)

    def _realise(self, item: Any, depth: int) -> Any:
        """A copy of `item` in which tensors take the place of their descriptions."""
        self._items_left -= 1
        if self._items_left < 0 or depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply, or contains a part many times")
        if type(item) is dict:
            if any(type(key) not in (str, int) for key in item):
                raise ValueError("a key is neither a text nor a whole number")
            return {key: self._realise(value, depth + 1) for key, value in item.items()}
        if type(item) in (list, tuple):
            return type(item)(self._realise(value, depth + 1) for value in item)
        if type(item) is _StoredTensor:
            return self._read_tensor(item)
        if item is None or type(item) in (bool, int, float, str):
            return item
        raise ValueError(f"{type(item).__name__} is not a plain type")

    def _read_tensor(self, stored: _StoredTensor) -> Tensor:
        name = f"{self._folder}data/{stored.key}"
        entry = self._entries.pop(name)  # popped, so that no two tensors share their memory
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if tensor.nbytes != entry.file_size:
            raise ValueError(f"{name} has {entry.file_size:,} bytes, not {tensor.nbytes:,}")
        content, at = tensor.view(-1).view(torch.uint8).numpy(), 0
        source: Any
        with self._archive.open(entry) as source:
            while count := source.readinto(content[at : at + _MAX_READ_BYTES]):
                at += count
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError("a tensor holds NaN or infinite values")
        return tensor


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor that is not read yet: the archive's entry ``data/<key>``."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def describe(
        cls,
        storage: Any,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool,
        hooks: Any,
    ) -> _StoredTensor:
        """From the arguments of torch's own ``_rebuild_tensor_v2``, for a whole tensor only."""
        kind, dtype, key, _, numel = storage
        expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        # The stride of a dimension of size one has no meaning.
        is_whole = numel == 0 or all(
            size == 1 or found == stride
            for size, found, stride in zip(shape, strides, expected, strict=True)
        )
        is_count = all(type(size) is int and 0 <= size < 2**48 for size in (*shape, numel))
        if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str:
            raise ValueError("a tensor's memory is described wrongly")
        if not is_whole or not is_count or offset != 0 or numel != math.prod(shape):
            raise ValueError("a tensor is only a part of its memory, or repeats it")
        if requires_grad is not False or hooks:
            raise ValueError("a tensor has a gradient or hooks")
        return cls(key, dtype, tuple(shape))


class _PlainUnpickler(pickle._Unpickler):
    """Understands plain types and descriptions of tensors, and calls nothing else.

    In Python, not in C: there a pickle of few bytes can ask for a memo of gigabytes.
    """

    dispatch: ClassVar = {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
        for opcode in (
            *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE),
            *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BINUNICODE),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINPERSID),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for: one of two functions, or the type of a tensor's elements."""
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _StoredTensor.describe
        if module == "torch" and name in _STORAGE_NAMES:
            return _STORAGE_NAMES[name]
        raise ValueError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """The tuple that stands for a tensor's memory."""
        return pid
