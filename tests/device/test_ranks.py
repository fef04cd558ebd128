"""Several processes that train one model: their weights are those of one process.

The processes are forked, which takes a tenth of the time of starting them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from preflight.core.errors import ExitCode, PreflightError
from preflight.device.ranks import JoinedRanks, Ranks, local_ranks, plan_ranks
from preflight.device.runtime import Runtime
from preflight.models.loss import NO_TARGET
from preflight.settings import AdapterConfig, ControlSettings, ModelConfig, TrainingSettings
from preflight.settings.kinds import OPTIMIZERS
from preflight.training import muon
from preflight.training.optimizers import SGD
from preflight.training.plan import build_plan
from trainer import Trainer, build_trainer, refuse_unshared

MODEL = ModelConfig(
    vocab_size=97, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
)
STEPS, ROWS = 4, 2
Work = Callable[[Ranks], Any]


def run_ranks(world: int, work: Work, hosts: int = 1) -> list[Any]:
    """What `work` returns on each of `world` processes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_join, args=(rank, world, hosts, Path(folder), work))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * world
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _join(rank: int, world: int, hosts: int, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    ranks = JoinedRanks(dist.FileStore(f"{folder}/store", world), rank, world, hosts=hosts)
    torch.save(work(ranks), folder / f"{rank}.pt")
    ranks.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """How the model is trained.

    In `bad_step` the loss is not finite; in `overflowing_step` one element of the gradients is not,
    which one rank has. In fp16 the loss is multiplied by `scale` at first.
    """

    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    bad_step: int | None = None
    overflowing_step: int | None = None
    scale: float = 2.0**16
    optimizer: str = "adamw"
    max_grad_norm: float = 0.5  # less than any of their norms
    adapter: AdapterConfig | None = None


CASES = {
    "fp32": Case(),
    "bf16": Case(torch.bfloat16),
    "checkpointing": Case(checkpointing=True),
    "nan": Case(bad_step=2),
    "adam": Case(optimizer="adam"),
    "sgd": Case(optimizer="sgd"),
    "sgd, nan at first": Case(optimizer="sgd", bad_step=0),
    "muon": Case(optimizer="muon"),
    "adapters": Case(adapter=AdapterConfig(3, 6.0, ("o_proj", "down_proj"))),
    "fp16": Case(torch.float16, overflowing_step=2),
    "fp16, scaled too much": Case(torch.float16, scale=2.0**20),  # for the first two steps
    "fp16, muon": Case(torch.float16, optimizer="muon", overflowing_step=2),
    "adapters, checkpointing": Case(
        adapter=AdapterConfig(4, 8.0, ("qkv_proj", "up_proj")), checkpointing=True
    ),
}


def train(
    case: Case,
    ranks: Ranks,
    n_micro_steps: int,
    *,
    ordered: bool = False,
    order: Sequence[int] | None = None,
) -> list[Tensor]:
    """Losses and norms of some updates; weights after them; the optimizer's state; and the scale
    of the loss after each update. All of them are whole.

    An update has `n_micro_steps` on each rank, `ROWS` rows each, which come in some `order`.
    """
    trainer = build(case, ranks, n_micro_steps)
    if ordered:
        for module in trainer.model.modules():
            if hasattr(module, "set_custom_reduce_scatter"):
                module.set_custom_reduce_scatter(OrderedReduceScatter())
    figures, scales = [], []
    for step in range(STEPS):
        result = trainer.train_step(step, draw_share(step, n_micro_steps, case, trainer, order))
        figures += [result.loss, result.grad_norm]
        scales.append(torch.tensor(trainer.scaler.get_scale()))
    return [*figures, *list_state(trainer), *scales]


def build(case: Case, ranks: Ranks, n_micro_steps: int) -> Trainer:
    training = TrainingSettings(
        batch_size=ROWS,
        gradient_accumulation_steps=n_micro_steps,
        max_steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=0,
        optimizer=case.optimizer,
        max_grad_norm=case.max_grad_norm,
        adapter=case.adapter,
    )
    plan = build_plan(training, ControlSettings(), MODEL.context_length, 1000, 20)
    trainer = build_trainer(
        MODEL,
        training,
        plan,
        Runtime(torch.device("cpu"), case.dtype, False, ()),
        gradient_checkpointing=case.checkpointing,
        ranks=ranks,
    )
    if case.dtype == torch.float16:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=case.scale, growth_interval=2)
    return trainer


def list_state(trainer: Trainer) -> list[Tensor]:
    """All weights, and what the optimizer keeps of them, whole."""
    whole = [whole_of(p.detach()) for p in trainer.model.parameters()]  # also those that are frozen
    for parameter in trainer._parameters:
        state = trainer.optimizer.state[parameter]
        whole += [whole_of(state[key]) for key in sorted(state)]
    return whole


