"""Precision and compilation of a run: tried, remembered, kept by a run that continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device.test_ranks import run_ranks
from test_training_run import assert_equal_states, read_state, stop_after

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device import runtime as device_runtime
from preflight.device.ranks import Ranks
from preflight.device.remembered import FOLDER_VARIABLE
from preflight.device.runtime import Runtime
from preflight.device.ways import Way, WayFigure, WayFigures
from preflight.foresight import trials, way_trial
from preflight.foresight.child import LackOfMemory
from preflight.foresight.trial_spec import TrialSpec
from preflight.foresight.way_trial import WaySpec
from preflight.modes import check, choosing_way, train
from preflight.modes.choosing_way import KEPT, find_kept_way
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.modes.setup import RunSetup

CPU = torch.device("cpu")
# GPT-2's vocabulary would make the steps in emulated bf16 long.
OPEN: dict[str, Any] = {"mixed_precision": None, "compile_model": False, "tokenizer": "byte"}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with bf16 and an empty cache, on which every run is long enough for a trial."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    for module in (device_runtime, choosing_way):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(device_runtime, "is_bf16_faster", lambda: True)
    monkeypatch.setattr(way_trial, "TRIAL_SHARE", 1e9)


@pytest.fixture
def told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """The log's lines with these words."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda words: [line for line in caplog.messages if words in line]


def fake_trial(
    monkeypatch: pytest.MonkeyPatch, fastest: str, seconds: float = 1.0
) -> list[WaySpec]:
    """Trials find this precision three times as fast; the list gets what they were asked."""
    asked: list[WaySpec] = []

    def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures:
        asked.append(spec)
        factors = [1 if way.precision == fastest else 3 for way in spec.ways]
        return WayFigures(
            figures=[
                WayFigure(way=way, step_seconds=factor * seconds)
                for way, factor in zip(spec.ways, factors, strict=True)
            ]
        )

    monkeypatch.setattr(choosing_way, "try_ways", try_ways)
    return asked


def forbid_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures:
        raise AssertionError("a trial")

    monkeypatch.setattr(choosing_way, "try_ways", try_ways)


def read_runtime(output_dir: str, step: int) -> dict[str, Any]:
    path = Path(output_dir) / "milestones" / f"checkpoint-{step}" / "config.json"
    section: dict[str, Any] = json.loads(path.read_text())["runtime"]
    return section


def test_a_trial_leaves_the_run_s_bits_alone(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[str], list[str]],
) -> None:
    """Tried in a real child, remembered, and given by a flag: the same weights and state."""
    dropout = {"max_steps": 6, "dropout": 0.1}
    assert train.run(make_config(**OPEN, **dropout, output_dir="tried")) == 0
    [line] = told("tried: ")
    assert "tokens/s" in line
    assert "(measured in " in line
    assert len(told("trying precision")) == 1
    forbid_trials(monkeypatch)
    assert train.run(make_config(**OPEN, **dropout, output_dir="remembered")) == 0
    assert told("tried: ")[1].endswith("(remembered)")
    taken = read_runtime("tried", 6)
    assert taken == read_runtime("remembered", 6)
    flags = OPEN | {"mixed_precision": taken["precision"] != "float32"}
    assert train.run(make_config(**flags, **dropout, output_dir="flags")) == 0
    states = [read_state(Path(name), 6) for name in ("tried", "remembered", "flags")]
    for weights, state in states[1:]:
        assert weights == states[0][0]
        assert_equal_states(state, states[0][1])


@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
def test_the_fastest_is_taken_and_saved_with_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    asked = fake_trial(monkeypatch, fastest)
    assert train.run(make_config(**OPEN, max_steps=2, output_dir="out")) == 0
    assert read_runtime("out", 2)["precision"] == fastest
    assert [spec.n_steps for spec in asked] == [2]
    assert [way.precision for way in asked[0].ways] == ["bfloat16", "float32"]


