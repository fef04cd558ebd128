"""What can go wrong while `--find-lr`, `--sweep` and `--forecast` try a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from modes import fake_child

from conftest import MakeConfig
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.foresight import child, short_training
from preflight.modes import find_lr, forecast, sweep
from trainer import Trainer

from .harness import (
    TRAIN_FLAGS,
    ForkServer,
    Process,
    find_message_faults,
    find_temporaries,
    hash_tree,
    make_text,
    wait_until,
)

FLAGS = [*TRAIN_FLAGS[1:], "--max-steps", "400", "--output-dir", "out", "--data-dir", "data"]
MODES: dict[str, list[str]] = {
    "find-lr": ["--find-lr"],
    "sweep": ["--sweep", "weight_decay=0.1,0.2"],
    "forecast": ["--forecast"],
}
REPORTS = {module.REPORT_NAME: module.FORMAT for module in (find_lr, sweep, forecast)}


@pytest.fixture
def folder(place: Path) -> Path:
    """A place with a text, whose data folder and output folder are made by the mode."""
    (place / "text.txt").write_text(make_text(20_000))
    return place


def find_child(process: Process, *but: int) -> int:
    """The process id of the trial under way, once there is one that is not in `but`."""
    found: list[int] = []

    def is_there() -> bool:
        members = psutil.Process(process.pid).children()
        # The resource tracker, which multiprocessing starts too, ends with its parent.
        found[:] = [p.pid for p in members if "spawn_main" in " ".join(p.cmdline())]
        found[:] = [pid for pid in found if pid not in but]
        return bool(found)

    wait_until(is_there, 60)
    return found[0]


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [("find-lr", signal.SIGINT, ExitCode.SIGINT), ("forecast", signal.SIGTERM, ExitCode.SIGTERM)],
)
def test_a_signal_during_a_trial_leaves_nothing(
    server: ForkServer, folder: Path, mode: str, number: int, code: int
) -> None:
    process = server.start("main", [*MODES[mode], *FLAGS], cwd=folder)
    trial = find_child(process)
    os.kill(process.pid, number)
    assert process.wait() == code
    assert find_message_faults(process.said(), "stopped") == ""
    assert not psutil.pid_exists(trial)
    assert hash_tree(folder / "out") == {}
    assert find_temporaries(folder / "out") == []


def test_a_killed_trial_is_a_row_and_the_sweep_goes_on(server: ForkServer, folder: Path) -> None:
    process = server.start("main", [*MODES["sweep"], *FLAGS], cwd=folder)
    first = find_child(process)
    os.kill(first, signal.SIGKILL)
    second = find_child(process, first)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == ExitCode.SIGTERM
    assert find_message_faults(process.said(), "run the same command again") == ""
    rows = json.loads((folder / "out" / sweep.REPORT_NAME).read_text())["rows"]
    assert [row["failure"] for row in rows] == ["out of memory: killed by the system (signal 9)"]
    assert not psutil.pid_exists(second)
    assert find_temporaries(folder / "out") == []


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_ours_is_not_replaced(server: ForkServer, folder: Path, mode: str) -> None:
    (folder / "out").mkdir()
    for name in REPORTS:
        (folder / "out" / name).write_text('{"format": "another"}')
    before = hash_tree(folder / "out")
    code, said = server.run("main", [*MODES[mode], *FLAGS], cwd=folder)
    assert code == ExitCode.STORAGE
    assert find_message_faults(said, "is another program's file") == ""
    assert hash_tree(folder / "out") == before


@pytest.mark.parametrize("mode", MODES)
def test_a_text_too_short(server: ForkServer, folder: Path, mode: str) -> None:
    (folder / "text.txt").write_text("A")
    code, said = server.run("main", [*MODES[mode], *FLAGS], cwd=folder)
    assert code == ExitCode.TEXT
    assert find_message_faults(said, "too short") == ""
    assert hash_tree(folder / "out") == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_read_only_output_folder(server: ForkServer, folder: Path, mode: str) -> None:
    (folder / "out").mkdir()
    arguments = [*MODES[mode], *FLAGS], str(folder / "out")
    code, said = server.run("read-only disk", *arguments, cwd=folder)
    assert code == ExitCode.STORAGE
    assert find_message_faults(said, "out") == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning_rat=1e-3,2e-3"], "did you mean learning_rate"),
        (["max_steps=10,20"], "cannot vary --max-steps"),
        (["seed=1,2", "seed=3"], "--seed is given twice"),
        (["n_heads=2,3"], "--n-heads"),
        (["seed"], "write --sweep FLAG=VALUE"),
    ],
)
def test_bad_sweeps_make_nothing(
    server: ForkServer, folder: Path, words: list[str], told: str
) -> None:
    code, said = server.run("main", ["--sweep", *words, *FLAGS], cwd=folder)
    assert code == ExitCode.FLAGS
    assert find_message_faults(said, told) == ""
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


# ---- in this process ----------------------------------------------------------------------------


@pytest.fixture
def make_light(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """A tiny run; trials run here, and a sweep is not drawn."""
    for module in (find_lr, short_training):
        fake_child.install(monkeypatch, module)
    monkeypatch.setattr(sweep, "_draw", lambda *arguments: None)
    return lambda **flags: make_config(**{"tokenizer": "byte"} | flags)


@pytest.mark.parametrize("mode", [find_lr, sweep, forecast])
def test_the_same_folder_is_not_used_twice(
    make_light: MakeConfig, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """Not even the probe of the disk is written, which would disturb the first one's."""
    config = make_light(max_steps=400, sweep=["weight_decay=0.1"])
    monkeypatch.setattr(storage, "check_writable", lambda folder: pytest.fail("it wrote"))
    output_dir = Path(config.control.output_dir)
    storage.make_folder(output_dir)
    with FolderLock(output_dir), pytest.raises(PreflightError) as caught:
        mode.run(config)
    assert caught.value.code == ExitCode.LOCKED
    assert [path.name for path in output_dir.iterdir()] == [".lock"]


def test_the_same_value_twice_is_one_training(make_light: MakeConfig) -> None:
    config = make_light(sweep=["seed=1,1,01"], sweep_steps=1)
    assert sweep.run(config) == ExitCode.DONE
    report = json.loads((Path("training_output") / sweep.REPORT_NAME).read_text())
    assert [row["values"] for row in report["rows"]] == [{"seed": 1}]


def test_a_trial_without_memory_answers_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        def send(self, message: Any) -> None:
            sent.append(message)

    def work(report: Any) -> None:
        raise MemoryError

    sent: list[Any] = []
    monkeypatch.setattr(child, "end_with_parent", lambda *arguments: None)
    monkeypatch.setattr(child, "Path", lambda name: Path("/dev/full"))  # not our own rank
    child.serve(work, Path("unused"), Pipe())  # type: ignore[arg-type]
    assert sent == [("answer", child.LackOfMemory("no reason given"))]


def test_a_loss_that_is_nan_from_the_first_step(
    make_light: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.train_step

    def broken(self: Trainer, number: int, batches: Any) -> Any:
        result = step(self, number, batches)
        return dataclasses.replace(result, loss=result.loss * math.nan)

    monkeypatch.setattr(Trainer, "train_step", broken)
    assert find_lr.run(make_light(find_lr_steps=10)) == ExitCode.CHECK_FAILED
    assert "not finite at the first step" in capsys.readouterr().out
    report = json.loads((Path("training_output") / find_lr.REPORT_NAME).read_text())
    assert (report["flags"], report["points"], report["diverged"]) == (None, [], True)
