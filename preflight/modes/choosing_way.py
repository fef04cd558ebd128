"""Which precision and compilation a run takes: its checkpoint's, the measured ones, or a rule's."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.matmul_rate import measure_matmul_flops
from preflight.device.remembered import describe_hardware, recall, remember
from preflight.device.runtime import (
    Runtime,
    build_runtime,
    choose_device,
    find_missing_compiler,
    has_fast_bf16,
)
from preflight.device.ways import (
    PRECISIONS,
    ChosenWay,
    Way,
    WayFigures,
    choose_way,
    describe_figures,
    list_ways,
)
from preflight.foresight.child import LackOfMemory
from preflight.foresight.run_time import count_training_flops
from preflight.foresight.step_parts import estimate_by_rate
from preflight.foresight.way_trial import WaySpec, may_be_long, pick_affordable, try_ways

if TYPE_CHECKING:
    from preflight.modes.setup import RunSetup

KEPT = "as the run began"


def choose_run_way(setup: RunSetup) -> ChosenWay | None:
    """What a run takes where no flag says otherwise; ``None`` leaves it to the rule.

    Raises:
        PreflightError: code SIGINT or SIGTERM, when a signal ended a trial.
    """
    system = setup.given.system
    device = choose_device(system.device)
    if None not in (system.mixed_precision, system.compile_model):
        return None
    origin = setup.known_origin
    if origin is not None:
        return find_kept_way(origin.config.get("runtime"), device)
    if device.type != "cpu" or setup.ranks.world > 1:  # a trial is of one process
        return None
    spec = _build_spec(setup, build_runtime(system, 1))
    return None if spec is None else _choose(setup, spec)


def find_kept_way(saved: Any, device: torch.device) -> ChosenWay | None:
    """The way of a checkpoint's run, so that it goes on as it began; ``None`` where it cannot.

    Args:
        saved: the section ``runtime`` of its ``config.json``, which a stranger may have written.
        device: of the run that continues.
    """
    if not isinstance(saved, dict) or saved.get("device") != device.type:
        return None
    precision, compiled = saved.get("precision"), saved.get("compile_model")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        return None
    if not isinstance(compiled, bool):
        return None
    if precision == "bfloat16" and not has_fast_bf16(device):
        return None
    if precision == "float16" and device.type != "cuda":
        return None
    missing = find_missing_compiler(device) if compiled else ""
    notes = (f"compilation: not as the run began, since {missing}",) if missing else ()
    way = Way.model_validate({"precision": precision, "compiled": compiled and not missing})
    return ChosenWay(way, KEPT, notes)


def _build_spec(setup: RunSetup, runtime: Runtime) -> WaySpec | None:
    """What a trial would try; ``None`` without anything to try, or a part of the run."""
    system = setup.given.system
    rule = Way.model_validate(
        {
            "precision": str(runtime.dtype).removeprefix("torch."),
            "compiled": bool(system.compile_model),
        }
    )
    ways = list_ways(
        rule,
        precision_is_open=system.mixed_precision is None and not rule.compiled,
        compilation_is_open=system.compile_model is None,
    )
    if len(ways) == 1:
        return None
    try:
        model_config, training, plan = setup.model_config, setup.config.training, setup.plan
    except PreflightError:  # whoever needs them says so
        return None
    n_steps = plan.total_steps - setup.state.step
    checkpointing = setup.config.system.gradient_checkpointing
    return WaySpec(model_config, training, plan, runtime, ways, n_steps, checkpointing)


def _choose(setup: RunSetup, spec: WaySpec) -> ChosenWay | None:
    key = describe_step(spec)
    known = recall(key, WayFigures)
    if known is not None and _is_enough(known, spec):
        return _take(known, spec, "remembered")
    if not setup.measures or not may_be_long(spec.model_config, spec.plan, spec.n_steps):
        return None
    micro_step_seconds = _estimate_micro_step(spec)
    if not pick_affordable(spec.ways, spec.n_micro_steps, micro_step_seconds):
        return None
    missing = find_missing_compiler(spec.runtime.device)
    if missing:
        log.info(f"compilation is not tried: {missing}")
        spec = dataclasses.replace(spec, ways=[way for way in spec.ways if not way.compiled])
        if len(spec.ways) == 1:
            return None
    log.info("trying precision and compilation on a few steps (a flag for both: no trial)")
    began = time.monotonic()
    found = _try(spec, micro_step_seconds, setup.stop)
    if found is None:
        return None
    remember(key, found)
    return _take(found, spec, f"measured in {time.monotonic() - began:.0f} s")


def describe_step(spec: WaySpec) -> dict[str, Any]:
    """What the time of a step depends on, as plain JSON types."""
    training = spec.training
    return {
        "of": "training step",
        "machine": describe_hardware(spec.runtime.device),
        "model": dataclasses.asdict(spec.model_config),
        "batch_size": training.batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "window_tokens": spec.plan.window_tokens,
        "optimizer": training.optimizer,
        "gradient_checkpointing": spec.gradient_checkpointing,
    }


def _is_enough(known: WayFigures, spec: WaySpec) -> bool:
    """Whether figures hold every way that a trial could try now; another may be too expensive."""
    measured = [figure.way for figure in known.figures]
    if measured[0] != spec.ways[0]:
        return False
    micro_step_seconds = known.figures[0].step_seconds / spec.plan.accumulation_steps
    wanted = pick_affordable(spec.ways, spec.n_micro_steps, micro_step_seconds)
    return all(way in measured for way in wanted)


def _take(known: WayFigures, spec: WaySpec, how: str) -> ChosenWay:
    figures = [figure for figure in known.figures if figure.way in spec.ways]
    best = choose_way(figures, spec.n_steps)
    told = describe_figures(figures, best.way, spec.plan.tokens_per_step)
    return ChosenWay(best.way, "the fastest that was tried", (f"tried: {told} ({how})",))


def _estimate_micro_step(spec: WaySpec) -> float:
    """Seconds of a micro-step, from the rate of a matmul: a model built here would be in memory."""
    model = dataclasses.replace(spec.model_config, context_length=spec.plan.window_tokens)
    estimate = estimate_by_rate(
        model,
        spec.training,
        matmul_flops=measure_matmul_flops(spec.runtime.device, spec.runtime.dtype),
        flops_per_token=count_training_flops(model, spec.training),
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    return estimate.step_seconds / spec.plan.accumulation_steps


def _try(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures | None:
    """What a trial measured; a trial that failed is told, and the run takes what the rule says."""
    try:
        found = try_ways(spec, micro_step_seconds, stop)
    except PreflightError as error:
        if error.code != ExitCode.WORKER_LOST:
            raise
        reason = error.lines[0]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
    else:
        if not isinstance(found, LackOfMemory):
            return found
        reason = f"out of memory: {found.reason}"
    log.warning(f"the trial of precision and compilation failed ({reason}); going on without it")
    return None
