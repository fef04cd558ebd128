"""Predicted memory of each of several ranks, against real tensors in real gloo processes."""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device.test_ranks import CASES, build, run_ranks

from preflight.checkpoints.rows import list_rows
from preflight.device.ranks import Ranks
from preflight.device.runtime import Runtime
from preflight.foresight.absent_ranks import ONE_RANK, Sharing, SharingRanks
from preflight.foresight.allocation_log import RANK_ITEMS, AllocationLog
from preflight.foresight.memory import MemoryOptions, estimate_memory
from preflight.foresight.memory_trace import Peaks, TraceCase, run_phases, trace_peaks, trace_whole
from preflight.models.building import build_on_meta
from preflight.models.cost import count_parameters
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.training.plan import build_plan
from trainer import build_trainer

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = ModelConfig(1003, 64, 64, 4, 3, 256)  # rows that neither 2 nor 4 ranks share evenly


def build_case(
    sharing: Sharing,
    model: ModelConfig = SHAPE,
    *,
    dtype: torch.dtype = FP32,
    accumulation: int = 1,
    checkpointing: bool = False,
    optimizer: str = "adamw",
) -> TraceCase:
    training = TrainingSettings(
        batch_size=4, gradient_accumulation_steps=accumulation, optimizer=optimizer
    )
    window = model.context_length
    return TraceCase(
        *(model, training, dtype, "cpu", checkpointing, False, 1, window), sharing=sharing
    )


def total(peaks: Peaks) -> float:
    return max(sum(items.values()) for (phase, _), items in peaks.items() if phase != "building")


# ---- real ranks ---------------------------------------------------------------------------------


def measure_rank(case: TraceCase, store_path: Path, rank: int, results: Any) -> None:
    """The peaks of one real rank, put into `results`."""
    torch.set_num_threads(1)
    ranks = SharingRanks(
        dist.FileStore(str(store_path), case.sharing.world),
        rank,
        case.sharing.world,
        hosts=case.sharing.hosts,
    )
    ranks.sharing = case.sharing
    plan = build_plan(case.training, ControlSettings(), case.window_tokens, 1, 1)
    runtime = Runtime(torch.device("cpu"), case.dtype, False, ())
    log = AllocationLog("cpu")
    with log, log.follow_resizes():
        trainer = build_trainer(
            *(case.model_config, case.training, plan, runtime),
            gradient_checkpointing=case.gradient_checkpointing,
            ranks=ranks,
        )
        run_phases(log, trainer, case)
    results.put((rank, log.peaks()))
    ranks.barrier()
    ranks.close()


def measure(case: TraceCase, folder: Path) -> list[Peaks]:
    """The peaks of every rank, in real processes."""
    context = multiprocessing.get_context("fork")  # torch is imported already
    results = context.SimpleQueue()
    path = folder / "store"
    children = [
        context.Process(target=measure_rank, args=(case, path, rank, results))
        for rank in range(case.sharing.world)
    ]
    for child in children:
        child.start()
    peaks = dict(results.get() for _ in children)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * len(children)
    return [peaks[rank] for rank in range(case.sharing.world)]


