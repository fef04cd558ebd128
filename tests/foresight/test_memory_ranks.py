"""Predicted memory of each of several ranks, against real tensors in real gloo processes."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from preflight.device.runtime import Runtime
from preflight.foresight.absent_ranks import Sharing, SharingRanks
from preflight.foresight.allocation_log import RANK_ITEMS, AllocationLog
from preflight.foresight.memory_trace import Peaks, TraceCase, run_phases, trace_peaks, trace_whole
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
) -> TraceCase:
    training = TrainingSettings(batch_size=4, gradient_accumulation_steps=accumulation)
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
        run_phases(log, trainer, case, case.training.gradient_accumulation_steps)
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
    "weights stay gathered": lambda sharing: build_case(replace(sharing, keeps_gathered=True)),
    "accumulation": functools.partial(build_case, accumulation=2),
    "accumulation, summed each time": lambda sharing: build_case(
        replace(sharing, sums_each_micro_step=True), accumulation=2
    ),
    "checkpointing": functools.partial(build_case, checkpointing=True),
    "untied": functools.partial(build_case, model=replace(SHAPE, tied=False)),
    "bf16, all": functools.partial(
        build_case, model=replace(SHAPE, tied=False), dtype=BF16, accumulation=2, checkpointing=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [Sharing(2), Sharing(4), Sharing(4, 2)], ids=["2", "4", "2 x 2"])
@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_peak_is_that_of_real_ranks(
    name: str, sharing: Sharing, tmp_path: Path
) -> None:
    case = MEASURED[name](sharing)
    measured = [total(peaks) for peaks in measure(case, tmp_path)]
    print(f"{name}, {sharing}: {total(trace_whole(case)):,.0f} measured {measured}")
    assert total(trace_whole(case)) == pytest.approx(max(measured), rel=0.01)
