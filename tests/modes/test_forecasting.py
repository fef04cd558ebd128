"""`--forecast`: its report, its journal, and what `--train` tells when the run is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.foresight.short_training import TrainingResult, TrainingSpec
from preflight.modes import forecast, train
from preflight.modes.forecast import compare_with_forecast
from preflight.modes.setup import RunSetup

REPORT = Path("training_output") / forecast.REPORT_NAME


class Trials:
    """Trainings whose loss falls with their length; `stop_after` of them a signal comes."""

    def __init__(self) -> None:
        self.specs: list[TrainingSpec] = []
        self.stop_after, self.failure = 99, ""

    def __call__(self, spec: TrainingSpec, rules: Any, on_step: Any) -> TrainingResult:
        if len(self.specs) == self.stop_after:
            rules.stop.received = 2
        rules.stop.leave_if_stopping(*rules.stopped)
        self.specs.append(spec)
        if self.failure:
            return TrainingResult(failure=self.failure)
        loss = 9.0 * (1 + spec.n_steps / 20) ** -0.2
        tokens, windows = spec.n_steps * 128, spec.plan.eval_windows
        return TrainingResult(
            spec.n_steps, tokens, spec.n_steps * 0.5, 2.0, windows, loss, loss / 3
        )


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()
    monkeypatch.setattr(forecast, "try_training", made)
    return made


def read_report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(REPORT.read_text())
    return report


def test_it_tells_bits_time_and_cost(
    make_config: MakeConfig, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(max_steps=1600, price_per_hour=3.6)
    assert forecast.run(config) == ExitCode.DONE
    assert [spec.n_steps for spec in trials.specs] == [50, 100, 200]
    windows = RunSetup(config, StopFlag()).plan.eval_windows
    assert {spec.plan.eval_windows for spec in trials.specs} == {windows}
    report, out = read_report(), capsys.readouterr().out
    assert next(iter(report)) == "format"
    bits = report["bits_per_byte"]
    assert f"{bits['loss']:.3f} bits per byte (90 % interval {bits['low']:.3f} to" in out
    # 1,600 steps of half a second, ten evaluations of 2 s, and the loss curves.
    assert report["seconds"] == pytest.approx(800 + 20, abs=10)
    assert report["cost"] == pytest.approx(report["seconds"] / 1000)
    assert f"at a cost of {report['cost']:.2f}" in out
    assert "it reads its text 2" in out
    assert forecast.run(make_config(max_steps=1600, json=True)) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == bits
    assert len(trials.specs) == 3, "what is done is not done again"


def test_an_interrupted_forecast_continues(make_config: MakeConfig, trials: Trials) -> None:
    trials.stop_after = 2
    with pytest.raises(PreflightError, match="run the same command again") as caught:
        forecast.run(make_config(max_steps=400))
    assert caught.value.code == ExitCode.SIGINT
    assert compare_with_forecast(RunSetup(make_config(max_steps=400), StopFlag())) is None
    trials.stop_after = 99
    assert forecast.run(make_config(max_steps=400)) == ExitCode.DONE
    assert [spec.n_steps for spec in trials.specs] == [25, 50, 100]
    assert forecast.run(make_config(max_steps=400, learning_rate=1.0)) == ExitCode.DONE
    assert len(trials.specs) == 6


def test_what_stands_in_the_way(make_config: MakeConfig, trials: Trials) -> None:
    with pytest.raises(
        PreflightError, match=r"63 steps is too short(.|\n)*--max-steps 64"
    ) as caught:
        forecast.run(make_config(max_steps=63))
    assert caught.value.code == ExitCode.FLAGS
    for failure, code, advice in (
        ("diverged: not finite", ExitCode.DIVERGED, "--find-lr"),
        ("out of memory: killed", ExitCode.OUT_OF_MEMORY, "--get-optimal-bs"),
    ):
        trials.failure = failure
        with pytest.raises(PreflightError, match=failure) as caught:
            forecast.run(make_config(max_steps=64))
        assert caught.value.code == code
        assert advice in caught.value.lines[-1]


def test_a_finished_run_is_compared(
    make_config: MakeConfig,
    trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(forecast, "LEAST_RUN_STEPS", 2)
    monkeypatch.setattr(forecast, "choose_lengths", lambda total: (1, 1, 2))
    assert forecast.run(make_config(max_steps=2)) == ExitCode.DONE
    assert read_report()["reached"] is None
    assert compare_with_forecast(RunSetup(make_config(max_steps=2), StopFlag())) is None
    monkeypatch.setattr("preflight.core.log.log.propagate", True)
    assert train.run(make_config(max_steps=2)) == ExitCode.DONE
    report = read_report()
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("forecast: ")]
    assert f"reached: {report['reached']:.3f}, " in told[-1]
    rows = [json.loads(x) for x in Path("training_output/metrics.jsonl").read_text().splitlines()]
    assert report["reached"] == [r for r in rows if r["event"] == "eval"][-1]["bits_per_byte"]
    inside = report["bits_per_byte"]["low"] <= report["reached"] <= report["bits_per_byte"]["high"]
    assert ("outside" not in told[-1]) == inside
    # A run with other settings is not compared, nor one whose forecast cannot be read.
    other = make_config(max_steps=2, n_layers=1)
    assert compare_with_forecast(RunSetup(other, StopFlag(), continues=False)) is None
    REPORT.write_text("{")
    assert compare_with_forecast(RunSetup(make_config(max_steps=2), StopFlag())) is None