MEASURED: dict[str, Callable[..., TraceCase]] = {
    "fp32": build_case,
    "bf16": functools.partial(build_case, dtype=BF16),
    "fp16": functools.partial(build_case, dtype=torch.float16),
    "weights stay gathered": lambda sharing: build_case(replace(sharing, keeps_gathered=True)),
    "accumulation": functools.partial(build_case, accumulation=2),
    "accumulation, summed each time": lambda sharing: build_case(
        replace(sharing, sums_each_micro_step=True), accumulation=2
    ),
    "checkpointing": functools.partial(build_case, checkpointing=True),
    "sgd": functools.partial(build_case, optimizer="sgd"),
    "untied": functools.partial(build_case, model=replace(SHAPE, tied=False)),
    "bf16, all": functools.partial(
        build_case, model=replace(SHAPE, tied=False), dtype=BF16, accumulation=2, checkpointing=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharing", [Sharing(2), Sharing(4), Sharing(4, 2)], ids=["2", "4", "2 x 2"]
)
@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_peak_is_that_of_real_ranks(
    name: str, sharing: Sharing, tmp_path: Path
) -> None:
    case = MEASURED[name](sharing)
    measured = [total(peaks) for peaks in measure(case, tmp_path)]
    predicted = total(trace_whole(case))
    print(f"{name}, {sharing}: {predicted:,.0f} measured {measured}")
    assert predicted == pytest.approx(max(measured), rel=0.01)


# ---- ranks that do not exist --------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [Sharing(7), Sharing(64), Sharing(14, 2)], ids=str)
def test_weights_and_optimizer_are_shared_evenly(sharing: Sharing) -> None:
    items = trace_whole(build_case(sharing))["optimizer step", "all"]
    # Each tensor is shared by its rows: a rank has a row more than another at most.
    per_host = sharing.ranks_per_host
    rows = [p.shape for p in build_on_meta(SHAPE).parameters()]
    expected = sum(4 * -(-shape[0] // per_host) * math.prod(shape[1:]) for shape in rows)
    assert items["weights"] == expected
    n_steps = 4 * len(rows)  # of each tensor, AdamW counts the steps in a number of its own
    assert items["optimizer"] == 2 * expected + n_steps


def test_one_rank_is_one_process() -> None:
    case = build_case(ONE_RANK)
    peaks = trace_whole(case)
    assert not dist.is_initialized()
    assert all(items[name] == 0 for items in peaks.values() for name in RANK_ITEMS)
    assert case == replace(case, sharing=Sharing(1, 1))


def test_ranks_leave_no_process_group_behind() -> None:
    resize = torch.UntypedStorage.resize_
    trace_whole(build_case(Sharing(2)))
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_ is resize


def test_ranks_that_follow_are_not_taken_for_absent_ones() -> None:
    trace_whole(build_case(Sharing(2)))

    def find_first_rows(ranks: Ranks) -> list[int]:
        trainer = build(CASES["fp32"], ranks, 1)
        return [rows.start for rows in list_rows(trainer.list_weights()).values()]

    first, second = run_ranks(2, find_first_rows)
    assert set(first) == {0}
    assert min(second) > 0


def test_a_first_trace_is_like_the_next() -> None:
    """torch derives the shapes of sharded tensors once, on tensors that no rank has."""
    case = build_case(Sharing(2), replace(SHAPE, vocab_size=1009))
    assert trace_whole(case) == trace_whole(case)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_depth_is_extended_exactly_among_ranks(accumulation: int) -> None:
    deep = replace(SHAPE, vocab_size=500, n_layers=7)
    case = build_case(Sharing(4, 2), deep, accumulation=accumulation)
    extended, whole = trace_peaks(case), trace_whole(case)
    assert extended.keys() == whole.keys()
    for region, items in whole.items():
        if region != ("building", "sharding"):  # of the first block, or of what is in none
            assert sum(extended[region].values()) == pytest.approx(sum(items.values())), region


def test_more_ranks_need_less_and_gathered_weights_more() -> None:
    few, many, kept = (
        total(trace_whole(build_case(sharing)))
        for sharing in (Sharing(2), Sharing(8), Sharing(2, keeps_gathered=True))
    )
    assert many < few < kept


def test_a_rank_that_holds_the_whole_model_at_first_is_said_to() -> None:
    options = MemoryOptions(FP32, "cuda", sharing=Sharing(8))
    estimate = estimate_memory(SHAPE, TrainingSettings(batch_size=1), options)
    alone = estimate_memory(
        SHAPE, TrainingSettings(batch_size=1), replace(options, sharing=ONE_RANK)
    )
    assert estimate.phases["building"] >= 4 * count_parameters(SHAPE)
    assert sum(estimate.items.values()) == estimate.needed_bytes
    assert "building" not in alone.phases
    assert not {*RANK_ITEMS} & {*alone.items}
