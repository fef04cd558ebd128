"""The time of a step of several ranks: the formula against a simulation of its events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from preflight.device.cards import CARDS, describe_network, find_card
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.rank_time import (
    RankStep,
    estimate_losses,
    estimate_rank_step,
    ring_seconds,
)
from preflight.foresight.run_time import estimate_cost
from preflight.models.cost import count_parameters
from preflight.settings import ModelSettings, TrainingSettings

SMALL, XL = (ModelSettings(name).resolve(50_304) for name in ("small", "xl"))
H100 = find_card("H100 SXM")


class Simulation:
    """Tasks that wait for moments of other tasks, each on a resource that does one at a time."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[str, float, set[str]]] = {}

    def add(self, name: str, resource: str, seconds: float, after: Iterable[str]) -> None:
        """`after` names tasks that have ended, or with a ``>`` before it, have begun."""
        self.tasks[name] = (resource, seconds, {*after})

    def run(self) -> float:
        """When the last task ends. Of the tasks that are ready, a resource takes the first."""
        waiting = {name: set(after) for name, (_, _, after) in self.tasks.items()}
        ready: dict[str, list[tuple[int, str]]] = {}
        busy: set[str] = set()
        events: list[tuple[float, int, str]] = []
        order, now = itertools.count(), 0.0

        def start_what_can() -> None:
            changed = True
            while changed:
                changed = False
                for name in [name for name, after in waiting.items() if not after]:
                    del waiting[name]
                    heapq.heappush(ready.setdefault(self.tasks[name][0], []), (next(order), name))
                for resource, queue in ready.items():
                    if queue and resource not in busy:
                        name = heapq.heappop(queue)[1]
                        busy.add(resource)
                        heapq.heappush(events, (now + self.tasks[name][1], next(order), name))
                        happened(">" + name)
                        changed = True

        def happened(moment: str) -> None:
            for after in waiting.values():
                after.discard(moment)

        start_what_can()
        while events:
            now, _, name = heapq.heappop(events)
            busy.discard(self.tasks[name][0])
            happened(name)
            start_what_can()
        assert not waiting
        return now


def simulate(step: RankStep) -> float:
    """Seconds of a step, task by task: FSDP2 gathers a block while the one before is computed."""
    sim, last = Simulation(), step.n_blocks - 1
    before: list[str] = []
    for m in range(step.micro_steps):
        sim.add(f"{m} root", "link", step.root_gather, before)
        sim.add(f"{m} gather 0", "link", step.gather, [f"{m} root"])
        for i in range(step.n_blocks):
            after = [f"{m} gather {i}"] + ([f"{m} block {i - 1}"] if i else [])
            sim.add(f"{m} block {i}", "compute", step.block, after)
            if i < last:
                sim.add(f"{m} gather {i + 1}", "link", step.gather, [f">{m} block {i}"])
        sim.add(f"{m} head", "compute", step.head, [f"{m} block {last}"])
        sim.add(f"{m} head back", "compute", 2 * step.head, [f"{m} head"])
        sim.add(f"{m} again {last}", "link", step.gather, [f">{m} head back"])
        for i in reversed(range(step.n_blocks)):
            previous = f"{m} head back" if i == last else f"{m} back {i + 1}"
            sim.add(f"{m} back {i}", "compute", step.backward, [f"{m} again {i}", previous])
            if i:
                sim.add(f"{m} again {i - 1}", "link", step.gather, [f">{m} back {i}"])
            if m == step.micro_steps - 1:
                sim.add(f"scatter {i}", "link", step.scatter, [f"{m} back {i}"])
                sim.add(f"exchange {i}", "network", step.exchange, [f"scatter {i}"])
        before = [f"{m} back 0"]
    sim.add("root scatter", "link", step.root_scatter, before)
    sim.add("root exchange", "network", step.root_exchange, ["root scatter"])
    everything = [*before, "root exchange", *(f"exchange {i}" for i in range(step.n_blocks))]
    sim.add("update", "compute", step.update, everything)
    return sim.run()


