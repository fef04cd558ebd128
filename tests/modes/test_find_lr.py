"""`--find-lr`: what it writes and tells, and that the run afterwards does not notice it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from modes import fake_child

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.foresight.child import LackOfMemory
from preflight.modes import find_lr, train
from preflight.settings import build_config


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """A tiny run with a vocabulary that takes no time."""
    return lambda **flags: make_config(**{"tokenizer": "byte"} | flags)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_child.install(monkeypatch, find_lr)


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_afterwards_is_bit_identical(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_steps": 3, "dropout": 0.1}
    assert train.run(make_config(**flags, output_dir="without", data_dir="one")) == ExitCode.DONE
    config = make_config(**flags, output_dir="with", find_lr_steps=40, data_dir="two")
    assert find_lr.run(config) == ExitCode.DONE
    assert {*read_files(Path("with"))} == {find_lr.REPORT_NAME, find_lr.PICTURE_NAME}
    assert train.run(config) == ExitCode.DONE
    name = "milestones/checkpoint-3/model.safetensors"
    after = read_files(Path("with"))
    assert after[name] == (Path("without") / name).read_bytes()
    # Nor is a run that is there already touched.
    assert find_lr.run(config) == ExitCode.DONE
    again = read_files(Path("with"))
    assert {*again} == {*after}
    changed = {file for file in again if again[file] != after[file]}
    assert changed <= {find_lr.REPORT_NAME, find_lr.PICTURE_NAME}


def test_it_tells_both_learning_rates_and_the_flag(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(find_lr_steps=40, find_lr_max=100.0)
    assert find_lr.run(config) == ExitCode.DONE
    out = capsys.readouterr().out
    report = json.loads((Path("training_output") / find_lr.REPORT_NAME).read_text())
    assert next(iter(report)) == "format"
    assert report["flags"] == f"--learning-rate {report['suggested']:.2g}"
    for name in ("steepest", "tenth_of_minimum"):
        assert f"{report[name]:.2e}" in out
    assert out.count(report["flags"]) == 1
    assert "--train" in out
    rates = [rate for rate, _ in report["points"]]
    assert rates[0] == pytest.approx(1e-6)
    assert all(b / a == pytest.approx(1e8 ** (1 / 39)) for a, b in itertools.pairwise(rates))
    assert 1e-5 < report["suggested"] < 1


def test_json_and_a_test_that_finds_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(find_lr_steps=10, find_lr_max=1e-5, json=True)
    assert find_lr.run(config) == ExitCode.CHECK_FAILED
    report = json.loads(capsys.readouterr().out)
    assert report["suggested"] is report["flags"] is None
    assert "--find-lr-max" in report["fault"]


def test_what_stands_in_the_way(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="--find-lr-min") as caught:
        build_config({"find_lr_min": 1.0, "find_lr_max": 0.1}, {})
    assert caught.value.code == ExitCode.FLAGS
    config = make_config()
    monkeypatch.setattr(find_lr, "run_in_child", lambda *_: LackOfMemory("killed"))
    with pytest.raises(PreflightError, match="killed") as caught:
        find_lr.run(config)
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    picture = Path("training_output") / find_lr.PICTURE_NAME
    picture.symlink_to("elsewhere")
    with pytest.raises(PreflightError, match="symbolic link") as caught:
        find_lr.run(config)
    assert caught.value.code == ExitCode.STORAGE
