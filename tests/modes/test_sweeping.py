"""`--sweep`: rows, the journal, interruption, and that a training is what a run would do."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from modes import fake_child

import main
from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.foresight import short_training
from preflight.foresight.short_training import (
    TrainingResult,
    TrainingSpec,
    average_neighbours,
    train_shortly,
)
from preflight.modes import sweep, train
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig
from preflight.training.metrics import read_metrics
from trainer import Trainer


class Trials:
    """Counts the trainings, and answers for them; `stop_after` of them a signal comes."""

    def __init__(self, stop_after: int = 99) -> None:
        self.specs: list[TrainingSpec] = []
        self.stop_after = stop_after

    def __call__(self, spec: TrainingSpec, rules: Any, on_step: Any) -> TrainingResult:
        if len(self.specs) == self.stop_after:
            rules.stop.received = 15
        rules.stop.leave_if_stopping(*rules.stopped)
        self.specs.append(spec)
        on_step((1, 5.0))
        rate = spec.training.learning_rate or 0
        if rate > 1:
            return TrainingResult(1, losses=(5.0,), failure="diverged: as it must")
        bits = 2 + abs(math.log10(rate / 1e-3))
        return TrainingResult(spec.n_steps, 512, 2.0, 0.5, 8, bits, bits, (5.0, 4.0))


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """A tiny run with a vocabulary that takes no time."""
    return lambda **flags: make_config(**{"tokenizer": "byte"} | flags)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(sweep, "_draw", lambda path, rows: None)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()
    monkeypatch.setattr(sweep, "try_training", made)
    return made


def read_report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path("training_output") / sweep.REPORT_NAME).read_text())
    return report


def test_a_table_with_the_best_marked_and_a_failure_as_a_row(
    make_config: MakeConfig, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learning_rate=1e-4,1e-3,10"]
    assert sweep.run(make_config(sweep=words, sweep_steps=4)) == ExitCode.DONE
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line[2:].startswith("--learning-rate")]
    assert [row[0] for row in rows] == [" ", "*", " "]
    assert rows[1].split()[1:] == [
        "--learning-rate",
        "0.001",
        "4",
        "2.0000",
        "2.0000",
        "2.5",
        "256",
    ]
    assert rows[2].endswith("diverged: as it must")
    assert out.splitlines()[-1].endswith("--learning-rate 0.001")
    report = read_report()
    assert next(iter(report)) == "format"
    assert report["flags"] == "--learning-rate 0.001"
    assert [row["values"]["learning_rate"] for row in report["rows"]] == [1e-4, 1e-3, 10.0]
    assert (Path("training_output") / sweep.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_picture")
def test_no_training_that_ends_is_a_failure(
    make_config: MakeConfig, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.run(make_config(sweep=["learning_rate=20"])) == ExitCode.CHECK_FAILED
    assert "no training reached its end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("max_steps", "sweep_steps", "tokens"),
    [
        (40_000, 400, 0.3 * 400 * 4 * 32),  # a tenth of the trainings' time
        (4000, 10, sweep.LEAST_EVAL_TOKENS),
        (20, 400, 8 * 32),  # of the run's own evaluations
    ],
)
@pytest.mark.usefixtures("no_picture")
def test_an_evaluation_is_cheap_beside_its_training(
    make_config: MakeConfig, trials: Trials, max_steps: int, sweep_steps: int, tokens: float
) -> None:
    words = ["gradient_accumulation_steps=1,2"]
    flags = {"max_steps": max_steps, "sweep_steps": sweep_steps, "val_split": 0.5}
    sweep.run(make_config(sweep=words, **flags))
    assert [spec.plan.eval_windows * 32 for spec in trials.specs] == [tokens] * 2
    assert len({spec.n_steps * spec.plan.tokens_per_step for spec in trials.specs}) == 1


@pytest.mark.usefixtures("no_picture")
def test_an_interrupted_sweep_continues(
    make_config: MakeConfig, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learning_rate=1e-4,1e-3,1e-2", "weight_decay=0.1,0.2"]
    trials.stop_after = 4
    with pytest.raises(PreflightError, match="run the same command again") as caught:
        sweep.run(make_config(sweep=words))
    assert caught.value.code == ExitCode.SIGTERM
    assert len(read_report()["rows"]) == 4
    trials.stop_after = 99
    assert sweep.run(make_config(sweep=words, json=True)) == ExitCode.DONE
    assert len(trials.specs) == 6, "no training runs twice"
    report = json.loads(capsys.readouterr().out)
    assert report == read_report()
    assert len(report["rows"]) == 6
    assert sweep.run(make_config(sweep=["learning_rate=1e-3,3e-3"])) == ExitCode.DONE
    assert len(trials.specs) == 7, "one of them has been done in the first sweep"
    assert sweep.run(make_config(sweep=["learning_rate=1e-3"], seed=1)) == ExitCode.DONE
    assert len(trials.specs) == 8, "another seed is another training"


@pytest.mark.usefixtures("no_picture")
def test_a_damaged_journal_and_a_lack_of_memory_run_again(
    make_config: MakeConfig, trials: Trials
) -> None:
    config = make_config(sweep=["learning_rate=1e-3,1e-2"])
    sweep.run(config)
    report = read_report()
    path = Path("training_output") / sweep.REPORT_NAME
    report["rows"][0]["failure"] = "out of memory: killed"
    path.write_text(json.dumps(report, indent=2))
    sweep.run(config)
    assert len(trials.specs) == 3
    path.write_text(json.dumps(report, indent=2)[:300])
    sweep.run(config)
    assert len(trials.specs) == 5


def test_bad_flags(
    make_config: MakeConfig, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PreflightError, match="--learning-rate is given") as caught:
        sweep.run(make_config(sweep=["learning_rate=1,2"], learning_rate=1.0))
    assert caught.value.code == ExitCode.FLAGS
    assert main.main(["--sweep", "learning_rate=a", "n_heads=3"]) == ExitCode.FLAGS
    assert "--learning-rate takes a number" in capsys.readouterr().err
    assert main.main(["--sweep", "n_heads=3", "--n-embeddings", "64"]) == ExitCode.FLAGS
    assert "--n-heads 3 does not divide" in capsys.readouterr().err
    assert main.main(["--sweep", "seed=1,2", "--train"]) == ExitCode.FLAGS
    assert "found --train and --sweep" in capsys.readouterr().err
    assert main.main(["--sweep"]) == ExitCode.FLAGS
    assert "expected at least one argument" in capsys.readouterr().err
    assert not Path("training_output").exists()
    assert not trials.specs


def test_the_flags_of_the_command_line_are_those_of_the_mode() -> None:
    mode, config = main.parse_command_line(["--sweep", "seed=1", "--batch-size", "2"])
    assert (mode, config.trials.sweep) == ("sweep", ("seed=1",))
    assert main.parse_command_line(["--find-lr"])[0] == "find-lr"
    assert main.parse_command_line(["--sweep", "a=1", "--sweep", "b=2"])[1].trials.sweep == (
        "a=1",
        "b=2",
    )


# ---- the short training -------------------------------------------------------------------------


def build_spec(config: RunConfig, **changes: Any) -> TrainingSpec:
    setup = RunSetup(config, StopFlag(), continues=False)
    spec = TrainingSpec(setup.config, setup.model_config, setup.data, 4, 4)
    return dataclasses.replace(spec, **changes)


def test_a_short_training_is_what_a_run_of_its_length_does(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, learning rates and validation windows: the same losses, bit for bit."""
    config = make_config(max_steps=4, dropout=0.1, learning_rate=3e-3)
    fake_child.install(monkeypatch, short_training)
    steps: list[tuple[int, float]] = []
    workshop_rules: Any = dataclasses.make_dataclass("Rules", ["stop", "stopped"])(StopFlag(), ())
    result = short_training.try_training(build_spec(config), workshop_rules, steps.append)
    assert train.run(config) == ExitCode.DONE
    rows = list(read_metrics(Path("training_output/metrics.jsonl")))
    assert steps == [(r["step"], r["loss"]) for r in rows if r["event"] == "step"]
    last = [row for row in rows if row["event"] == "eval"][-1]
    assert (result.val_loss, result.bits_per_byte) == (last["val_loss"], last["bits_per_byte"])
    assert result.losses == tuple(loss for _, loss in steps)
    assert result.n_tokens == 4 * 4 * 32
    assert not Path("training_output/milestones/checkpoint-5").exists()


