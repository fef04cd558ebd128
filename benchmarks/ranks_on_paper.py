"""What a step of many cards takes, on paper: writes docs/processes_on_paper.md.

    python benchmarks/ranks_on_paper.py

Nothing here is measured. The time is that of `preflight/foresight/rank_time.py`, whose formula is
tested against a simulation of the step; the memory is the trace of one rank.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.device.cards import describe_network, find_card  # noqa: E402
from preflight.foresight.absent_ranks import Sharing  # noqa: E402
from preflight.foresight.memory import MIB, NCCL_BYTES, MemoryOptions, estimate_memory  # noqa: E402
from preflight.foresight.rank_time import (  # noqa: E402
    ASSUMED_RESTART_SECONDS,
    CARD_HOURS_PER_FAILURE,
    estimate_losses,
    estimate_rank_step,
)
from preflight.models.cost import count_parameters  # noqa: E402
from preflight.settings import ControlSettings, ModelConfig, ModelSettings, TrainingSettings  # noqa: E402

PAGE = ROOT / "docs" / "processes_on_paper.md"
CARD = find_card("H100 SXM")
CHECKPOINT_MINUTES = ControlSettings().checkpoint_minutes
CARDS_OF_A_HOST = 8


@dataclass(frozen=True)
class Model:
    """A model, the sequences of a micro-step of each card, and whether blocks are recomputed."""

    name: str
    config: ModelConfig
    batch_size: int
    gradient_checkpointing: bool = False


MODELS = (
    Model("small", ModelSettings("small").resolve(50_304), 32),
    Model("xl", ModelSettings("xl").resolve(50_304), 8),
    Model("7B", ModelConfig(32_000, 2048, 4096, 32, 32, 16_384), 2, True),
)
NETWORKS = ((8, 1, 400.0), (64, 8, 400.0), (64, 8, 100.0), (64, 8, 12.5), (512, 64, 400.0))


def build_row(model: Model, n_cards: int, n_hosts: int, gbits: float) -> str:
    """One line of the table."""
    sharing = Sharing(n_cards, n_hosts)
    training = TrainingSettings(batch_size=model.batch_size)
    step = estimate_rank_step(
        *(model.config, training, sharing),
        card=CARD,
        network=describe_network(gbits),
        dtype=torch.bfloat16,
        gradient_checkpointing=model.gradient_checkpointing,
        compile_model=True,
    )
    options = MemoryOptions(
        *(torch.bfloat16, "cuda", model.gradient_checkpointing),
        hopper_or_newer=True,
        sharing=sharing,
    )
    memory = estimate_memory(model.config, training, options)
    losses = estimate_losses(n_cards, CHECKPOINT_MINUTES * 60)
    tokens = n_cards * model.batch_size * model.config.context_length
    cells = (
        f"{model.name}, {count_parameters(model.config) / 1e9:.2f}",
        f"{model.batch_size * model.config.context_length:,}",
        f"{n_cards}",
        f"{gbits:g}" if n_hosts > 1 else "",
        f"{memory.required_bytes / 2**30:.1f}",
        f"{step.compute_seconds * 1e3:,.0f}",
        f"{step.link_seconds * 1e3:,.0f}",
        f"{step.network_seconds * 1e3:,.0f}" if n_hosts > 1 else "",
        f"{step.seconds * 1e3:,.0f}",
        f"{tokens / step.seconds / 1e3:,.0f}",
        step.bound,
        f"{losses.failures:.5f}",
        f"{losses.lost_seconds:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


NETWORK = describe_network(400)
COLUMNS = (
    "model, 10^9 parameters",
    "tokens a card",
    "cards",
    "network, Gb/s a card",
    "GiB a card",
    "compute, ms",
    "in a host, ms",
    "between hosts, ms",
    "step, ms",
    "1,000 tokens/s",
    "bound by",
    "failures an hour",
    "lost an hour, s",
)
HEAD = f"""\
# Many cards, on paper

`python benchmarks/ranks_on_paper.py` writes this page. **Nothing in it was run on several cards.**
It is what `--check --target-gpu "H100 SXM" --ranks N --hosts H --network G` computes.

- Memory of a card: a trace of the real training step on torch's `fake` process group. On the CPU
  that equals real gloo ranks to the byte (`tests/foresight/test_memory_ranks.py`). A compiled step
  is taken for an eager one, and {NCCL_BYTES // MIB} MiB for NCCL's buffers are a guess.
- Compute: that of one card by its data sheet, at the shares of `run_time.py`.
- Communication: weights are gathered in fp32 before the forward and the backward pass of each
  block, gradients are summed in the host after it, and over the hosts in parts (HSDP).
- In a host {CARD.link.share:.0%} of {CARD.link.gb_per_second:g} GB/s ({CARD.link.name}, one
  direction) and {CARD.link.hop_seconds * 1e6:.0f} us a hop of a ring are assumed, between hosts
  {NETWORK.share:.0%} of the network's rate and {NETWORK.hop_seconds * 1e6:.0f} us a hop.
- The step is shorter than the sum, since communication runs beside compute. A simulation of its
  events in `tests/foresight/test_rank_time.py` agrees with the formula within 3 %. What is busy
  longest bounds it.
- Failures: one in {CARD_HOURS_PER_FAILURE:,.0f} hours of a card (Llama 3's run: 419 interruptions
  of 16,384 cards in 54 days, arXiv:2407.21783, section 3.3.4). Each loses half of the
  {CHECKPOINT_MINUTES:.0f} minutes between two checkpoints, and {ASSUMED_RESTART_SECONDS:.0f} s
  until the run goes on, which is assumed.

Hosts have {CARDS_OF_A_HOST} cards. A step has one micro-step. With more of them a slow network is
hidden better, since gradients are summed once a step.

"""


def main() -> None:
    """Write the page."""
    rows = [build_row(model, *network) for model in MODELS for network in NETWORKS]
    table = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *rows]
    PAGE.write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