def test_a_cut_run_keeps_its_way_and_equals_the_unbroken_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_trial(monkeypatch, "float32")
    assert train.run(make_config(**OPEN, max_steps=6, output_dir="whole")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train.run(make_config(**OPEN, max_steps=6, output_dir="cut")) == ExitCode.SIGTERM
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "another"))  # nothing is remembered
    assert fake_trial(monkeypatch, "bfloat16") == []
    assert train.run(make_config(**OPEN, max_steps=6, output_dir="cut")) == 0
    assert read_runtime("cut", 6)["precision"] == "float32"
    whole, cut = (read_state(Path(name), 6) for name in ("whole", "cut"))
    assert whole[0] == cut[0]
    assert_equal_states(whole[1], cut[1])


def test_a_flag_changes_the_way_of_a_run_that_continues(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, told: Callable[[str], list[str]]
) -> None:
    fake_trial(monkeypatch, "float32")
    assert train.run(make_config(**OPEN, max_steps=2, output_dir="out")) == 0
    flags = OPEN | {"mixed_precision": True}
    assert train.run(make_config(**flags, max_steps=4, output_dir="out")) == 0
    assert read_runtime("out", 4)["precision"] == "bfloat16"
    assert told("changed since the checkpoint: precision float32 -> bfloat16")


def test_flags_for_both_leave_nothing_to_try(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_trials(monkeypatch)
    for mixed in (True, False):
        config = make_config(**OPEN | {"mixed_precision": mixed}, max_steps=1)
        setup = RunSetup(config, StopFlag(), continues=False, measures=True)
        assert setup.runtime.dtype == (torch.bfloat16 if mixed else torch.float32)
        assert "data" not in setup.__dict__["_parts"]  # it need not be made for that


def test_a_short_run_keeps_the_immediate_path(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way_trial, "TRIAL_SHARE", 0.02)
    forbid_trials(monkeypatch)
    monkeypatch.setattr(choosing_way, "measure_matmul_flops", None)  # not even the rate
    setup = RunSetup(make_config(mixed_precision=None), StopFlag(), measures=True)
    assert (setup.runtime.dtype, setup.runtime.compile_model) == (torch.bfloat16, False)
    assert len(setup.runtime.notes) == 3


def test_the_check_fills_what_the_run_takes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_trial(monkeypatch, "float32")
    report = check.build_report(make_config(**OPEN, max_steps=3))  # --no-measure
    assert asked == []
    assert report.sections["training configuration"]["precision"] == "bfloat16"
    report = check.build_report(make_config(**OPEN, max_steps=3, measure=True))
    assert len(asked) == 1
    assert report.sections["training configuration"]["precision"] == "float32"
    forbid_trials(monkeypatch)
    report = check.build_report(make_config(**OPEN, max_steps=3))
    assert report.sections["training configuration"]["precision"] == "float32"
    assert train.run(make_config(**OPEN, max_steps=3, output_dir="out")) == 0
    assert read_runtime("out", 3)["precision"] == "float32"


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("the trial failed:\nTraceback\nValueError: shapes"), "ValueError: shapes"),
        (PreflightError(ExitCode.WORKER_LOST, "gave no result"), "gave no result"),
        (LackOfMemory("9 GiB"), "out of memory: 9 GiB"),
    ],
)
def test_a_trial_that_fails_does_not_end_the_run(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[str], list[str]],
    failure: Any,
    words: str,
) -> None:
    def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> LackOfMemory:
        if isinstance(failure, LackOfMemory):
            return failure
        raise failure

    monkeypatch.setattr(choosing_way, "try_ways", try_ways)
    setup = RunSetup(make_config(**OPEN), StopFlag(), measures=True)
    assert setup.runtime.dtype == torch.bfloat16
    [line] = told("the trial of precision and compilation failed")
    assert words in line


def test_a_signal_ends_the_trial_and_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures:
        raise PreflightError(ExitCode.SIGTERM, "stopped")

    monkeypatch.setattr(choosing_way, "try_ways", try_ways)
    with pytest.raises(PreflightError) as caught:
        RunSetup(make_config(**OPEN), StopFlag(), measures=True).runtime  # noqa: B018
    assert caught.value.code == ExitCode.SIGTERM


