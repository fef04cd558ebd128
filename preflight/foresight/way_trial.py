"""A short trial of the ways to compute a step, in a process of its own.

The run is not touched: its data, its random numbers and its memory are not those of the trial.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from preflight.core.signals import StopFlag
from preflight.core.storage import TEMPORARY_PREFIX
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import Runtime
from preflight.device.ways import Way, WayFigure, WayFigures
from preflight.foresight.child import ChildRules, LackOfMemory, Report, run_in_child
from preflight.foresight.timing import Batch, time_steps
from preflight.models.cost import estimate_flops_per_token
from preflight.settings import ModelConfig, TrainingSettings
from preflight.training.plan import TrainingPlan
from trainer import Trainer, build_trainer

TRIAL_SHARE = 0.02  # of the run's time, at most, for the trial
# What a process takes until its first step, and a compilation until its second. Measured with two
# cores: 2 to 4 s, and 14 to 18 s with nothing kept of an earlier compilation.
START_SECONDS, COMPILE_SECONDS = 4.0, 20.0
# Steps of each way: warmed up, timed at least, timed at most.
WARM_UP_STEPS, LEAST_ROUNDS, MOST_ROUNDS = 1, 3, 9
_ROUNDS_SECONDS = 3.0  # for more than the least
# A run that takes longer at this rate has its length estimated from a measured one: FLOP/s of a
# core, which every CPU of today exceeds.
_LOW_FLOPS_PER_CORE = 10e9


@dataclass(frozen=True)
class WaySpec:
    """What a trial tries.

    Attributes:
        model_config: the architecture.
        training: the run's settings.
        plan: the run's; its tokens are random ones here.
        runtime: of the device; precision and compilation are those of each way.
        ways: the run's own first, compiled ones last.
        n_steps: of the run.
        gradient_checkpointing: as in the run.
    """

    model_config: ModelConfig
    training: TrainingSettings
    plan: TrainingPlan
    runtime: Runtime
    ways: Sequence[Way]
    n_steps: int
    gradient_checkpointing: bool

    @property
    def n_micro_steps(self) -> int:
        """Of the run."""
        return self.n_steps * self.plan.accumulation_steps


def may_be_long(model_config: ModelConfig, plan: TrainingPlan, n_steps: int) -> bool:
    """Whether a run may be long enough for a trial, before anything is measured."""
    per_step = estimate_flops_per_token(model_config) * plan.tokens_per_step
    seconds = n_steps * per_step / _LOW_FLOPS_PER_CORE / torch.get_num_threads()
    return seconds * TRIAL_SHARE > START_SECONDS


def pick_affordable(
    ways: Sequence[Way], n_micro_steps: int, micro_step_seconds: float
) -> list[Way]:
    """The ways that a trial may try: the most of them, in their order, that it has time for.

    A trial of one way compares nothing, so that there are none or at least two.

    Args:
        ways: the run's own first.
        n_micro_steps: of the run.
        micro_step_seconds: about what one takes.
    """
    budget = TRIAL_SHARE * n_micro_steps * micro_step_seconds
    affordable: list[Way] = []
    spent = START_SECONDS
    for way in ways:
        spent += (WARM_UP_STEPS + LEAST_ROUNDS) * micro_step_seconds
        spent += COMPILE_SECONDS if way.compiled else 0.0
        if spent > budget:
            break
        affordable.append(way)
    return affordable if len(affordable) > 1 else []


def measure_ways(spec: WaySpec, report: Report) -> WayFigures:
    """Seconds of a step in each way, in this process: the median of steps that take turns.

    The turns let a busy neighbour slow all ways alike. All train one model, with one optimizer, on
    the same tokens. Only micro-steps are timed: an update of several takes a multiple. What turns
    out too expensive for a run of this length is left out.
    """
    plan = replace(spec.plan, accumulation_steps=1)
    first = build_trainer(
        spec.model_config,
        spec.training,
        plan,
        spec.runtime,
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    batch = _draw_batch(spec)
    trainers: list[tuple[Way, Trainer]] = []
    starts: list[float] = []
    for way in spec.ways:
        if way.compiled and trainers:
            step_seconds = time_steps(trainers[0][1], lambda: [batch], 1)[0]
            # By a real step, and for what is left: the other ways have been started already.
            if way not in pick_affordable(spec.ways, spec.n_micro_steps, step_seconds):
                break
        runtime = replace(spec.runtime, dtype=way.dtype, compile_model=way.compiled)
        trainer = Trainer(
            first.model, first.optimizer, plan, runtime, skips_on_device=first.skips_on_device
        )
        starts += time_steps(trainer, lambda: [batch], WARM_UP_STEPS)[:1]
        trainers.append((way, trainer))
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < LEAST_ROUNDS or (
        len(rounds) < MOST_ROUNDS and time.perf_counter() - began < _ROUNDS_SECONDS
    ):
        rounds.append([time_steps(t, lambda: [batch], 1)[0] for _, t in trainers])
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return WayFigures(
        figures=[
            WayFigure(
                way=way,
                step_seconds=median * spec.plan.accumulation_steps,
                compile_seconds=max(0.0, start - median) if way.compiled else 0.0,
            )
            for (way, _), start, median in zip(trainers, starts, medians, strict=True)
        ]
    )


def _draw_batch(spec: WaySpec) -> Batch:
    """Inputs and targets (B T) of random ids."""
    shape = (spec.training.batch_size, spec.plan.window_tokens + 1)
    ids = torch.randint(spec.model_config.vocab_size, shape).to(spec.runtime.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures | LackOfMemory:
    """`measure_ways` in a new process; when this returns, the process and its files are gone.

    On a machine that is busy otherwise it is given up after twice the time that it may take.

    Raises:
        PreflightError: as `run_in_child`.
        RuntimeError: the child failed.
    """
    budget = TRIAL_SHARE * spec.n_micro_steps * micro_step_seconds
    rules = ChildRules(
        "the trial of precision and compilation",
        Path(tempfile.gettempdir()) / f"{TEMPORARY_PREFIX}preflight-{os.getpid()}",
        available_host_bytes(),
        stop,
        ("stopped: nothing was trained yet",),
        "choose without a trial: --mixed-precision --no-compile-model",
        silent_seconds=2 * max(START_SECONDS + COMPILE_SECONDS, budget),
    )
    answer: WayFigures | LackOfMemory = run_in_child(functools.partial(measure_ways, spec), rules)
    return answer
