"""Early stopping: when it stops, what it keeps, and that a cut run goes on counting."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import MakeConfig
from preflight.checkpoints import store
from preflight.core.errors import ExitCode
from preflight.modes import train
from preflight.training.state import Evaluation

OUT = Path("training_output")
# The best evaluation is that of step 4, which is no step of a regular checkpoint.
LOSSES = {2: 4.0, 4: 3.0, 6: 3.5, 8: 3.0, 10: 3.2, 12: 1.0}
FLAGS = {"eval_every": 2, "checkpoint_every": 5, "max_steps": 12, "tokenizer": "byte"}


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which the run was evaluated; their losses are those of the table."""
    steps: list[int] = []

    def evaluate(run: train.TrainingRun) -> Evaluation:
        steps.append(run.state.step)
        return Evaluation(LOSSES[run.state.step], 1.0)

    monkeypatch.setattr(train.TrainingRun, "_evaluate", evaluate)
    return steps


def test_a_run_without_gain_stops_and_keeps_the_best(
    make_config: MakeConfig, evaluated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**FLAGS, early_stopping_patience=3)
    assert train.run(config) == ExitCode.DONE
    assert evaluated == [2, 4, 6, 8, 10]
    told = capsys.readouterr().err
    assert "stopping early: 3 evaluations without a validation loss below 3.0000" in told
    assert "(step 4, validation loss 3.0000" in told
    assert store.find_best(OUT).step == 4
    assert store.list_checkpoints(OUT)[0].step == 10
    assert train.run(config) == ExitCode.DONE  # again: it stays where it is
    assert store.list_checkpoints(OUT)[0].step == 10
    assert train.run(make_config(**FLAGS)) == ExitCode.DONE  # without patience it goes on
    assert evaluated[-1] == 12


def test_without_patience_nothing_stops(make_config: MakeConfig, evaluated: list[int]) -> None:
    assert train.run(make_config(**FLAGS)) == ExitCode.DONE
    assert evaluated == [2, 4, 6, 8, 10, 12]


def test_a_cut_run_goes_on_counting(
    make_config: MakeConfig, evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**FLAGS, early_stopping_patience=3)
    with monkeypatch.context() as patch:
        sample = train.TrainingRun._sample

        def kill_at_eight(run: train.TrainingRun) -> str:
            if run.state.step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return sample(run)

        patch.setattr(train.TrainingRun, "_sample", kill_at_eight)
        assert train.run(config) == ExitCode.SIGTERM
    assert train.run(config) == ExitCode.DONE
    assert evaluated == [2, 4, 6, 8, 10]