def test_without_a_compiler_the_compilation_is_left_out_and_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, told: Callable[[str], list[str]]
) -> None:
    asked = fake_trial(monkeypatch, "bfloat16")
    monkeypatch.setattr(choosing_way, "find_missing_compiler", lambda device: "there is no g++")
    flags = OPEN | {"compile_model": None}
    setup = RunSetup(make_config(**flags), StopFlag(), measures=True)
    assert not setup.runtime.compile_model
    assert [way.compiled for way in asked[0].ways] == [False, False]
    assert told("compilation is not tried: there is no g++")


def test_figures_of_fewer_ways_suffice_only_for_as_short_a_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a second: 1,000 steps pay for two precisions, 3,000 for a compilation too."""
    monkeypatch.setattr(way_trial, "TRIAL_SHARE", 0.02)
    monkeypatch.setattr(choosing_way, "may_be_long", lambda *run: True)
    monkeypatch.setattr(choosing_way, "_estimate_micro_step", lambda spec: 1.0)
    monkeypatch.setattr(choosing_way, "find_missing_compiler", lambda device: "")
    asked = fake_trial(monkeypatch, "bfloat16")
    whole = choosing_way.try_ways

    def try_ways(spec: WaySpec, micro_step_seconds: float, stop: StopFlag) -> WayFigures:
        """As the child: without what is too expensive."""
        found = whole(spec, micro_step_seconds, stop)
        n_ways = len(way_trial.pick_affordable(spec.ways, spec.n_micro_steps, 1.0))
        return WayFigures(figures=found.figures[:n_ways])

    monkeypatch.setattr(choosing_way, "try_ways", try_ways)
    flags = OPEN | {"compile_model": None}

    def count_trials(n_steps: int) -> int:
        setup = RunSetup(make_config(**flags, max_steps=n_steps), StopFlag(), measures=True)
        setup.runtime  # noqa: B018
        return len(asked)

    assert [count_trials(n) for n in (50, 1000, 1000, 3000, 3000, 50)] == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {},
        {"device": "cuda", "precision": "float32", "compile_model": False},
        {"device": "cpu", "precision": "float16", "compile_model": False},
        {"device": "cpu", "precision": "float8", "compile_model": False},
        {"device": "cpu", "precision": ["float32"], "compile_model": False},
        {"device": "cpu", "precision": "float32", "compile_model": 1},
        {"device": "cpu", "precision": "float32"},
    ],
)
def test_what_a_checkpoint_cannot_hand_on(saved: Any) -> None:
    assert find_kept_way(saved, CPU) is None


def test_what_a_checkpoint_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"device": "cpu", "precision": "bfloat16", "compile_model": True}
    monkeypatch.setattr(choosing_way, "find_missing_compiler", lambda device: "")
    kept = find_kept_way(saved, CPU)
    assert kept is not None
    assert (kept.way, kept.why) == (Way(precision="bfloat16", compiled=True), KEPT)
    monkeypatch.setattr(choosing_way, "find_missing_compiler", lambda device: "there is no g++")
    kept = find_kept_way(saved, CPU)
    assert kept is not None
    assert kept.way == Way(precision="bfloat16")
    assert "there is no g++" in kept.notes[0]
    monkeypatch.setattr(choosing_way, "has_fast_bf16", lambda device: False)
    assert find_kept_way(saved, CPU) is None


def test_ranks_that_measure_otherwise_compute_the_same(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, in a fine-tuning, in a trial of a batch size."""
    config = make_config(**OPEN)
    tried: list[Runtime] = []
    monkeypatch.setattr(trials, "_load_libraries", lambda *_: None)
    monkeypatch.setattr(trials, "_run_phases", lambda *given: tried.append(given[2]))

    def choose(ranks: Ranks) -> list[torch.dtype]:
        monkeypatch.setattr(device_runtime, "is_bf16_faster", lambda: not ranks.is_first)
        with StopFlag() as stop:
            setup = RunSetup(config, stop, ranks=ranks)
            spec = TrialSpec(setup.config, setup.model_config, None, Path("trial"), ranks.world)
            taken = [setup.runtime, FinetuneSetup(config, stop, ranks=ranks).runtime]
        trials.measure(spec, ranks)
        return [runtime.dtype for runtime in (*taken, *tried)]

    assert run_ranks(2, choose) == [[torch.float32] * 3] * 2
