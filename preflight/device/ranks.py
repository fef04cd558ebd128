"""The processes (ranks) of one run: how they share its model, its batches and its decisions.

One engine for any number of them: FSDP2 (Zhao et al. 2023, arXiv:2304.11277), which keeps a part of
each parameter, gradient and optimizer state on each rank; over several hosts HSDP, which replicates
the parts of a host on the others. With one process every method is the identity, and
no group of processes is made.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device.heartbeat import Heartbeat

T = TypeVar("T")
N = TypeVar("N", int, float)

# Longer than the slowest thing that one rank waits for another with: a compilation, a save.
TIMEOUT = datetime.timedelta(minutes=10)
_LOOK_SECONDS = 0.2


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

    @property
    def shard_place(self) -> tuple[int, int]:
        """Which of how many shards of each parameter this rank holds."""
        return 0, 1

    @property
    def present(self) -> Ranks:
        """The processes that make the same calls now; where others are only planned, this one."""
        return self

    def shard(self, model: nn.Module) -> None:
        """Keep only this rank's part of each parameter of `model`, in place.

        Before an optimizer is built. Gradients are summed over the ranks, so that a loss divided
        by the targets of all ranks needs no further factor.
        """

    def share(self, n_rows: int) -> slice:
        """This rank's rows of a micro-step; the counts of the ranks differ by at most one."""
        first, end = (n_rows * rank // self.world for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def sync(self, model: Any, last: bool) -> None:
        """Sum the gradients over the ranks after the `last` micro-step of an update alone."""

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum of each scalar over the ranks, all in one message."""
        return values

    def add(self, value: N) -> N:
        """The sum of a number over the ranks."""
        return value

    def sum_up(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The sum of the ranks' losses, and the L2 norm of all gradients, all in one message."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return loss, torch.nn.utils.get_total_norm(gradients)

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, which alone calls it, or its error, on every rank."""
        return function()

    def gather(self, value: T) -> list[T]:
        """A small plain value of each rank, in the order of the ranks, on every rank."""
        return [value]

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return value

    def share_signals(self, stop: StopFlag) -> StopFlag:
        """`stop` as all ranks see it, so that all leave after the same step."""
        return stop

    def open_root(self, model: Any) -> AbstractContextManager[None]:
        """Within, methods of `model` besides `forward` find its parameters, as generation needs.

        All ranks call them alike, since each block gathers its own.
        """
        return contextlib.nullcontext()

    def seed_step(self, step: int) -> None:
        """Give each rank random numbers of its own in this step, for dropout."""

    def watched_step(self, may_compile: bool) -> AbstractContextManager[None]:
        """Within, whoever watches the ranks takes one that comes no further for one that hangs."""
        return contextlib.nullcontext()

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Leave the other ranks."""


class JoinedRanks(Ranks):
    """One of several processes that have found each other."""

    _heartbeat: Heartbeat | None = None

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        *,
        local_rank: int | None = None,
        hosts: int = 1,
        device_type: str = "cpu",
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Join the others.

        Args:
            store: where the ranks find each other; no other group has used it.
            rank: of this process.
            world: processes of all hosts, as many on each.
            local_rank: of this process on its host; unset: `rank`.
            hosts: with more than one, each host keeps the whole model among its ranks.
            device_type: ``cuda``, where each rank has the card of its local rank, or ``cpu``.
            heartbeat: of this process, if anyone watches it.
        """
        self._heartbeat = heartbeat
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
        if heartbeat is not None:
            groups = {*self._mesh.get_all_groups(), dist.group.WORLD}
            heartbeat.count_calls([group for group in groups if group is not None])

    @property
    def shard_place(self) -> tuple[int, int]:
        """As `Ranks.shard_place`."""
        return self._mesh.get_local_rank("shard"), self._mesh["shard"].size()

    def shard(self, model: nn.Module) -> None:
        """As `Ranks.shard`: each of the model's `layers` by itself, then the rest.

        Without a policy of precision: parameters are gathered in fp32, and autocast casts them as
        on one card.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._seed = torch.initial_seed()
        for block in model.get_submodule("layers").children():
            fully_shard(block, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def sync(self, model: Any, last: bool) -> None:
        """As `Ranks.sync`; until then each rank keeps whole gradients of its own."""
        model.set_requires_gradient_sync(last)

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """As `Ranks.total`, summed in fp64."""
        together = torch.stack([value.detach().double() for value in values])
        dist.all_reduce(together)
        return tuple(summed.to(value.dtype) for summed, value in zip(together, values, strict=True))

    def add(self, value: N) -> N:
        """As `Ranks.add`, in fp64: exact for whole numbers up to 2^53."""
        (total,) = self.total(torch.tensor(value, dtype=torch.float64))
        return type(value)(total)

    def sum_up(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """As `Ranks.sum_up`, in fp64, so that the norm does not depend on the shards."""
        norms = [
            torch.linalg.vector_norm(get_local(p.grad), dtype=torch.float64)
            for p in parameters
            if p.grad is not None
        ]
        squares = torch.stack(norms).square().sum()
        loss, squares = self.total(loss, squares)
        return loss, (squares / self.hosts).sqrt().float()  # each host has all gradients

    def decide(self, function: Callable[[], T]) -> T:
        """As `Ranks.decide`.

        Raises:
            PreflightError: that of rank 0; code INTERNAL where it failed in any other way.
        """
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
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """As `Ranks.any`."""
        return self.add(int(value)) > 0

    def share_signals(self, stop: StopFlag) -> StopFlag:
        """As `Ranks.share_signals`."""
        return SharedStop(stop, self)

    @contextlib.contextmanager
    def open_root(self, model: Any) -> Iterator[None]:
        """As `Ranks.open_root`."""
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def seed_step(self, step: int) -> None:
        """As `Ranks.seed_step`, from the seed of the model's initialisation."""
        sequence = np.random.SeedSequence([self._seed, step, self.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def watched_step(self, may_compile: bool) -> AbstractContextManager[None]:
        """As `Ranks.watched_step`."""
        if self._heartbeat is None:
            return super().watched_step(may_compile)
        return self._heartbeat.step(may_compile)

    def barrier(self) -> None:
        """As `Ranks.barrier`."""
        self.gather(None)

    def close(self) -> None:
        """As `Ranks.close`."""
        if self._heartbeat is not None:  # it asks the groups how far they are
            self._heartbeat.stop()
        dist.destroy_process_group()


class PlannedRanks(Ranks):
    """Ranks that are to come. Until then one process acts for them.

    Of a state that they will hold together, it looks at the first shard alone.
    """

    def __init__(self, world: int, hosts: int = 1) -> None:
        self.world, self.hosts = world, hosts

    @property
    def shard_place(self) -> tuple[int, int]:
        """As `Ranks.shard_place`."""
        return 0, max(1, self.world // self.hosts)

    @property
    def present(self) -> Ranks:
        """As `Ranks.present`."""
        return local_ranks()


class SharedStop(StopFlag):
    """The signals of all ranks, as they were when the ranks last agreed on them.

    Args:
        own: the signals of this process.
        ranks: all of them.
    """

    def __init__(self, own: StopFlag, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        super().__init__()

    @property
    def save_requested(self) -> bool:
        """Whether this process was asked to save."""
        return self._own.save_requested

    @save_requested.setter
    def save_requested(self, value: bool) -> None:
        self._own.save_requested = value

    def agree(self) -> bool:
        """As `StopFlag.agree`: the first signal that the lowest rank was sent holds for all."""
        if self._ranks.any(self._own.stopping):
            received = [number for number in self._ranks.gather(self._own.received) if number]
            self.received = received[0]
        return self.stopping


def get_local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_ranks() -> Ranks:
    """One process."""
    return Ranks()


def plan_ranks(world: int, hosts: int = 1) -> Ranks:
    """So many processes, of which this one only knows the number."""
    return PlannedRanks(world, hosts) if world > 1 else Ranks()


def is_rank() -> bool:
    """Whether torch's launcher started this process as one of several, or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def separate_names(store: dist.Store) -> dist.Store:
    """The names in a store of the launcher's present attempt.

    In those of an attempt before, ranks may find the addresses of others that were lost.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"preflight/{attempt}", store)


class Meeting:
    """Where the ranks that torch's launcher started with this one find each other."""

    def __init__(self) -> None:
        store, self.rank, self.world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        self.ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
        self.hosts = max(1, self.world // self.ranks_here)
        self.store = separate_names(store)

    def join(self, device_type: str, heartbeat: Heartbeat | None = None) -> Ranks:
        """Join the others, who all do."""
        return JoinedRanks(
            self.store,
            self.rank,
            self.world,
            local_rank=int(os.environ["LOCAL_RANK"]),
            hosts=self.hosts,
            device_type=device_type,
            heartbeat=heartbeat,
        )

    def announce_prepared(self) -> None:
        """Tell the others that what they need is there."""
        self.store.set("prepared", "1")

    def wait_for_preparation(self, stop: StopFlag) -> None:
        """Wait until rank 0 has announced it, however long that takes.

        Raises:
            PreflightError: code SIGTERM or SIGINT, after a signal.
        """
        while not self.store.check(["prepared"]):
            stop.leave_if_stopping()
            time.sleep(_LOOK_SECONDS)

    def is_first_to(self, act: str) -> bool:
        """Whether no other rank has asked this of the same act."""
        try:
            return self.store.add(act, 1) == 1
        except RuntimeError:  # the launcher, which keeps the store, has gone
            return True


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
