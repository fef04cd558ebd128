"""A model that FSDP2 shards over processes is written as by one, and read back in rows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.samples import CONFIG, same
from preflight.checkpoints.format import load_optimizer, load_weights, read_checkpoint
from preflight.checkpoints.rows import Rows, list_rows, split_rows, wrap_rows
from preflight.checkpoints.saving import save_checkpoint
from preflight.device.host_memory import peak_resident_bytes, release_freed_memory
from preflight.models.building import build_model
from preflight.settings import ModelConfig
from preflight.training.optimizer_state import list_optimizer_tensors, load_optimizer_tensors


class GlooRanks:
    """The default process group."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)


def run_processes(world: int, folder: Path, action: Callable[[GlooRanks], None]) -> None:
    """`action` in forks of this process, joined by gloo; AssertionError where one fails."""
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
                torch.distributed.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world
                )
                action(GlooRanks(rank, world))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world


def build_trained(seed: int, world: int) -> tuple[Any, torch.optim.Optimizer]:
    """The tiny model after a step of made-up gradients, sharded where there are several ranks."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(97, 16, 8, 2, 2, 12))
    generator = torch.Generator().manual_seed(seed)
    gradients = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        if world > 1:
            from torch.distributed.tensor import distribute_tensor

            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()
    return model, optimizer


def save(output_dir: Path, model: Any, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    tensors = list_optimizer_tensors(model, optimizer)
    weights = dict(model.state_dict())
    return save_checkpoint(output_dir, 1, weights, {}, CONFIG, {}, optimizer=tensors, **options)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_over_processes(tmp_path: Path, world: int) -> None:
    for name in ("one", "many", "again"):
        (tmp_path / name).mkdir()
    one = save(tmp_path / "one", *build_trained(1, 1))

    def write_and_read(ranks: GlooRanks) -> None:
        saved = save(tmp_path / "many", *build_trained(1, world), ranks=ranks)
        model, optimizer = build_trained(2, world)
        own = model.state_dict()
        rows = list_rows(own)
        assert rows.keys() == own.keys()
        weights = load_weights(saved, rows=rows)
        model.load_state_dict({name: wrap_rows(w, own[name]) for name, w in weights.items()})
        held = list_optimizer_tensors(model, optimizer)
        load_optimizer_tensors(model, optimizer, load_optimizer(saved, list_rows(held)))
        save(tmp_path / "again", model, optimizer, ranks=ranks)

    run_processes(world, tmp_path, write_and_read)
    for name in ("many", "again"):
        other = read_checkpoint(tmp_path / name / "milestones" / "checkpoint-1")
        assert other.manifest == one.manifest, name
        assert same(load_weights(other), load_weights(one))
        assert same(load_optimizer(other), load_optimizer(one))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="how Linux resets a peak")
def test_a_save_needs_no_memory_of_the_size_of_the_state(tmp_path: Path) -> None:
    """Nothing is gathered or copied: 5 % of the state, and the pieces that are under way."""
    shape, world = (2**12, 2**13), 2  # 128 MiB
    names = ("one", "two")
    state_bytes = len(names) * 4 * shape[0] * shape[1]

    def measure(ranks: GlooRanks) -> None:
        mine = split_rows(shape[0], ranks.rank, world)
        values = torch.full((mine.stop - mine.start, shape[1]), 0.5)
        parts = {name: Rows(values, shape, mine.start) for name in names}
        rises = []
        for step in (1, 2):  # the first loads what is needed once
            release_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_resident_bytes()
            save_checkpoint(tmp_path, step, parts, {}, CONFIG, {}, ranks=ranks)
            rises.append(peak_resident_bytes() - before)
        print(f"rank {ranks.rank}: {rises[1] / 2**20:.1f} of {state_bytes / 2**20:.0f} MiB")
        assert rises[1] <= 0.05 * state_bytes + 16 * 2**20, rises

    run_processes(world, tmp_path, measure)
