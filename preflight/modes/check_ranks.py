"""What `--check` says of a run on several ranks: time with communication, and how many cards."""

from __future__ import annotations

import dataclasses
from typing import Any

from preflight.device.cards import Link
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.fits import judge_fit
from preflight.foresight.learnability import Advice
from preflight.foresight.memory import MemoryOptions, estimate_memory
from preflight.foresight.rank_time import (
    ASSUMED_RESTART_SECONDS,
    CARD_HOURS_PER_FAILURE,
    RankStep,
    estimate_losses,
    estimate_rank_step,
    estimate_shared_cost,
    find_network,
)
from preflight.foresight.run_time import estimate_run_time
from preflight.foresight.target import Target
from preflight.modes.check_sections import Findings, describe_rate
from preflight.settings import ModelConfig, TrainingSettings

MOST_RANKS = 512  # of one host or flat over several: beyond, what is shared is next to nothing
_USUAL_CARDS_OF_A_HOST = 8
_EXPOSED_SHARE = 0.05  # of a step, from which on waiting for the network is worth a warning


def share_host(target: Target, sharing: Sharing) -> Target:
    """The present device as one of several ranks has it: those on a CPU share its memory."""
    n_ranks = sharing.ranks_per_host
    if n_ranks == 1 or target.device_type != "cpu":
        return target
    name = f"{target.name}, shared by {n_ranks} ranks"
    return dataclasses.replace(target, name=name, limit_bytes=target.limit_bytes // n_ranks)


def time_ranks(found: Findings) -> None:
    """A step's time by formula, what bounds it, and what failures cost; nothing is measured."""
    model, target = found.model, found.target
    assert model is not None
    assert target is not None
    rows = found.report.sections["performance estimation"]
    if target.card is None:
        rows["not_known"] = (
            "the time of several ranks is estimated for known cards: name one with --target-gpu"
        )
        return
    gbits = found.config.processes.network_gbits
    network = find_network(found.config.processes)
    found.cost, step = estimate_shared_cost(
        model,
        found.training,
        found.sharing,
        network=network,
        **_list_choices(found, target),
    )
    peak_flops = target.card.rate_tflops(target.dtype_name) * 1e12
    describe_rate(found, found.cost, None, peak_flops)
    rows["compute_seconds"] = step.compute_seconds
    rows["communication_in_a_host_seconds"] = step.link_seconds
    rows["communication_between_hosts_seconds"] = step.network_seconds
    rows["of_which_not_hidden_seconds"] = step.exposed_seconds
    rows["bound_by"] = step.bound
    _warn_of_links(found, step, network, is_assumed=gbits is None)
    if found.plan is None:
        return
    control = found.config.control
    found.run_time = estimate_run_time(found.cost, found.plan, control, found.setup.state.step)
    between = min(control.checkpoint_minutes * 60, found.plan.checkpoint_every * step.seconds)
    losses = estimate_losses(found.sharing.world, between)
    rows["hours_between_failures"] = round(1 / losses.failures)
    rows["lost_in_an_hour_seconds"] = losses.lost_seconds
    rows["failures_assumed"] = (
        f"one in {CARD_HOURS_PER_FAILURE:,.0f} hours of a card, as Llama 3's run had; "
        f"{ASSUMED_RESTART_SECONDS:.0f} s until the run goes on"
    )


def _list_choices(found: Findings, target: Target) -> dict[str, Any]:
    """What `estimate_rank_step` asks for besides the model and its batch."""
    return {
        "card": target.card,
        "dtype": target.dtype,
        "gradient_checkpointing": found.config.system.gradient_checkpointing,
        "compile_model": target.compile_model,
        "window_tokens": found.mean_tokens,
    }


def _warn_of_links(found: Findings, step: RankStep, network: Link, *, is_assumed: bool) -> None:
    """A warning where compute does not hide a link: that, not the cards, sets the time."""
    sharing, warnings = found.sharing, found.report.warnings
    if sharing.ranks_per_host > _USUAL_CARDS_OF_A_HOST:
        text = f"{sharing.ranks_per_host} cards in a host: few hosts have so many"
        warnings.append(Advice("hosts", text, "--hosts, the number of machines"))
    free = dataclasses.replace(step, exchange=0.0, root_exchange=0.0)
    waiting = 1 - free.seconds / step.seconds
    if waiting > _EXPOSED_SHARE:
        text = f"the {network.name} is the bottleneck: {waiting:.0%} of each step waits for it"
        text += " (assumed: give --network)" if is_assumed else ""
        fix = "more --gradient-accumulation-steps, a faster --network, or fewer --hosts"
        warnings.append(Advice("network", text, fix))
    link = dataclasses.replace(free, gather=0.0, scatter=0.0, root_gather=0.0, root_scatter=0.0)
    waiting = 1 - link.seconds / free.seconds
    if waiting > _EXPOSED_SHARE:
        assert found.target is not None
        assert found.target.card is not None
        text = f"{waiting:.0%} of each step waits for {found.target.card.link.name}, which joins "
        text += "the cards of a host"
        warnings.append(Advice("link", text, "a larger --batch-size, or fewer --ranks"))


def describe_fewest_ranks(found: Findings) -> None:
    """The fewest cards of one host that hold the run, at the same batch size of each, and the
    number that makes the run the cheapest.
    """
    model, target = found.model, found.target
    if model is None or target is None or found.memory is None or found.sharing.world == 1:
        return
    if target.device_type != "cuda":
        return
    rows, options = found.report.sections["memory analysis"], found.memory_options()
    fewest = find_fewest_ranks(model, found.training, options, target.limit_bytes)
    rows["fewest_cards_that_fit"] = (
        fewest or f"none up to {MOST_RANKS}: what each card needs for itself is too much"
    )
    if fewest is None or target.card is None or found.plan is None:
        return
    hours = {
        n_ranks: seconds * found.plan.total_steps / 3600
        for n_ranks, seconds in count_card_seconds(
            model,
            found.training,
            found.sharing,
            found.plan.samples_per_step,
            fewest,
            network=find_network(found.config.processes),
            **_list_choices(found, target),
        ).items()
    }
    cheapest = min(hours, key=lambda n_ranks: hours[n_ranks])
    rows = found.report.sections["performance estimation"]
    rows["card_hours"] = round(hours[found.sharing.world], 2)
    rows["cards_with_the_fewest_card_hours"] = cheapest
    rows["fewest_card_hours"] = round(hours[cheapest], 2)


def count_card_seconds(
    model: ModelConfig,
    training: TrainingSettings,
    sharing: Sharing,
    samples_per_step: int,
    fewest: int,
    **choices: Any,
) -> dict[int, float]:
    """Seconds of one update times the cards that make it, by their number.

    All make the same update, at the same batch size of a card: fewer accumulate more. The numbers
    are that of `sharing` and its halves, down to `fewest`, among which the samples are even.

    Args:
        model: the architecture.
        training: the batch size of a card.
        sharing: the most cards.
        samples_per_step: of an update.
        fewest: cards that hold the run.
        choices: as in `estimate_rank_step`.
    """
    found: dict[int, float] = {}
    n_ranks, hosts = sharing.world, sharing.hosts
    while True:
        micro_steps, rest = divmod(samples_per_step, n_ranks * training.batch_size)
        if found and (rest or n_ranks < fewest):
            return found
        asked = dataclasses.replace(training, gradient_accumulation_steps=max(1, micro_steps))
        step = estimate_rank_step(model, asked, Sharing(n_ranks, hosts), **choices)
        found[n_ranks] = n_ranks * step.seconds
        if (hosts if hosts > 1 else n_ranks) % 2:  # neither hosts nor cards of one can be halved
            return found
        n_ranks, hosts = n_ranks // 2, max(1, hosts // 2)


def find_fewest_ranks(
    model: ModelConfig, training: TrainingSettings, options: MemoryOptions, limit_bytes: int
) -> int | None:
    """The fewest ranks of one host that fit into `limit_bytes` each; ``None`` where no number does.

    More ranks share the same weights, so that each needs less.
    """

    def fits(n_ranks: int) -> bool:
        asked = dataclasses.replace(options, sharing=Sharing(n_ranks))
        needed = estimate_memory(model, training, asked).required_bytes
        return judge_fit(needed, limit_bytes) != "does not fit"

    high = 1
    while not fits(high):
        if high >= MOST_RANKS:
            return None
        high *= 8
    low = high // 8  # does not fit, or is none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
