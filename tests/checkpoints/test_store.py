"""The newest, the best, the named checkpoint, and rotation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints.samples import (
    CONFIG,
    load_all,
    make_state,
    make_weights,
    refused,
    rewrite_manifest,
    save,
)
from preflight.checkpoints import store
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import REQUIRED_NAMES
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError


def test_names_that_open_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, val_loss=1.0)
    newest = save(tmp_path, 7, val_loss=2.0)
    for name in ("", *REQUIRED_NAMES, "manifest.json"):
        assert store.open_checkpoint(str(newest.path / name)).step == 7
    assert store.open_checkpoint(str(tmp_path)).step == 5
    assert store.open_checkpoint(str(tmp_path / "milestones")).step == 5
    shutil.copytree(newest.path, tmp_path / "my best model")
    assert store.open_checkpoint(str(tmp_path / "my best model")).step == 7


def test_newest_and_best(tmp_path: Path) -> None:
    assert store.find_newest(tmp_path) is None
    with refused(ExitCode.CHECKPOINT, "train first: python main.py --train"):
        store.find_best(tmp_path)
    for step, loss in ((9, 2.0), (10, 1.5), (100, None), (11, 1.5)):
        save(tmp_path, step, loss)
    os.utime(tmp_path / "milestones" / "checkpoint-9")  # the clock decides nothing
    assert [c.step for c in store.list_checkpoints(tmp_path)] == [100, 11, 10, 9]
    newest = store.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 100
    assert store.find_best(tmp_path).step == 11


def test_best_is_the_newest_where_nothing_was_evaluated(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 10)
    assert store.find_best(tmp_path).step == 10


def test_rotation_keeps_newest_and_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(tmp_path, step, loss)
    (tmp_path / "milestones" / "checkpoint-9").mkdir()  # damaged: neither counted nor touched
    gone = store.retire_checkpoints(tmp_path, 2)
    assert [path.name for path in gone] == ["checkpoint-1", "checkpoint-3"]
    assert sorted(os.listdir(tmp_path / "milestones")) == [
        f"checkpoint-{step}" for step in (2, 4, 5, 9)
    ]
    kept = save(tmp_path, 3)  # older than what is there, as after --resume-from
    assert store.retire_checkpoints(tmp_path, 1, protect=[kept.path]) == [
        tmp_path / "milestones" / "checkpoint-4"
    ]
    store.retire_checkpoints(tmp_path, 0)
    assert [c.step for c in store.list_checkpoints(tmp_path)] == [5, 2]


def test_only_exact_names_count(tmp_path: Path) -> None:
    five = save(tmp_path, 5).path
    for name in (
        "checkpoint-",
        "checkpoint-5x",
        "xcheckpoint-6",
        "checkpoint-+6",
        ".tmp-9",
        "checkpoint-\N{ARABIC-INDIC DIGIT SIX}",
    ):
        shutil.copytree(five, five.parent / name)
    for name in ("checkpoint-6", "checkpoint-05"):
        shutil.copytree(five, five.parent / name)
    (five.parent / "checkpoint-7").symlink_to(five)
    (five.parent / "checkpoint-8").write_text("a file")
    found, damaged = store.scan_checkpoints(tmp_path)
    assert [c.path for c in found] == [five]
    assert {path.name for path in damaged} == {f"checkpoint-{n}" for n in ("05", "6", "7", "8")}


def test_replaced_checkpoint_comes_back_after_a_kill(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    aside = folder.with_name(".tmp-replaced-checkpoint-5")
    folder.rename(aside)
    store.remove_leftovers(tmp_path)
    load_all(folder)
    shutil.copytree(folder, aside)
    (folder / ".tmp-manifest.json").write_text("cut")
    (folder.parent / ".tmp-checkpoint-7").mkdir()
    store.remove_leftovers(tmp_path)
    assert os.listdir(folder.parent) == ["checkpoint-5"]
    assert len(os.listdir(folder)) == 5


def test_damaged_newest_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 5, val_loss=3.0)
    six, seven = save(tmp_path, 6, val_loss=1.0).path, save(tmp_path, 7).path
    (six / "model.safetensors").write_bytes(b"x")
    (seven / "manifest.json").unlink()
    for find in (store.find_newest, store.find_best):
        found = find(tmp_path)
        assert found is not None
        assert found.step == 5
        errors = capsys.readouterr().err
        assert "warning: checkpoint-6 is damaged, checkpoint-5 is used" in errors
        assert "warning: checkpoint-7 is damaged" in errors
    with refused(ExitCode.CHECKPOINT, "expected 398, found 1|bytes: expected"):
        store.open_checkpoint(str(six))  # named by the user: no other one instead


def test_unreadable_milestones_are_not_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "milestones").write_text("a file")
    with refused(ExitCode.CHECKPOINT, "milestones"):
        store.find_newest(tmp_path)


@pytest.mark.parametrize("function", ["verify_checkpoint", "read_checkpoint"])
def test_a_checkpoint_that_a_run_deletes_meanwhile_is_not_damaged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    function: str,
) -> None:
    """The store looks again, and finds what took its place."""
    best = save(tmp_path, 5, val_loss=2.0)
    original, calls = getattr(store, function), []

    def delete_first(*arguments: Any, **options: Any) -> Any:
        if not calls:
            calls.append(shutil.rmtree(best.path))
            save(tmp_path, 6, val_loss=1.0)
        return original(*arguments, **options)

    monkeypatch.setattr(store, function, delete_first)
    if function == "read_checkpoint":
        save(tmp_path, 4, val_loss=3.0)
    assert store.find_best(tmp_path).step == (4 if function == "read_checkpoint" else 6)
    assert "damaged" not in capsys.readouterr().err


def test_a_check_refuses_what_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 6, 7):
        save(tmp_path, step)

    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.step > limit:
            raise PreflightError(ExitCode.CHECKPOINT, "forged")

    for limit in (7, 5):
        found = store.find_newest(tmp_path, check)
        assert found is not None
        assert found.step == limit
    assert "checkpoint-6 is damaged, checkpoint-5 is used: forged" in capsys.readouterr().err
    limit = 4
    with refused(ExitCode.CHECKPOINT, "none of the 3 checkpoints"):
        store.find_newest(tmp_path, check)


def test_a_config_that_describes_no_model_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 6).path
    (newest / "config.json").write_text('{"model": {"n_layers": 10}}')
    rewrite_manifest(newest)
    for find in (store.find_newest, store.find_best):
        found = find(tmp_path)
        assert found is not None
        assert found.step == 5


def save_on(output_dir: Path, step: int, val_loss: float | None, data: str) -> None:
    save_checkpoint(
        output_dir,
        step,
        make_weights(step),
        make_state(step),
        CONFIG | {"data": {"fingerprint": data}},
        {"val_loss": val_loss},
    )


def test_losses_on_other_data_are_not_compared(tmp_path: Path) -> None:
    for step, loss, data in ((1, 1.0, "old"), (2, 1.5, "old"), (3, 3.0, "new"), (4, 4.0, "new")):
        save_on(tmp_path, step, loss, data)
    assert store.find_best(tmp_path).step == 3
    save_on(tmp_path, 5, None, "new")
    gone = store.retire_checkpoints(tmp_path, 1)
    assert [path.name for path in gone] == ["checkpoint-2", "checkpoint-4"]  # the best of each stay
    save_on(tmp_path, 6, None, "newest")
    assert store.find_best(tmp_path).step == 6


@pytest.mark.parametrize("kind", ["foreign", "damaged"])
def test_a_folder_that_is_no_checkpoint_is_set_aside_not_replaced(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "milestones" / "checkpoint-5"
    if kind == "damaged":
        save(tmp_path, 5)
        (folder / "manifest.json").write_text("cut")
    else:
        (folder / "thesis").mkdir(parents=True)
        (folder / "thesis" / "chapter1.txt").write_text("a text")
    before = sorted(path.name for path in folder.rglob("*"))
    for _ in range(2):  # the second one replaces the first: that is ours
        load_all(save(tmp_path, 5).path)
        assert sorted(os.listdir(folder.parent)) == ["checkpoint-5", "checkpoint-5.unknown-1"]
        aside = folder.with_name("checkpoint-5.unknown-1")
        assert sorted(path.name for path in aside.rglob("*")) == before
    store.remove_leftovers(tmp_path)
    assert aside.is_dir()
