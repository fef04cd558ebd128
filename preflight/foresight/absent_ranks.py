"""The first of ranks that do not exist, for a trace of its memory.

torch's `fake` process group has any number of ranks and communicates nothing, so that FSDP2 makes
every buffer of a real run on fake tensors, in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from preflight.device.ranks import JoinedRanks, Ranks, local_ranks


@dataclass(frozen=True)
class Sharing:
    """How ranks share a model.

    Attributes:
        world: ranks of all hosts together.
        hosts: with more than one, each host keeps the whole model among its ranks (HSDP).
        keeps_gathered: weights stay gathered from the forward to the backward pass
            (``reshard_after_forward=False``): less communication, more memory.
        sums_each_micro_step: gradients are summed over the ranks after each micro-step instead of
            after the last one: more communication, less memory.
    """

    world: int = 1
    hosts: int = 1
    keeps_gathered: bool = False
    sums_each_micro_step: bool = False

    @property
    def ranks_per_host(self) -> int:
        """Ranks that share one copy of the model."""
        return self.world // self.hosts

    def describe(self) -> str:
        """``64, 8 on each of 8 hosts``."""
        if self.hosts == 1:
            return f"{self.world:,} on one host"
        return f"{self.world:,}, {self.ranks_per_host:,} on each of {self.hosts:,} hosts"


ONE_RANK = Sharing()


class SharingRanks(JoinedRanks):
    """Ranks that share a model as `Sharing` says."""

    sharing: Sharing = ONE_RANK
    before_shard: Callable[[], None] = staticmethod(lambda: None)

    def shard(self, model: nn.Module) -> None:
        """As `JoinedRanks.shard`; generation is told to gather weights too."""
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        self.before_shard()
        super().shard(model)
        for name in ("extend", "decode"):
            register_fsdp_forward_method(model, name)
        if self.sharing.keeps_gathered:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_reshard_after_forward(False, recurse=False)

    def sync(self, model: nn.Module, last: bool) -> None:
        """As `JoinedRanks.sync`."""
        super().sync(model, last or self.sharing.sums_each_micro_step)


class AbsentRanks(SharingRanks):
    """The first of ranks that are not there."""

    def __init__(self, sharing: Sharing) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.rank, self.world, self.hosts = 0, sharing.world, sharing.hosts
        self.sharing = sharing
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sharing.world)
        names: tuple[str, ...] = ("shard",)
        shape: tuple[int, ...] = (sharing.world,)
        if sharing.hosts > 1:
            names, shape = ("replicate", "shard"), (sharing.hosts, sharing.ranks_per_host)
        self._mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        # torch keeps what it has found out of sharded tensors for all equal meshes: ranks that this
        # process joins afterwards would be taken for these.
        self._mesh._thread_id = -1


@contextlib.contextmanager
def pretend_ranks(sharing: Sharing) -> Iterator[Ranks]:
    """The first rank; one process alone is none of several."""
    if sharing.world == 1:
        yield local_ranks()
        return
    ranks = AbsentRanks(sharing)
    try:
        yield ranks
    finally:
        ranks.close()
