"""The time left, against the wall of runs whose clock is made up."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from preflight.core.units import format_seconds
from preflight.device.runtime import Runtime
from preflight.settings import ControlSettings, TrainingSettings
from preflight.training import recording
from preflight.training.divergence import DivergenceGuard
from preflight.training.plan import build_plan
from preflight.training.recording import StepRecorder
from preflight.training.state import StepResult, TrainState
from preflight.training.time_left import TimeLeft
from preflight.training.trackers import Trackers

TOTAL, EVAL_EVERY, SAVE_EVERY = 1000, 50, 130


def run_with_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, stopped_at: int = 0
) -> tuple[dict[int, float], dict[int, float]]:
    """(estimates, truth) in seconds, by the step after which they were told or are true.

    A step takes 2 s, the first one of the process a minute; an evaluation 20 s, a save 5 s. At
    `stopped_at` the process is stopped for an hour.
    """
    clock, told, ends = [0.0], {}, {}
    monkeypatch.setattr(recording.time, "monotonic", lambda: clock[0])
    control = ControlSettings(eval_every=EVAL_EVERY, checkpoint_every=SAVE_EVERY)
    plan = build_plan(TrainingSettings(max_steps=TOTAL), control, 16, 1000, 20)
    runtime = SimpleNamespace(device=torch.device("cpu"), peak_memory_bytes=lambda: 7)
    guard = DivergenceGuard(tmp_path, fp16=False)
    recorder = StepRecorder(
        plan,
        cast(Runtime, runtime),
        TrainState(step=first),
        Trackers(tmp_path, control),
        guard,
        0.25,
    )
    estimate = TimeLeft.estimate

    def keep(self: TimeLeft, step: int) -> float | None:
        told[step] = estimate(self, step)
        return told[step]

    monkeypatch.setattr(TimeLeft, "estimate", keep)
    for step in range(first + 1, TOTAL + 1):
        clock[0] += 60 if step == first + 1 else 3600 if step == stopped_at else 2
        recorder.record(StepResult(step, 128, 1e-3, torch.tensor(2.0), torch.tensor(1.0)))
        ends[step] = clock[0]
        if step % SAVE_EVERY == 0 or step == TOTAL:
            with recorder.paused("save", SAVE_EVERY):
                clock[0] += 5
        if step % EVAL_EVERY == 0 or step == TOTAL:
            with recorder.paused("evaluation", EVAL_EVERY):
                clock[0] += 20
    return told, {step: clock[0] - end for step, end in ends.items()}


@pytest.mark.parametrize("first", [0, 400])
def test_it_is_what_the_wall_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Also after a resume, where the steps of the earlier run say nothing of this machine."""
    told, truth = run_with_clock(tmp_path, monkeypatch, first)
    assert told.pop(first + 1) is None  # the first step warms up
    for step, seconds in told.items():
        known = step > first + max(EVAL_EVERY, SAVE_EVERY)  # each pause has been seen once
        assert seconds == pytest.approx(truth[step], rel=1e-6 if known else 0.25), step


def test_an_hour_of_being_stopped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, truth = run_with_clock(tmp_path, monkeypatch, 0, stopped_at=500)
    assert told[500] == pytest.approx(truth[500], rel=1e-6)


def test_the_log_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="preflight"):
        _, truth = run_with_clock(tmp_path, monkeypatch, 400)
    [line] = {m for m in caplog.messages if m.startswith("step 800/")}
    assert line.endswith(f"64 tokens/s  ETA {format_seconds(truth[800])}")
