"""The learning rate of each update, by schedule.

A schedule is a function of the update's number, counted from 0, and of the plan.
"""

from __future__ import annotations

import math

from preflight.settings.kinds import SCHEDULES
from preflight.training.plan import TrainingPlan

COSINE_FLOOR = 0.1  # share of the peak at the end (Brown et al. 2020, appendix B)
# One-cycle's start and end as shares of the peak: torch's OneCycleLR (Smith & Topin 2017).
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4

# Hägele et al. 2024: from a fifth of the run on, a longer decay gains no more (figure 5).
WSD_DECAY_SHARE = 0.2


def learning_rate_at(step: int, plan: TrainingPlan) -> float:
    """The learning rate of update `step`, counted from 0, by the plan's schedule."""
    return SCHEDULES.load(plan.scheduler)(step, plan)


def cosine(step: int, plan: TrainingPlan) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5.
    """
    if step < plan.warmup_steps:
        return _warm_up(step, plan)
    half_wave = 0.5 * (1 + math.cos(math.pi * _progress(step, plan)))
    return plan.peak_learning_rate * (COSINE_FLOOR + (1 - COSINE_FLOOR) * half_wave)


def linear(step: int, plan: TrainingPlan) -> float:
    """Linear warm-up, then a straight line down to zero."""
    if step < plan.warmup_steps:
        return _warm_up(step, plan)
    return plan.peak_learning_rate * (1 - _progress(step, plan))


def constant(step: int, plan: TrainingPlan) -> float:
    """Linear warm-up, then the peak."""
    return _warm_up(step, plan) if step < plan.warmup_steps else plan.peak_learning_rate


def onecycle(step: int, plan: TrainingPlan) -> float:
    """Half a cosine up to the peak over the warm-up, and another down: torch's OneCycleLR."""
    peak, top = plan.peak_learning_rate, max(plan.warmup_steps - 1, 1)
    if step <= top:
        return _anneal(peak * ONECYCLE_START, peak, step / top)
    share = (step - top) / max(1, plan.total_steps - 1 - top)
    return _anneal(peak, peak * ONECYCLE_END, share)


def warmup_stable_decay(step: int, plan: TrainingPlan) -> float:
    """Linear warm-up, the peak, and over the last fifth of the run a fall to zero by 1 - sqrt.

    Until the fall the length of the run plays no part: a run that stands there can be made longer.
    Source: Hägele et al. 2024, arXiv:2405.18392, eq. 2.
    """
    start = find_decay_start(plan)
    if step < max(start, plan.warmup_steps):
        return constant(step, plan)
    share = (step - start) / max(1, plan.total_steps - start)
    return plan.peak_learning_rate * (1 - math.sqrt(min(1.0, share)))


def find_decay_start(plan: TrainingPlan) -> int:
    """The step after which `warmup_stable_decay` falls."""
    return plan.total_steps - math.ceil(WSD_DECAY_SHARE * plan.total_steps)


def find_extension_step(plan: TrainingPlan) -> int | None:
    """The last step from which a run can be made longer without a jump of its learning rate.

    ``None`` for a schedule that depends on the length from its start on, or not at all.
    """
    is_wsd = SCHEDULES.load(plan.scheduler) is warmup_stable_decay
    return find_decay_start(plan) if is_wsd else None


def _warm_up(step: int, plan: TrainingPlan) -> float:
    return plan.peak_learning_rate * (step + 1) / plan.warmup_steps


def _progress(step: int, plan: TrainingPlan) -> float:
    """How much of the way from the warm-up to the end is done, at most 1."""
    length = max(1, plan.total_steps - plan.warmup_steps)
    return min(1.0, (step - plan.warmup_steps) / length)


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))