SHARINGS = [Sharing(8), Sharing(64), Sharing(64, 8), Sharing(512, 64), Sharing(16, 16)]


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("gbits", [10, 100, 400])
@pytest.mark.parametrize("card", ["H100 SXM", "RTX 4090", "A100 PCIe"])
def test_the_formula_is_what_a_simulation_of_the_step_takes(
    sharing: Sharing, gbits: float, card: str
) -> None:
    for config, batch, accumulation in ((SMALL, 32, 1), (XL, 8, 1), (XL, 1, 1), (SMALL, 4, 3)):
        for checkpointing in (False, True):
            training = TrainingSettings(batch_size=batch, gradient_accumulation_steps=accumulation)
            step = estimate_rank_step(
                *(config, training, sharing),
                card=find_card(card),
                network=describe_network(gbits),
                dtype=torch.bfloat16,
                gradient_checkpointing=checkpointing,
            )
            assert step.seconds == pytest.approx(simulate(step), rel=0.03)


EVEN = RankStep(24, 2, *(1.0, 2.0, 3.0), *(0.1,) * 6, 0.5)


@pytest.mark.parametrize("gather", [0.1, 1.2, 5.0])
@pytest.mark.parametrize("scatter", [0.1, 1.5, 5.0])
@pytest.mark.parametrize("exchange", [0.1, 2.5, 20.0])
@pytest.mark.parametrize("micro_steps", [1, 4])
def test_the_formula_holds_whatever_is_slowest(
    gather: float, scatter: float, exchange: float, micro_steps: int
) -> None:
    step = replace(EVEN, gather=gather, scatter=scatter, exchange=exchange, micro_steps=micro_steps)
    assert step.seconds == pytest.approx(simulate(step), rel=0.03)


def test_one_rank_takes_as_long_as_one_card() -> None:
    for config in (SMALL, XL):
        training = TrainingSettings(batch_size=8, gradient_accumulation_steps=3)
        step = estimate_rank_step(
            *(config, training, Sharing()),
            card=H100,
            network=describe_network(400),
            dtype=torch.bfloat16,
        )
        alone = estimate_cost(config, training, card=H100, dtype=torch.bfloat16)
        assert step.seconds == pytest.approx(alone.step_seconds)
        assert step.link_seconds == step.network_seconds == 0


def test_ranks_of_a_host_share_the_update() -> None:
    training = TrainingSettings(batch_size=8)
    choices = {"card": H100, "network": describe_network(400), "dtype": torch.bfloat16}
    one, sixteen = (
        estimate_rank_step(XL, training, sharing, **choices)
        for sharing in (Sharing(), Sharing(16, 2))
    )
    assert sixteen.update == pytest.approx(one.update / 8)


def test_the_bytes_are_those_of_the_papers() -> None:
    # FSDP moves 3 times the weights (W - 1) / W (Rajbhandari et al. 2020, section 7.2), here in
    # fp32; the block's second gather is spared of what is in no block.
    link = replace(H100.link, hop_seconds=0.0)
    card, P = replace(H100, link=link), count_parameters(XL)
    network = replace(describe_network(400), hop_seconds=0.0)
    step = estimate_rank_step(
        *(XL, TrainingSettings(batch_size=8), Sharing(64, 8)),
        card=card,
        network=network,
        dtype=torch.bfloat16,
    )
    root = count_parameters(replace(XL, n_layers=1)) * 2 - count_parameters(replace(XL, n_layers=2))
    moved = 4 * (3 * P - root) * 7 / 8
    assert step.link_seconds * link.bytes_per_second == pytest.approx(moved)
    # An all-reduce of each rank's eighth over 8 hosts.
    assert step.network_seconds * network.bytes_per_second == pytest.approx(2 * 4 * P / 8 * 7 / 8)


def test_a_ring_takes_a_hop_less_than_it_has_ranks() -> None:
    link = replace(H100.link, gb_per_second=1.0, share=1.0, hop_seconds=0.001)
    assert ring_seconds(8e9, 1, link) == 0
    assert ring_seconds(8e9, 8, link) == pytest.approx(7 * (0.001 + 1.0))


def test_failures_grow_with_the_ranks_and_never_cost_more_than_the_hour() -> None:
    few, many = estimate_losses(8, 600), estimate_losses(512, 600)
    assert many.failures == pytest.approx(64 * few.failures)
    assert 24 / many.failures / 24 == pytest.approx(99, rel=0.01)  # hours: 4 days, as on paper
    assert many.lost_seconds == pytest.approx(many.failures * (300 + 120))
    assert estimate_losses(60_000, 10**9).lost_seconds == 3600


def test_every_card_has_a_link_slower_than_its_memory() -> None:
    for card in CARDS:
        assert 1 < card.link.gb_per_second < card.bandwidth_gb_per_second
        assert 0 < card.link.share < 1
        assert 0 < card.link.hop_seconds < 1e-4
