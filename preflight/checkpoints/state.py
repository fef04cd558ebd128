"""``checkpoint.pt``: the training state, tensors and plain types only."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from preflight.checkpoints.damage import damage_error, first_line
from preflight.core.errors import PreflightError

_OVERHEAD_BYTES = 2**20  # of the zip archive


def estimate_state_bytes(state: Any) -> int:
    """The bytes that `state` takes on disk, estimated rather high than low.

    Raises:
        TypeError: it holds something that is neither a tensor nor a plain type.
    """
    total, seen, pending = _OVERHEAD_BYTES, set(), [state]
    # A stack instead of recursion: a hostile file may nest deeply, or contain itself.
    while pending:
        item = pending.pop()
        total += 64
        if type(item) in (Tensor, torch.nn.Parameter):
            data = item.untyped_storage()
            if data.data_ptr() not in seen:
                seen.add(data.data_ptr())
                total += data.nbytes() + 512
        elif type(item) in (dict, OrderedDict, list, tuple):
            if id(item) not in seen:
                seen.add(id(item))
                pending.extend(item)
                pending.extend(item.values() if isinstance(item, dict) else ())
        elif type(item) in (str, bytes):
            total += 4 * len(item)
        elif item is not None and type(item) not in (bool, int, float):
            raise TypeError(f"{type(item).__name__} is not a plain type")
    return total


def read_state(path: Path, file: IO[bytes]) -> dict[str, Any]:
    """The training state of an opened file on the CPU. Nothing in the file is executed.

    Args:
        path: the file's, for messages.
        file: opened and verified, at its beginning.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    try:
        # torch stores its archives uncompressed: a compressed one could be a zip bomb.
        with zipfile.ZipFile(file) as archive:
            if any(
                item.compress_type or item.file_size > item.compress_size
                for item in archive.infolist()
            ):
                raise ValueError("it is compressed")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        estimate_state_bytes(state)
        if type(state) is not dict:
            raise ValueError("it is not a dict")
    except (PreflightError, MemoryError):
        raise
    except Exception as error:  # a hostile archive makes zipfile and torch raise any kind
        raise damage_error(
            path, f"not a training state of Preflight ({first_line(error)})"
        ) from None
    return state
