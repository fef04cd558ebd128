"""Tensors of a folder's safetensors files, in one or many parts, read one at a time.

A stranger may have written them. Headers are bounded and checked before a tensor is allocated; the
library then checks that the tensors cover the file exactly, so that no shape can ask for more
memory than the file has bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from preflight.checkpoints.damage import first_line
from preflight.checkpoints.weights import is_finite
from preflight.core import storage, strict_json

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_PARTS = 1000
_TYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is."""

    reader: Any
    shape: tuple[int, ...]
    kind: str


class TensorFiles:
    """The tensors of some files, by name.

    Attributes:
        sha256: of the file; of several, that of their hashes in the order of their names.
    """

    def __init__(self, places: dict[str, _Place], sha256: str) -> None:
        self._places = places
        self.sha256 = sha256

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def names(self) -> set[str]:
        """All names."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the header gives."""
        return self._places[name].shape

    def read(self, name: str) -> Tensor:
        """A copy of the tensor on the CPU.

        Raises:
            ValueError: it is not floating-point, or holds NaN or infinite values.
        """
        place = self._places[name]
        if place.kind not in _TYPES:
            raise ValueError(f"tensor {name[:80]!r} is of type {place.kind}, not floating-point")
        # Copied out of the memory map: if the file were cut short later, reading the map would
        # end the process with SIGBUS.
        tensor: Tensor = place.reader.get_tensor(name).clone()
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not is_finite(tensor):
            raise ValueError(f"tensor {name[:80]!r} holds NaN or infinite values")
        return tensor


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFiles]:
    """The tensors of a folder of Hugging Face.

    Raises:
        OSError: a file cannot be read.
        ValueError: there are none, or one is damaged.
    """
    with contextlib.ExitStack() as stack:
        places: dict[str, _Place] = {}
        hashes = []
        for name in _list_parts(folder):
            # A user's own link is followed: Hugging Face's cache consists of them.
            path = Path(os.path.realpath(folder / name))
            file: Any = stack.enter_context(storage.open_regular(path))
            try:
                _check_header(file)
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
                same = Path(f"/proc/self/fd/{file.fileno()}")
                reader = stack.enter_context(
                    safe_open(same if same.exists() else path, framework="pt", device="cpu")
                )
                found = _list_places(reader)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # the library raises several kinds, not all its own
                raise ValueError(f"{name} is not valid safetensors ({first_line(error)})") from None
            if places.keys() & found.keys():
                raise ValueError(f"{min(places.keys() & found.keys())[:80]!r} is in two parts")
            places |= found
        joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
        yield TensorFiles(places, hashes[0] if len(hashes) == 1 else joined)


def _list_places(reader: Any) -> dict[str, _Place]:
    slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
    return {
        name: _Place(reader, tuple(part.get_shape()), str(part.get_dtype()))
        for name, part in slices.items()
    }


def _check_header(file: Any) -> None:
    """Refuse a header that is too long or names a tensor twice; the file is at its beginning."""
    n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
        raise ValueError(f"its header claims {n_bytes:,} bytes")
    strict_json.parse_json(file.read(n_bytes))
    file.seek(0)


def _list_parts(folder: Path) -> list[str]:
    """The names of the files, each a plain name in the folder."""
    index = folder / INDEX_NAME
    if not index.exists():
        if not (folder / WEIGHTS_NAME).exists():
            raise ValueError(
                f"it has no {WEIGHTS_NAME}; pickles are not read: save it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        return [WEIGHTS_NAME]
    content = read_json_file(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{INDEX_NAME} has no weight_map")
    if not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{INDEX_NAME} names a file that is no text")
    names = sorted(set(parts.values()))
    if len(names) > _MAX_PARTS:
        raise ValueError(f"{INDEX_NAME} names {len(names):,} files")
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX_NAME} names the file {name[:60]!r}")
    return names


def read_json_file(path: Path) -> Any:
    """The content of a JSON file that a stranger may have written; links are followed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no strict JSON, or too long.
    """
    with storage.open_regular(Path(os.path.realpath(path))) as file:
        raw = file.read(strict_json.MAX_JSON_BYTES + 1)
    try:
        return strict_json.parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
