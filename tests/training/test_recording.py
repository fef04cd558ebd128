"""The recorder: rows in order, one step late on a card, and the end of a run that diverges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log_once
from preflight.device.runtime import Runtime
from preflight.settings import ControlSettings, TrainingSettings
from preflight.settings.kinds import TRACKERS
from preflight.training import recording
from preflight.training.divergence import MAX_SKIPPED_IN_A_ROW, DivergenceGuard
from preflight.training.plan import build_plan
from preflight.training.recording import StepRecorder
from preflight.training.state import StepResult, TrainState
from preflight.training.trackers import Row, Trackers


class ListTracker:
    """A tracker that keeps its rows."""

    rows: list[Row]

    def __init__(self, output_dir: Path) -> None:
        self.rows, self.resumed = [], -1

    def resume(self, step: int) -> None:
        self.resumed = step

    def log(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ListTracker:
    """The tracker that every run of the test logs to, beside metrics.jsonl."""
    tracker = ListTracker(Path())
    monkeypatch.setattr(TRACKERS, "_targets", TRACKERS._targets | {"list": lambda _: tracker})
    return tracker


def build_recorder(tmp_path: Path, device: str, state: TrainState | None = None) -> StepRecorder:
    plan = build_plan(TrainingSettings(max_steps=100), ControlSettings(), 16, 1000, 20)
    runtime = SimpleNamespace(device=torch.device(device), peak_memory_bytes=lambda: 7)
    guard = DivergenceGuard(tmp_path, fp16=False)
    state = state or TrainState()
    trackers = Trackers(tmp_path, ControlSettings())
    return StepRecorder(plan, cast(Runtime, runtime), state, trackers, guard, 0.25)


def result(step: int, loss: float = 2.0) -> StepResult:
    return StepResult(step, 128, 1e-3, torch.tensor(loss), torch.tensor(1.0))


@pytest.mark.parametrize(("device", "late"), [("cpu", 0), ("cuda", 1)])
def test_rows_come_in_order_and_one_step_late_on_a_card(
    tmp_path: Path, kept: ListTracker, device: str, late: int
) -> None:
    state = TrainState(tokens=1000)  # of a run that had another batch size before
    recorder = build_recorder(tmp_path, device, state)
    for step in (1, 2, 3):
        state.advance(result(step), step)
        recorder.record(result(step, loss=float(step)))
        assert [row["step"] for row in kept.rows] == list(range(1, step + 1 - late))
    recorder.flush()
    assert [(row["step"], row["loss"], row["tokens"]) for row in kept.rows] == [
        (1, 1.0, 1128),
        (2, 2.0, 1256),
        (3, 3.0, 1384),
    ]


def test_a_pause_is_not_part_of_a_step(
    tmp_path: Path, kept: ListTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: clock[0])
    state = TrainState()
    recorder = build_recorder(tmp_path, "cpu", state)
    for step in (1, 2):
        clock[0] += 0.5
        recorder.record(result(step))
        with recorder.paused("evaluation", 50):
            clock[0] += 30
            with recorder.paused("save", 100):
                clock[0] += 60
    assert [row["tokens_per_second"] for row in kept.rows] == [256.0, 256.0]


def test_ten_skipped_steps_in_a_row_end_the_run(tmp_path: Path, kept: ListTracker) -> None:
    state = TrainState()
    recorder = build_recorder(tmp_path, "cpu", state)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        recorder.record(result(step, math.nan))
    recorder.record(result(MAX_SKIPPED_IN_A_ROW))  # a good one: the count starts anew
    assert recorder.guard.skipped_in_a_row == 0
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        recorder.record(result(step, math.inf))
    with pytest.raises(PreflightError) as caught:
        recorder.record(result(99, math.nan))
    assert caught.value.code == ExitCode.DIVERGED
    assert "none yet" in str(caught.value)
    assert [bool(row.get("skipped")) for row in kept.rows].count(False) == 1


def test_every_tracker_hears_of_everything(tmp_path: Path, kept: ListTracker) -> None:
    trackers: Any = Trackers(tmp_path, ControlSettings())
    trackers.log({"event": "step", "step": 1, "loss": 1.0})
    trackers.log({"event": "step", "step": 2, "loss": 1.0})
    trackers.resume(1)
    assert kept.resumed == 1
    assert len(kept.rows) == 2
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_the_bar_smooths_and_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    recorder = build_recorder(tmp_path, "cpu")
    shown: list[str] = []
    recorder.bar = SimpleNamespace(disable=False, update=lambda: None)  # type: ignore[assignment]
    recorder.bar.set_postfix_str = lambda text, refresh: shown.append(text)
    for step, loss in enumerate((4.0, 2.0, math.nan, 3.0), 1):
        recorder.record(result(step, loss))
    expected = [4.0, (0.98 * 4 + 2) / 1.98]
    expected += [expected[1], (0.98**2 * 4 + 0.98 * 2 + 3) / (0.98**2 + 1.98)]
    assert [text.split(",")[0] for text in shown] == [f"loss {value:.3f}" for value in expected]


def test_step_lines_and_rows_tell_bits_per_byte(
    tmp_path: Path, kept: ListTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    build_recorder(tmp_path, "cpu").record(result(1, loss=4 * math.log(2)))
    assert kept.rows[0]["bits_per_byte"] == pytest.approx(1.0)  # 4 bits a token of 4 bytes
    assert "loss 2.7726  1.000 bits per byte" in capsys.readouterr().err


def test_zero_gradients_are_told(
    tmp_path: Path, kept: ListTracker, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    recorder = build_recorder(tmp_path, "cpu")
    recorder.record(result(1))
    assert "gradients are zero" not in caplog.text
    recorder.record(replace(result(2), grad_norm=torch.tensor(0.0)))
    assert "gradients are zero" in caplog.text