def draw_share(
    step: int,
    n_micro_steps: int,
    case: Case,
    trainer: Trainer,
    order: Sequence[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """This rank's rows of the update's micro-steps, in which the later rows have fewer targets."""
    ranks = trainer.ranks
    world = ranks.world * n_micro_steps
    rows = torch.randint(0, 97, (world * ROWS, 17), generator=torch.Generator().manual_seed(step))
    targets = rows[:, 1:].masked_fill(
        torch.arange(16) > 15 - torch.arange(len(rows))[:, None], NO_TARGET
    )
    if order is not None:
        rows, targets = (
            t.unflatten(0, (world, ROWS))[order].flatten(0, 1) for t in (rows, targets)
        )
    micro_steps = zip(rows[:, :-1].chunk(n_micro_steps), targets.chunk(n_micro_steps), strict=True)
    shares = [(i[ranks.share(len(i))], t[ranks.share(len(t))]) for i, t in micro_steps]
    if step in (case.bad_step, case.overflowing_step) and ranks.rank == ranks.world - 1:
        weight = torch.nn.Parameter(torch.ones(()))
        first = next(iter(trainer.model.children()))
        spoil = spoil_all if step == case.bad_step else spoil_one
        handle = first.register_forward_hook(lambda *x: spoil(x[-1] * weight))
        trainer.model.register_forward_hook(lambda *_: handle.remove())
    return shares


def spoil_all(hidden: Tensor) -> Tensor:
    return hidden * float("nan")


def spoil_one(hidden: Tensor) -> Tensor:
    """Of the gradients of the embedding, one element of one row will be infinite."""
    at = torch.zeros_like(hidden)
    at[0, 0, 0] = float("inf")
    hidden.register_hook(lambda gradient: gradient + at)
    return hidden


def whole_of(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class OrderedReduceScatter:
    """Sums in the order of the ranks, as one process does, whatever the number of ranks."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.chunk(group.size())
        output_tensor.copy_(parts[0])
        for part in parts[1:]:
            output_tensor += part


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)), float((a - b).abs().max())


def drop_losses(figures: list[Tensor]) -> list[Tensor]:
    """Without the losses told, whose sum over more than two ranks has an order of its own."""
    return figures[1 : 2 * STEPS : 2] + figures[2 * STEPS :]


class OneProcess(Ranks):
    """One process that takes the norm as several do: in fp64, so that no order of sums shows."""

    def sum_up(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        return loss, torch.cat(gradients).double().norm().float()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_two_micro_steps(name: str) -> None:
    expected = train(CASES[name], OneProcess(), 2)
    for found in run_ranks(2, lambda ranks: train(CASES[name], ranks, 1)):
        assert_same(found, expected)


def test_two_ranks_are_one_process_but_for_the_rounding_of_the_norm() -> None:
    """Without a limit the norm has no part in the weights: they are those of any one process."""
    case = Case(max_grad_norm=0.0)
    expected = train(case, local_ranks(), 2)
    found = run_ranks(2, lambda ranks: train(case, ranks, 1))[0]
    assert_same(found[2 * STEPS :], expected[2 * STEPS :])
    torch.testing.assert_close(found[: 2 * STEPS], expected[: 2 * STEPS], rtol=1e-6, atol=0)


def test_four_ranks_that_add_in_order_are_four_micro_steps() -> None:
    expected = train(Case(), OneProcess(), 4)
    for found in run_ranks(4, lambda ranks: train(Case(), ranks, 1, ordered=True)):
        assert_same(drop_losses(found), drop_losses(expected))


def test_two_hosts_of_two_ranks_are_two_ranks_of_two_micro_steps() -> None:
    """HSDP adds up in each host, then over the hosts: as two ranks do, each its own two."""
    case = CASES["fp16"]  # whose gradients are in fp32 too, but one overflows on one rank of a host
    expected = run_ranks(2, lambda ranks: train(case, ranks, 2))[0]
    # Of the four parts of the rows each of the two ranks has the first and third, or the others.
    hosts = run_ranks(4, lambda ranks: train(case, ranks, 1, order=[0, 2, 1, 3]), hosts=2)
    for found in hosts:
        assert_same(drop_losses(found), drop_losses(expected))


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("stacked", [1, 3])
def test_muon_has_one_owner_for_each_stack_of_matrices(
    world: int, stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer stacks than ranks, or more. 32 rows are not the same number on each of three
    ranks, where torch's kernels, AdamW's too, round the last few numbers of a part otherwise: bf16
    would make these differences larger by as much as it is coarser.
    """
    monkeypatch.setattr(muon, "_STACKED", stacked)
    if world == 3:
        monkeypatch.setattr(muon, "choose_dtype", lambda device: torch.float32)
    case = Case(optimizer="muon")
    expected = drop_losses(train(case, OneProcess(), world))
    for found in run_ranks(world, lambda ranks: train(case, ranks, 1, ordered=True)):
        if world == 4:
            assert_same(drop_losses(found), expected)
        torch.testing.assert_close(drop_losses(found), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SGD, knows_shards=False)
    monkeypatch.setattr(OPTIMIZERS, "load", lambda name: spec)
    training = TrainingSettings(optimizer="own")
    refuse_unshared(training, plan_ranks(1))
    with pytest.raises(PreflightError, match="--optimizer own") as caught:
        refuse_unshared(training, plan_ranks(2))
    assert caught.value.code == ExitCode.FLAGS