def test_its_schedule_is_the_run_s_shortened(make_config: MakeConfig) -> None:
    config = make_config(max_steps=1000, warmup_steps=100)
    spec = build_spec(config, n_steps=50, run_steps=1000)
    assert (spec.plan.total_steps, spec.plan.warmup_steps) == (50, 5)
    assert build_spec(config, n_steps=2, run_steps=1000).plan.warmup_steps == 1
    assert build_spec(make_config(warmup_steps=0), n_steps=5, run_steps=9).plan.warmup_steps == 0
    assert build_spec(config, eval_windows=3).plan.eval_windows == 3
    assert build_spec(config, eval_windows=10**9).plan.eval_windows < 10**3


def test_divergence_is_a_result(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = build_spec(make_config(), n_steps=20)
    step = Trainer.train_step

    def broken(self: Trainer, number: int, batches: Any) -> Any:
        result = step(self, number, batches)
        return dataclasses.replace(result, loss=result.loss * math.nan) if number else result

    monkeypatch.setattr(Trainer, "train_step", broken)
    result = train_shortly(spec, lambda message: None)
    assert result.failure.startswith("diverged: loss or gradient not finite in 10 steps")
    assert result.bits_per_byte is None
    assert result.n_steps == 11


def test_long_curves_are_means_of_neighbours() -> None:
    assert average_neighbours([1.0, 3.0, 5.0]) == (1.0, 3.0, 5.0)
    assert average_neighbours([1.0, 3.0, 5.0, 7.0, 9.0], 3) == (2.0, 6.0, 9.0)
    assert average_neighbours([1.0, math.nan], 1) == (1.0,)
    assert average_neighbours([]) == ()
