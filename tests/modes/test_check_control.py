"""`--check`: early stopping and TensorBoard, where they change the run."""

from __future__ import annotations

import sys

import pytest

from conftest import MakeConfig
from preflight.modes import check
from preflight.modes.check import build_report


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine plays no part."""
    monkeypatch.setattr(check, "measure_matmul_flops", lambda *args: 1e10)


def test_the_time_is_a_bound_where_the_run_may_stop_early(make_config: MakeConfig) -> None:
    flags = {"tokenizer": "byte", "max_steps": 100, "eval_every": 20, "tensorboard": True}
    report = build_report(make_config(early_stopping_patience=2, **flags))
    rows = report.sections["training configuration"]
    assert (rows["early_stopping_patience"], rows["earliest_stop_step"]) == (2, 60)
    assert rows["tensorboard"] is True
    bound = report.sections["performance estimation"]["upper_bound"]
    assert bound == "early stopping may end the run from step 60 on"
    assert report.answers[1].verdict.startswith("at most ")
    # Five evaluations, of which the first is the best and the last at the end.
    late = build_report(make_config(early_stopping_patience=4, **flags))
    assert "upper_bound" not in late.sections["performance estimation"]
    assert not late.answers[1].verdict.startswith("at most ")
    (warning,) = (w for w in late.warnings if w.key == "early_stopping")
    assert "cannot stop this run" in warning.text
    assert "cannot stop" not in late.answers[2].text


def test_a_library_that_tensorboard_lacks_is_a_problem(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "preflight.training.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    report = build_report(make_config(tokenizer="byte", tensorboard=True))
    assert [problem.fix for problem in report.problems] == ["pip install tensorboardX"]
    assert "tensorboard" not in report.sections["training configuration"]
