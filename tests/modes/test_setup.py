"""The one set-up: each part is made once, fails alone, and fails the same way every time."""

from __future__ import annotations

import dataclasses

import pytest

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.modes import run_settings, setup, train
from preflight.modes.part import part
from preflight.modes.setup import RunSetup


def test_each_part_is_made_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in (
        (run_settings, "find_origin"),
        (setup, "prepare_data"),
        (setup, "build_plan"),
        (setup, "build_runtime"),
    ):
        made = getattr(module, name)

        def counted(
            *args: object, made: object = made, name: str = name, **options: object
        ) -> object:
            calls.append(name)
            return made(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    run = RunSetup(make_config(), StopFlag())
    for _ in range(2):
        run.build_trainer()
        with run.open_loader() as loader:
            loader.next_batch()
        assert len(list(run.list_validation(2))) == 1
    assert sorted(calls) == ["build_plan", "build_runtime", "find_origin", "prepare_data"]


def test_a_part_that_fails_fails_once_and_leaves_the_others(make_config: MakeConfig) -> None:
    run = RunSetup(make_config(tokenizer="klingon"), StopFlag())
    errors = []
    for name in ("tokenizer", "model_config", "data", "tokenizer"):
        with pytest.raises(PreflightError) as caught:
            getattr(run, name)
        errors.append(caught.value)
    assert all(error is errors[0] for error in errors)
    assert run.origin is None
    assert run.config.training.learning_rate is not None
    assert run.context_length == 32
    assert run.runtime.device.type == "cpu"


def test_a_part_without_an_error_is_not_an_error(make_config: MakeConfig) -> None:
    """Only a `PreflightError` is kept: a bug shows again at each use."""

    class Broken:
        count = 0

        @part
        def value(self) -> int:
            """Never there."""
            self.count += 1
            raise ZeroDivisionError

    broken = Broken()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            broken.value  # noqa: B018
    assert broken.count == 2


def test_a_refused_origin_leaves_what_does_not_need_it(make_config: MakeConfig) -> None:
    assert train.run(make_config(max_steps=2)) == 0
    config = make_config(max_steps=4, n_layers=3)
    run = RunSetup(config, StopFlag())
    with pytest.raises(PreflightError) as caught:
        run.config  # noqa: B018
    assert caught.value.code == ExitCode.CHECKPOINT
    assert run.known_origin is None
    assert run.model_config.n_layers == 3
    assert run.state.step == 0
    assert run.plan.total_steps == 4


@pytest.mark.parametrize("resumes", [False, True])
def test_where_a_run_stands(make_config: MakeConfig, resumes: bool) -> None:
    assert train.run(make_config(max_steps=3)) == 0
    run = RunSetup(make_config(max_steps=6), StopFlag(), resumes=resumes)
    assert (run.state.step, run.state.cursor) == (3, 12)
    assert (run.state.tokens > 0) == resumes  # read from checkpoint.pt, or foreseen
    assert run.n_steps_to_come == 3
    if resumes:
        run.build_trainer()
        assert "trainer" not in run.saved  # the optimizer's state is handed over, not held twice


def test_another_batch_is_refused_unless_allowed(make_config: MakeConfig) -> None:
    assert train.run(make_config(max_steps=2)) == 0
    config = make_config(max_steps=4, batch_size=8)
    with pytest.raises(PreflightError) as caught:
        RunSetup(config, StopFlag(), resumes=True).plan  # noqa: B018
    assert caught.value.code == ExitCode.CHECKPOINT
    assert "--allow-batch-change" in str(caught.value)
    control = dataclasses.replace(config.control, allow_batch_change=True)
    allowed = RunSetup(dataclasses.replace(config, control=control), StopFlag(), resumes=True)
    assert allowed.plan.tokens_per_step == 8 * 32
