"""The rows of a tensor that one rank holds: a range of its bytes.

A tensor is sharded over its first dimension, as FSDP2 does. Consecutive rows are consecutive bytes
of the whole tensor, so that a rank can write or read them in the file of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.checkpoints.ranks import Ranks


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor; of one without dimensions, that is a single row.

    Attributes:
        values: (rows ...) on any device.
        shape: of the whole tensor.
        first: the number of the first of them.
    """

    values: Tensor
    shape: tuple[int, ...]
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the whole tensor."""
        return self.values.dtype

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def start_bytes(self) -> int:
        """Bytes of the whole tensor before these rows."""
        return self.first * math.prod(self.shape[1:]) * self.dtype.itemsize

    def iterate_bytes(self, limit_bytes: int) -> Iterator[memoryview]:
        """All bytes on the host, one piece after the other.

        No more than `limit_bytes` are copied at once, unless a row of a tensor that is not
        contiguous has more.
        """
        values = self.values.detach()
        if values.is_contiguous():
            values = values.reshape(-1)
        row_bytes = math.prod(values.shape[1:]) * self.dtype.itemsize
        for piece in values.split(max(1, limit_bytes // max(row_bytes, 1))):
            if piece.numel():
                host = piece.cpu().contiguous().reshape(-1).view(torch.uint8)
                yield memoryview(host.numpy())


def split_rows(n_rows: int, index: int, count: int) -> slice:
    """The rows of shard `index` of `count`, as FSDP2 splits them (`torch.chunk`)."""
    size = -(-n_rows // count)
    return slice(min(index * size, n_rows), min((index + 1) * size, n_rows))


def find_rows(tensor: Tensor) -> tuple[slice, bool]:
    """The rows of a sharded tensor (DTensor) that are here, and whether this copy is the first.

    Any other tensor has all its rows here.

    Raises:
        ValueError: it is not sharded over its first dimension alone.
    """
    n_rows = tensor.shape[0] if tensor.dim() else 1
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return slice(0, n_rows), True
    rows, is_first_copy = slice(0, n_rows), True
    shards = 0
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        index = mesh.get_coordinate()[dimension]
        if placement.is_shard(0):
            shards += 1
            rows = split_rows(n_rows, index, mesh.size(dimension))
        elif placement.is_replicate():
            is_first_copy = is_first_copy and index == 0
        else:
            shards = 2
    if shards > 1:
        raise ValueError(f"cannot store a tensor that is sharded by {tensor.placements}")  # type: ignore[attr-defined]
    return rows, is_first_copy


def list_rows(tensors: Mapping[str, Tensor]) -> dict[str, slice]:
    """The rows that are here of each sharded tensor; others are left out."""
    sharded = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "to_local")}
    return {name: find_rows(tensor)[0] for name, tensor in sharded.items()}


def take_rows(tensors: Mapping[str, Tensor | Rows], ranks: Ranks) -> dict[str, Rows]:
    """What this rank writes of each tensor: its rows of a sharded one.

    Rank 0 alone writes a tensor that every rank has whole, and the first copy alone is written of
    rows that several ranks have.
    """
    return {
        name: tensor if isinstance(tensor, Rows) else _take_rows(tensor, ranks)
        for name, tensor in tensors.items()
    }


def _take_rows(tensor: Tensor, ranks: Ranks) -> Rows:
    rows, is_mine = find_rows(tensor)
    local, shape = tensor.detach(), tuple(tensor.shape)
    if hasattr(local, "to_local"):
        local = local.to_local()
    else:
        is_mine = ranks.rank == 0
    local = local if shape else local.reshape(1)
    if len(local) != rows.stop - rows.start:
        raise ValueError(f"{len(local)} rows of {shape} are here, not {rows}")
    return Rows(local if is_mine else local[:0], shape, rows.start)


def wrap_rows(values: Tensor, like: Tensor) -> Tensor:
    """`values` as the rows of a tensor that is sharded like `like`; whole ones as they are.

    Raises:
        ValueError: they are not as many rows as `like` has here.
    """
    if not hasattr(like, "to_local"):
        return values
    from torch.distributed.tensor import DTensor

    local = like.to_local()
    if values.shape != local.shape:
        raise ValueError(f"rows of {tuple(values.shape)}, where {tuple(local.shape)} are here")
    return DTensor.from_local(
        values.to(local.device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
