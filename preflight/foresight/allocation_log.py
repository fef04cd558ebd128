"""A log of every allocation of a computation, on fake tensors or on real ones."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preflight.device.ranks import get_local

ITEMS = (
    "weights",
    "gradients",
    "optimizer",
    "activations kept",
    "logits and loss",
    "gathered weights",
    "reduction",
    "temporary",
    "context and workspace",
    "headroom",
)
# Those that only a run on several ranks has.
RANK_ITEMS = ("gathered weights", "reduction")
# Which operations of torch.distributed use a buffer for what, by a part of their names.
_BUFFERS = {"allgather": "gathered weights", "reduce_scatter": "reduction"}
CUDA_BLOCK_BYTES = 512  # every CUDA allocation is a multiple of it

Region = tuple[str, str]  # phase, stretch of it
Peaks = dict[Region, dict[str, float]]  # bytes of each item at a stretch's highest moment


@dataclass(eq=False)
class _Storage:
    """One allocation; times are counts of operations, `freed` the last one that it lives through.

    `ref` is kept because a weak reference that is dropped never calls back.
    """

    size_bytes: int
    allocated: int
    freed: int | None = None
    item: str = "temporary"
    ref: Any = None


class AllocationLog(TorchDispatchMode):
    """Notes when each storage is allocated and freed; time is the count of operations.

    Every operation below autograd comes through `__torch_dispatch__`, those of the backward pass
    and of the optimizer too. What an operation returns is either a new storage or a view of a
    known one, which the storage's identity tells apart.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.on_cuda = device_type == "cuda"
        self.clock = 0
        self.in_backward = False
        self.is_paused = False
        self.storages: list[_Storage] = []
        self.marks: list[tuple[int, Region]] = []
        self._living: dict[int, _Storage] = {}  # by the id of torch's storage object

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a sharded tensor: what it does with its part comes here next
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        self.clock += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # `.item()`: fake tensors hold no number; "true", so that the step goes on
        if self.on_cuda and "flash_attention" in func.__name__ and "backward" in func.__name__:
            # FlashAttention-2 sums the query's gradient in fp32, and keeps a number a row.
            query = args[1]
            self._add(4 * query.numel() + 4 * query[..., 0].numel()).freed = self.clock
        self._label_buffers(func.__name__, args)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                record = self.find(leaf)
                # Autograd adds real gradients to the first of them in place, unless that is a view
                # (torch/csrc/autograd/input_buffer.cpp), but not those of tensor subclasses: there
                # the sum counts from the next operation on, when the first is free again.
                if (
                    self.in_backward
                    and func is torch.ops.aten.add.Tensor
                    and not torch.is_grad_enabled()
                    and not args[0]._is_view()
                ):
                    record.allocated = self.clock + 1
        return result

    def _label_buffers(self, operation: str, args: Any) -> None:
        for part, item in _BUFFERS.items():
            if part in operation:
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
                self.label([x for x in tensors if self.find(x).item == "temporary"], item)

    @contextlib.contextmanager
    def follow_resizes(self) -> Iterator[None]:
        """Note as well that a storage is resized: FSDP2 frees gathered weights by resizing to 0."""
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size_bytes: int) -> Any:
            resize(storage, size_bytes)
            self._resize(storage)

        torch.UntypedStorage.resize_ = resize_and_note  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextlib.contextmanager
    def leave_out_shapes(self) -> Iterator[None]:
        """Note nothing of what torch computes for the shape of a sharded tensor alone.

        It does so once for each operation, on whole tensors that no rank ever has.
        """
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        own = ShardingPropagator._fake_mode_lock
        ShardingPropagator._fake_mode_lock = _Pause(self)  # type: ignore[assignment]
        try:
            yield
        finally:
            ShardingPropagator._fake_mode_lock = own

    def _resize(self, storage: torch.UntypedStorage) -> None:
        """A resize lies between two operations: one record ends with the first of them."""
        old = self._living.get(id(storage))
        if old is None:
            return
        old.freed = self.clock
        new = self._living[id(storage)] = self._add(storage.nbytes())
        new.allocated, new.item, new.ref = self.clock + 1, "gathered weights", old.ref

    def find(self, tensor: Tensor) -> _Storage:
        """The record of a tensor's storage, made when it is new; of a sharded one, of its part."""
        with torch.no_grad():
            storage = get_local(tensor).untyped_storage()
        key = id(storage)
        if key not in self._living:
            self._living[key] = record = self._add(storage.nbytes())
            record.ref = weakref.ref(storage, lambda _: self._free(key))
        return self._living[key]

    def _add(self, size_bytes: int) -> _Storage:
        if self.on_cuda:
            size_bytes = -(-size_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        self.storages.append(_Storage(size_bytes, self.clock))
        return self.storages[-1]

    def _free(self, key: int) -> None:
        self._living.pop(key).freed = self.clock

    def mark(self, phase: str, stretch: str) -> None:
        """From the next operation on, time belongs to this stretch."""
        self.marks.append((self.clock + 1, (phase, stretch)))

    def label(self, tensors: list[Tensor], item: str) -> None:
        """Say what some tensors are for."""
        for tensor in tensors:
            self.find(tensor).item = item

    def label_since(self, since: int, item: str) -> None:
        """Say what all living storages allocated after `since` and without a label are for."""
        for record in self._living.values():
            if record.allocated > since and record.item == "temporary":
                record.item = item

    def peaks(self) -> Peaks:
        """The highest moment of each stretch; of stretches that repeat, the highest one."""
        # What each operation adds and frees; the running total is the memory at that operation.
        change = [0] * (self.clock + 2)
        for record in self.storages:
            change[record.allocated] += record.size_bytes
            if record.freed is not None:
                change[record.freed + 1] -= record.size_bytes
        best: dict[Region, tuple[int, int]] = {}  # total and time
        marks = iter([*self.marks, (self.clock + 2, ("", ""))])
        start, region = 0, ("", "")
        following, upcoming = next(marks)
        total = 0
        for time in range(self.clock + 1):
            # Several marks may stand at one operation: the last of them names the stretch.
            while time >= following:
                start, region = following, upcoming
                following, upcoming = next(marks)
            total += change[time]
            if time >= start and region[0]:
                best[region] = max(best.get(region, (-1, 0)), (total, time))
        return {region: self._itemise(time) for region, (_, time) in best.items()}

    def _itemise(self, time: int) -> dict[str, float]:
        items = dict.fromkeys(ITEMS, 0.0)
        for record in self.storages:
            if record.allocated <= time and (record.freed is None or record.freed >= time):
                items[record.item] += record.size_bytes
        return items


class _Pause:
    """Within, a log notes nothing; to be entered again and again."""

    def __init__(self, log: AllocationLog) -> None:
        self._log = log

    def __enter__(self) -> None:
        self._log.is_paused = True

    def __exit__(self, *unused: object) -> None:
        self._log.is_paused = False
