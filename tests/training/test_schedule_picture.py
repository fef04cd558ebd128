"""The picture of the schedule that `--check` writes."""

from __future__ import annotations

import pytest

from conftest import MakeConfig
from preflight.core.errors import ExitCode
from preflight.modes import check
from preflight.settings import ControlSettings, TrainingSettings
from preflight.training.plan import TrainingPlan, build_plan
from preflight.training.schedule_picture import choose_points, list_marks


def build(steps: int, scheduler: str) -> TrainingPlan:
    training = TrainingSettings(max_steps=steps, scheduler=scheduler)
    return build_plan(training, ControlSettings(), 16, 1000, 20)


@pytest.mark.parametrize("steps", [1, 2, 1999, 10**7])
def test_points_are_few_and_reach_both_ends(steps: int) -> None:
    points = choose_points(build(steps, "cosine"))
    assert (points[0], points[-1]) == (0, steps - 1)
    assert len(points) == min(steps, 2000)


def test_marks_name_what_the_schedule_has() -> None:
    assert list_marks(build(100, "cosine")) == {"end of warm-up": 5, "end": 100}
    assert list_marks(build(100, "wsd"))["start of decay"] == 80


def test_check_draws_it_and_replaces_no_picture_of_others(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(output_dir="out", scheduler="wsd")
    check.run(config)
    path = check.Path("out/schedule.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    check.Path("out/check_report.json").unlink()
    path.write_bytes(b"mine")
    assert check.run(config) == ExitCode.CHECK_FAILED
    assert "another program's file" in capsys.readouterr().out
    assert path.read_bytes() == b"mine"
