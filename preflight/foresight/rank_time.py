"""How long a step of several ranks takes: compute, and the communication that it does not hide.

FSDP2 gathers a block's weights before its forward and its backward pass, and sums the block's
gradients over the ranks of a host afterwards; with several hosts each shard of the gradients is
then summed over the hosts (HSDP; Zhao et al. 2023, arXiv:2304.11277). Collectives go around rings:
a gather of n bytes over W ranks takes (W - 1) hops of n / W bytes each, a sum that leaves each rank
its part the same, and one that leaves each the whole twice as much (Thakur, Rabenseifner & Gropp
2005, "Optimization of collective communication operations in MPICH", section 4). A link serves
one collective after the other, beside the compute.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from preflight.device.cards import Card, Link, describe_network
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.run_time import RunCost, estimate_cost
from preflight.models.cost import count_parameters, estimate_flops_per_token
from preflight.settings import ModelConfig, ProcessSettings, TrainingSettings

WEIGHT_BYTES = 4  # gathered and summed in fp32, as they are kept
ASSUMED_NETWORK_GBITS = 100.0
# Llama 3 was trained on 16,384 cards for 54 days with 419 unexpected interruptions (Dubey et al.
# 2024, arXiv:2407.21783, section 3.3.4): one in 50,700 hours of a card.
CARD_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419
ASSUMED_RESTART_SECONDS = 120.0  # until a job of several hosts trains again


def ring_seconds(n_bytes: float, n_ranks: int, link: Link) -> float:
    """A gather of `n_bytes` in all, or their sum of which each rank keeps its part."""
    return (n_ranks - 1) * (link.hop_seconds + n_bytes / n_ranks / link.bytes_per_second)


@dataclass(frozen=True)
class RankStep:
    """The parts of a step that a rank computes and communicates, in seconds.

    Attributes:
        n_blocks: that are gathered one by one.
        micro_steps: of a step; gradients are summed after the last.
        block: forward pass of a block.
        backward: backward pass of a block, with its recomputation if there is one.
        head: forward pass of what is not in a block; backward takes twice as long.
        gather: of a block's weights, in the host.
        scatter: the sum of a block's gradients, in the host.
        exchange: the sum of a rank's part of them over the hosts.
        root_gather, root_scatter, root_exchange: the same of what is in no block.
        update: of the weights.
    """

    n_blocks: int
    micro_steps: int
    block: float
    backward: float
    head: float
    gather: float
    scatter: float
    exchange: float
    root_gather: float
    root_scatter: float
    root_exchange: float
    update: float

    @property
    def compute_seconds(self) -> float:
        """What one step computes."""
        micro = self.n_blocks * (self.block + self.backward) + 3 * self.head
        return self.micro_steps * micro + self.update

    @property
    def link_seconds(self) -> float:
        """What the link in the host is busy."""
        gathers = 2 * self.n_blocks * self.gather + self.root_gather
        return self.micro_steps * gathers + self.n_blocks * self.scatter + self.root_scatter

    @property
    def network_seconds(self) -> float:
        """What the network between hosts is busy."""
        return self.n_blocks * self.exchange + self.root_exchange

    @property
    def seconds(self) -> float:
        """One step: each block takes as long as the slowest of what runs beside each other."""
        inner = self.n_blocks - 1
        forward = self.root_gather + self.gather + inner * max(self.block, self.gather)
        forward += self.block + self.head
        begin = max(2 * self.head, self.gather)
        # All micro-steps but the last one sum no gradients.
        plain = begin + inner * max(self.backward, self.gather) + self.backward
        return (
            self.micro_steps * forward
            + (self.micro_steps - 1) * plain
            + self._summing_backward(begin)
            + self.update
        )

    def _summing_backward(self, begin: float) -> float:
        """The last backward pass: a block's gradients are summed beside that of the one before."""
        inner = self.n_blocks - 1
        computed = begin + inner * max(self.backward, self.gather) + self.backward
        # The link has the gathers and sums of all blocks but the last gather, which came before.
        busy = begin + max(self.backward, self.gather) + inner * self.scatter
        busy += max(0, inner - 1) * self.gather
        in_host = max(computed, busy) + self.scatter
        between = begin + self.backward + self.scatter + self.n_blocks * self.exchange
        hosts_done = max(in_host + self.exchange, between)
        return max(in_host + self.root_scatter, hosts_done) + self.root_exchange

    @property
    def bound(self) -> str:
        """What a faster one of would shorten the step most."""
        parts = {
            "compute": self.compute_seconds,
            "the link in the host": self.link_seconds,
            "the network between hosts": self.network_seconds,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def exposed_seconds(self) -> float:
        """Communication that no compute hides."""
        return self.seconds - self.compute_seconds


def estimate_rank_step(
    model_config: ModelConfig,
    training: TrainingSettings,
    sharing: Sharing,
    *,
    card: Card,
    network: Link,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    compile_model: bool = False,
    window_tokens: int | None = None,
) -> RankStep:
    """The parts of a step, from `estimate_cost` of one card and the bytes that ranks exchange.

    Args:
        model_config: the architecture.
        training: batch size of a rank, and micro-steps.
        sharing: how many ranks and hosts.
        card: of each rank.
        network: between hosts.
        dtype: what the matmuls compute in.
        gradient_checkpointing: blocks are computed again in the backward pass.
        compile_model: as in `estimate_cost`.
        window_tokens: as in `estimate_cost`.
    """

    def one_card(micro_steps: int) -> float:
        cost = estimate_cost(
            model_config,
            dataclasses.replace(training, gradient_accumulation_steps=micro_steps),
            dtype=dtype,
            card=card,
            gradient_checkpointing=gradient_checkpointing,
            compile_model=compile_model,
            window_tokens=window_tokens,
        )
        return cost.step_seconds

    # Of one card, a step is a line over its micro-steps: what they leave is the update.
    micro = one_card(2) - one_card(1)
    per_host = sharing.ranks_per_host
    update = max(0.0, one_card(1) - micro) / per_host
    C, vocabulary, n_blocks = (
        model_config.n_embeddings,
        model_config.vocab_size,
        model_config.n_layers,
    )
    passes = 4 if gradient_checkpointing else 3
    head_share = 3 * 2 * C * vocabulary / estimate_flops_per_token(model_config)
    head = micro * head_share / 3
    block = micro * (1 - head_share) / n_blocks / passes
    one_layer = count_parameters(dataclasses.replace(model_config, n_layers=1))
    block_parameters = count_parameters(dataclasses.replace(model_config, n_layers=2)) - one_layer
    block_bytes = WEIGHT_BYTES * block_parameters
    root_bytes = WEIGHT_BYTES * (one_layer - block_parameters)

    def ring(n_bytes: float) -> float:
        return ring_seconds(n_bytes, per_host, card.link)

    def exchange(n_bytes: float) -> float:
        return 2 * ring_seconds(n_bytes / per_host, sharing.hosts, network)

    return RankStep(
        n_blocks=n_blocks,
        micro_steps=training.gradient_accumulation_steps,
        block=block,
        backward=(passes - 1) * block,
        head=head,
        gather=ring(block_bytes),
        scatter=ring(block_bytes),
        exchange=exchange(block_bytes),
        root_gather=ring(root_bytes),
        root_scatter=ring(root_bytes),
        root_exchange=exchange(root_bytes),
        update=update,
    )


def find_network(processes: ProcessSettings) -> Link:
    """The network between hosts that the flags name, or an assumed one."""
    return describe_network(processes.network_gbits or ASSUMED_NETWORK_GBITS)


def estimate_shared_cost(
    model_config: ModelConfig,
    training: TrainingSettings,
    sharing: Sharing,
    *,
    card: Card,
    network: Link,
    **choices: Any,
) -> tuple[RunCost, RankStep]:
    """`estimate_cost` where several ranks share the run, and the parts of a step.

    Args:
        model_config: the architecture.
        training: batch size of a rank, and micro-steps.
        sharing: how many ranks and hosts.
        card: of each rank.
        network: between hosts.
        choices: what else `estimate_rank_step` asks for.
    """
    alone = estimate_cost(model_config, training, card=card, **choices)
    step = estimate_rank_step(
        model_config, training, sharing, card=card, network=network, **choices
    )
    shared = dataclasses.replace(
        alone,
        step_seconds=step.seconds,
        window_seconds=alone.window_seconds / sharing.world,
        basis=f"{alone.basis}; {_describe_links(card.link, network, sharing)}",
    )
    return shared, step


def _describe_links(link: Link, network: Link, sharing: Sharing) -> str:
    used = [link] if sharing.ranks_per_host > 1 else []
    used += [network] if sharing.hosts > 1 else []
    return " and ".join(
        f"{x.share:.0%} of the {x.gb_per_second:g} GB/s of {x.name}, "
        f"{x.hop_seconds * 1e6:.0f} us a hop"
        for x in used
    )


@dataclass(frozen=True)
class Losses:
    """What failures cost, in an hour of the whole job.

    Attributes:
        failures: of any card or its host.
        lost_seconds: training that is done again, and restarts.
    """

    failures: float
    lost_seconds: float


def estimate_losses(n_ranks: int, seconds_between_checkpoints: float) -> Losses:
    """A failure loses half of the time between two checkpoints on average, and a restart."""
    failures = n_ranks / CARD_HOURS_PER_FAILURE
    lost = failures * (seconds_between_checkpoints / 2 + ASSUMED_RESTART_SECONDS)
    return Losses(failures, min(lost, 3600.0))
