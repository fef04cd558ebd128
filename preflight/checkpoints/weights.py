"""Safetensors files: the header, the tensors in order, and how they are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from preflight.checkpoints.damage import damage_error, first_line
from preflight.checkpoints.rows import Rows
from preflight.core import strict_json
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema

Shapes = dict[str, tuple[int, ...]]
Holder = TypeVar("Holder", Tensor, Rows, Tensor | Rows)


class _TensorEntry(Schema):
    """What a header says of one tensor, and what is read of it here."""

    shape: list[Annotated[int, Field(ge=0, lt=2**63)]]


_MAX_HEADER_BYTES = 16 * 2**20
WEIGHT_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# An optimizer may count, too.
STATE_DTYPES = WEIGHT_DTYPES | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}


def build_header(weights: dict[str, Tensor]) -> bytes:
    """The safetensors header of `weights`.

    Raises:
        PreflightError: code DIVERGED, when a weight is not finite.
        ValueError: a tensor is not floating-point.
    """
    header, _ = lay_out(weights, WEIGHT_DTYPES)
    check_finite(weights)
    return header


def lay_out(
    tensors: Mapping[str, Tensor | Rows], dtype_names: Mapping[torch.dtype, str]
) -> tuple[bytes, dict[str, int]]:
    """The safetensors header of `tensors`, and where each of them begins in the file.

    It is built here because the library builds the whole file in memory, twice. With a header of
    our own, a part at a time is copied to the host, and several ranks write at once.

    Raises:
        ValueError: a tensor is of another type than `dtype_names` has.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name, tensor in _sort_tensors(tensors):
        if name in header or tensor.dtype not in dtype_names:
            raise ValueError(f"cannot store the tensor {name!r} of {tensor.dtype}")
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": dtype_names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offsets[name], offset = offset, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    raw = len(raw).to_bytes(8, "little") + raw
    return raw, {name: len(raw) + offset for name, offset in offsets.items()}


def check_finite(weights: Mapping[str, Tensor | Rows]) -> None:
    """Refuse to save weights that are not finite: PreflightError, code DIVERGED."""
    for name, tensor in _sort_tensors(weights):
        if not is_finite(tensor.values if isinstance(tensor, Rows) else tensor):
            raise PreflightError(
                ExitCode.DIVERGED,
                f"the weights {name} are not finite: nothing was saved",
                "earlier checkpoints are kept; lower --learning-rate, then run the command again",
            )


def iterate_bytes(weights: dict[str, Tensor]) -> Iterator[Any]:
    """The bytes of each tensor on the host, in the order of the header."""
    for _, tensor in _sort_tensors(weights):
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _sort_tensors(tensors: Mapping[str, Holder]) -> list[tuple[str, Holder]]:
    """Widest type first, as the library sorts them: every tensor is then aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinite. `aminmax` propagates NaN and takes a tenth of `isfinite`'s time."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _read_header(path: Path, file: IO[bytes]) -> Any:
    """The header of an opened file, which is then at the end of it.

    Raises:
        PreflightError: code CHECKPOINT, for one that is too large or not strict JSON.
    """
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
        raise damage_error(path, f"its header claims {header_bytes:,} bytes")
    try:
        # The library takes the last of two tensors of one name.
        return strict_json.parse_json(file.read(header_bytes))
    except ValueError as error:
        raise damage_error(path, f"not valid safetensors ({first_line(error)})") from None


def read_shapes(path: Path, file: IO[bytes]) -> Shapes:
    """What the header of an opened file says of its tensors. None of them is read.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    try:
        tensors = {
            name: _TensorEntry.read(entry)
            for name, entry in dict(_read_header(path, file)).items()
            if name != "__metadata__"
        }
    except (TypeError, ValueError) as error:
        raise damage_error(path, f"not valid safetensors ({first_line(error)})") from None
    return {name: tuple(entry.shape) for name, entry in tensors.items()}


def read_weights(
    path: Path,
    file: IO[bytes],
    rename: Callable[[str], str],
    expected_shapes: Shapes | None,
    rows: Mapping[str, slice] | None = None,
    dtypes: Collection[torch.dtype] = WEIGHT_DTYPES.keys(),
) -> dict[str, Tensor]:
    """The tensors of an opened file on the CPU, checked; see `format.load_weights`.

    Args:
        path: the file's, for messages.
        file: opened and verified, at its beginning.
        rename: from a tensor's name in the file to the model's name for it.
        expected_shapes: by the model's names; None accepts all.
        rows: of each tensor that is not read whole, by the model's names.
        dtypes: that a tensor may have.
    """
    _read_header(path, file)
    # On Linux this path opens the very file that was hashed, also where the real path is not
    # UTF-8, which the library refuses.
    same_file = Path(f"/proc/self/fd/{file.fileno()}")
    rows = rows or {}
    try:
        with safe_open(
            same_file if same_file.exists() else path, framework="pt", device="cpu"
        ) as reader:
            names = {rename(name): name for name in reader.keys()}  # noqa: SIM118
            shapes = {new: tuple(reader.get_slice(old).get_shape()) for new, old in names.items()}
            _check_shapes(path, shapes, shapes if expected_shapes is None else expected_shapes)
            # Copied out of the memory map: if the file were cut short later, reading the map
            # would end the process with SIGBUS.
            weights = {
                new: (
                    reader.get_slice(old)[rows[new]] if new in rows else reader.get_tensor(old)
                ).clone()
                for new, old in names.items()
            }
    except (PreflightError, MemoryError):
        raise
    except Exception as error:  # the library raises several kinds, and not all are its own
        raise damage_error(path, f"not valid safetensors ({first_line(error)})") from None
    for name, tensor in weights.items():
        if tensor.dtype not in dtypes:
            raise damage_error(path, f"tensor {name[:80]!r} is {tensor.dtype}, not floating-point")
        # Models compute in fp32 at most, where a large number of fp64 is infinite.
        if not is_finite(tensor.float() if tensor.dtype == torch.float64 else tensor):
            raise damage_error(path, f"tensor {name[:80]!r} holds NaN or infinite values")
    return weights


def _check_shapes(path: Path, found: Shapes, expected: Shapes) -> None:
    different = [
        f"{name[:60]}: checkpoint {found.get(name, 'none')}, model {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or found[name] != tuple(expected[name])
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path}: its tensors are not those of this model",
            "; ".join(different[:3]) + more,
            "nothing was loaded; leave the model flags out: the checkpoint holds its own",
        )
