"""The processes (ranks) of one run: how they share its model, its batches and its decisions.

One engine for any number of them: FSDP2 (Zhao et al. 2023, arXiv:2304.11277), which keeps a part of
each parameter, gradient and optimizer state on each rank; over several hosts HSDP, which replicates
the parts of a host on the others. With one process every method is the identity, and
torch.distributed is not touched.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from preflight.core.errors import ExitCode, PreflightError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

# Longer than the slowest thing that one rank waits for another with: a compilation, a save.
TIMEOUT = datetime.timedelta(minutes=10)


class Ranks:
    """One process, which is the whole run.

    Attributes:
        rank: the number of this process, from 0.
        world: the number of processes.
        local_rank: the number of this process on its host: its card.
        hosts: the machines.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    hosts: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs, draws, locks, deletes and prints."""
        return self.rank == 0

    def shard(self, model: nn.Module) -> None:
        """Keep only this rank's part of each parameter of `model`, in place.

        Before an optimizer is built. Gradients are summed over the ranks, so that a loss divided
        by the targets of all ranks needs no further factor.
        """

    def share(self, n_rows: int) -> slice:
        """This rank's rows of a micro-step; the counts of the ranks differ by at most one."""
        first, end = (n_rows * rank // self.world for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def sync(self, model: nn.Module, last: bool) -> None:
        """Sum the gradients over the ranks after the `last` micro-step of an update alone."""

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum of each scalar over the ranks, all in one message."""
        return values

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The L2 norm of all gradients together, on every rank."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, which alone calls it, or its error, on every rank."""
        return function()

    def gather(self, value: T) -> list[T]:
        """A small plain value of each rank, in the order of the ranks, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Leave the other ranks."""


class JoinedRanks(Ranks):
    """One of several processes that have found each other."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        local_rank: int | None = None,
        hosts: int = 1,
        device_type: str = "cpu",
    ) -> None:
        """Join the others.

        Args:
            store: where the ranks find each other; no other group has used it.
            rank: of this process.
            world: processes of all hosts, as many on each.
            local_rank: of this process on its host; unset: `rank`.
            hosts: with more than one, each host keeps the whole model among its ranks.
            device_type: ``cuda``, where each rank has the card of its local rank, or ``cpu``.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.world, self.hosts = rank, world, hosts
        self.local_rank = rank if local_rank is None else local_rank
        self.device = torch.device(device_type)
        if device_type == "cuda":
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        shape = (world,) if hosts == 1 else (hosts, world // hosts)
        names = ("shard",) if hosts == 1 else ("replicate", "shard")
        self._mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)

    def shard(self, model: nn.Module) -> None:
        """As `Ranks.shard`: each of the model's `layers` by itself, then the rest.

        Without a policy of precision: parameters are gathered in fp32, and autocast casts them as
        on one card.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for block in model.get_submodule("layers").children():
            fully_shard(block, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def sync(self, model: nn.Module, last: bool) -> None:
        """As `Ranks.sync`; until then each rank keeps whole gradients of its own."""
        model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """As `Ranks.total`, summed in fp64."""
        import torch.distributed as dist

        together = torch.stack([value.detach().double() for value in values])
        dist.all_reduce(together)
        return tuple(summed.to(value.dtype) for summed, value in zip(together, values, strict=True))

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """As `Ranks.norm`. Squares are summed in fp64, so that it does not depend on the shards."""
        import torch.distributed as dist

        norms = [
            torch.linalg.vector_norm(get_local(p.grad), dtype=torch.float64)
            for p in parameters
            if p.grad is not None
        ]
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=self._mesh.get_group("shard"))
        return squares.sqrt().float()

    def decide(self, function: Callable[[], T]) -> T:
        """As `Ranks.decide`.

        Raises:
            PreflightError: that of rank 0; code INTERNAL where it failed in any other way.
        """
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                failure = error
                told = f"rank 0 failed: {type(error).__name__}: {error}"
                is_known = isinstance(error, PreflightError)
                outcome[1] = error if is_known else PreflightError(ExitCode.INTERNAL, told)
        dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """As `Ranks.gather`."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """As `Ranks.barrier`."""
        self.gather(None)

    def close(self) -> None:
        """As `Ranks.close`."""
        import torch.distributed as dist

        dist.destroy_process_group()


def get_local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_ranks() -> Ranks:
    """One process."""
    return Ranks()


def is_rank() -> bool:
    """Whether torch's launcher started this process as one of several, or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_ranks(device_type: str = "cpu") -> Ranks:
    """The ranks that torch's launcher started with this one.

    Each attempt of the launcher has names of its own in the store: otherwise ranks may find the
    addresses of those that were lost.
    """
    import torch.distributed as dist

    count = {name: int(os.environ[name]) for name in _LAUNCHER_VARIABLES}
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return JoinedRanks(
        dist.PrefixStore(f"preflight/{attempt}", store),
        rank,
        world,
        local_rank=count["LOCAL_RANK"],
        hosts=max(1, world // count["LOCAL_WORLD_SIZE"]),
        device_type=device_type,
    )


_LAUNCHER_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
