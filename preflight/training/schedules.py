"""The learning rate of each step."""

from __future__ import annotations

import math

from preflight.training.plan import TrainingPlan

COSINE_FLOOR = 0.1  # share of the peak rate at the end (Brown et al. 2020, appendix B)


# One-cycle's start and end as shares of the peak: torch's OneCycleLR (Smith & Topin 2017).
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4


def learning_rate_at(step: int, plan: TrainingPlan) -> float:
    """The rate of update `step`, counted from 0: linear warm-up, then the schedule.

    Cosine follows Loshchilov & Hutter 2017 (arXiv:1608.03983, eq. 5) down to a tenth of the peak;
    onecycle follows torch's OneCycleLR; linear falls to zero at the end.
    """
    warmup, total, peak = plan.warmup_steps, plan.total_steps, plan.peak_learning_rate
    if plan.scheduler == "onecycle":
        return _onecycle_rate(step, warmup, total, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if plan.scheduler == "cosine":
        return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress) if plan.scheduler == "linear" else peak


def _onecycle_rate(step: int, warmup: int, total: int, peak: float) -> float:
    def anneal(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))

    top = max(warmup - 1, 1)
    if step <= top:
        return anneal(peak * ONECYCLE_START, peak, step / top)
    return anneal(peak, peak * ONECYCLE_END, (step - top) / max(1, total - 1 - top))
