"""Saving, verifying and loading a folder; damage; the tokenizer's files; the configuration."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.samples import (
    CONFIG,
    FILE_NAMES,
    HOSTILE,
    FakeTokenizer,
    load_all,
    make_optimizer,
    make_state,
    make_weights,
    mutate,
    refused,
    rewrite_manifest,
    same,
    save,
)
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.format import Checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode


def test_round_trip_is_equal_bit_for_bit(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    assert saved.step == 5
    assert saved.val_loss is None
    assert saved.config == CONFIG
    assert sorted(os.listdir(saved.path)) == sorted([*FILE_NAMES, "manifest.json"])
    assert os.listdir(saved.path.parent) == ["checkpoint-5"]
    shapes = {name: tuple(t.shape) for name, t in make_weights(5).items()}
    assert same(checkpoint_format.load_weights(saved, shapes), make_weights(5))
    assert same(checkpoint_format.load_training_state(saved), make_state(5))
    assert same(checkpoint_format.load_optimizer(saved), make_optimizer(5))


@pytest.mark.parametrize("name", ["a b", "new\nline", os.fsdecode(b"\xff\xfe"), "x" * 250, "-n"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    output_dir = tmp_path / name
    output_dir.mkdir()
    load_all(save(output_dir, 5).path)


def test_saving_again_at_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, 5, val_loss=2.0)
    again = save(tmp_path, 5)
    assert again.val_loss == 2.0  # same weights, so the loss is known
    other = save(tmp_path, 5, seed=6)
    assert other.val_loss is None
    assert same(checkpoint_format.load_weights(other), make_weights(6))
    (other.path / "manifest.json").write_text("damaged")
    load_all(save(tmp_path, 5).path)
    names = sorted(os.listdir(tmp_path / "milestones"))
    assert names == ["checkpoint-5", "checkpoint-5.unknown-1"]


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, val_loss=2.0).path
    rng = random.Random(1)
    for name in (*FILE_NAMES, "manifest.json"):
        raw = (folder / name).read_bytes()
        kinds = ["flip"] * 80 + ["cut"] * 5 + ["grow"] * 3
        for kind in kinds:
            (folder / name).write_bytes(mutate(raw, kind, rng.getrandbits(40)))
            checkpoint_format.forget_verified()
            with refused(ExitCode.CHECKPOINT, re.escape(name)):
                load_all(folder)
            with refused(ExitCode.CHECKPOINT, "none of the 1 checkpoints"):
                store.find_newest(tmp_path)
        (folder / name).write_bytes(raw)
    load_all(folder)


def test_this_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader without hashes accepts flipped bits, so that the test above proves something."""
    folder = save(tmp_path, 5).path
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    monkeypatch.setattr(
        Checkpoint, "open", lambda c, name, hashed=True: storage.open_regular(c.path / name)
    )
    monkeypatch.setattr(Checkpoint, "verify_together", lambda c, name, ranks: None)
    load_all(folder)


@pytest.mark.parametrize("name", [*FILE_NAMES, "manifest.json"])
@pytest.mark.parametrize("kind", ["missing", "symlink", "folder", "fifo"])
def test_file_replaced_by_something_else(tmp_path: Path, name: str, kind: str) -> None:
    path = save(tmp_path, 5).path / name
    path.rename(tmp_path / "moved")
    if kind == "symlink":
        path.symlink_to(tmp_path / "moved")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with refused(ExitCode.CHECKPOINT, re.escape(name)):
        load_all(path.parent)
    with refused(ExitCode.CHECKPOINT, "none of the"):
        store.find_newest(tmp_path)


def test_foreign_files_beside_ours_are_never_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    (folder / "notes.txt").write_text("mine")
    load_all(folder)
    with refused(ExitCode.CHECKPOINT, r"notes\.txt is not a Preflight checkpoint"):
        store.open_checkpoint(str(folder / "notes.txt"))


def test_tokenizer_travels_inside(tmp_path: Path) -> None:
    saved = save(tmp_path, 5, tokenizer=FakeTokenizer())
    assert set(saved.manifest.files) == {*FILE_NAMES, "vocab.txt", "merges-1.json"}
    load_all(saved.path)
    with saved.open("vocab.txt") as file:
        assert file.read() == b"a b c"
    (saved.path / "vocab.txt").write_bytes(b"a b d")
    with refused(ExitCode.CHECKPOINT, r"vocab\.txt: its content has changed"):
        saved.open("vocab.txt")
    with refused(ExitCode.CHECKPOINT, r"vocab\.txt"):
        load_all(saved.path)


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "../outside", "/etc/passwd", ""])
def test_files_that_are_not_listed_are_never_opened(tmp_path: Path, name: str) -> None:
    saved = save(tmp_path, 5, tokenizer=FakeTokenizer())
    (saved.path / "notes.txt").write_text("mine")
    (saved.path.parent / "outside").write_text("mine")
    with refused(ExitCode.CHECKPOINT, r"manifest\.json does not list it"):
        saved.open(name)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_listed_file_that_is_no_plain_file(tmp_path: Path, kind: str) -> None:
    saved = save(tmp_path, 5, tokenizer=FakeTokenizer())
    path = saved.path / "vocab.txt"
    path.rename(tmp_path / "outside")
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with refused(ExitCode.CHECKPOINT, r"vocab\.txt"):
        load_all(saved.path)


@pytest.mark.parametrize("name", [*FILE_NAMES, "manifest.json", "../x", "a b", ".hidden"])
def test_tokenizer_cannot_take_other_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"may not save|files"):
        save(tmp_path, 5, tokenizer=FakeTokenizer(**{name: b"x"}))
    assert not list((tmp_path / "milestones").glob("*checkpoint*"))


@HOSTILE
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_config(tmp_path: Path, raw: bytes) -> None:
    shutil.rmtree(tmp_path / "milestones", ignore_errors=True)
    folder = save(tmp_path, 5).path
    (folder / "config.json").write_bytes(raw)
    rewrite_manifest(folder)
    with refused(ExitCode.CHECKPOINT, r"config\.json"):
        load_all(folder)


@pytest.mark.parametrize(
    "model",
    [
        None,
        {},
        [],
        {**CONFIG["model"], "n_layers": 2.5},
        {**CONFIG["model"], "n_layers": -1},
        {**CONFIG["model"], "code": "os.system"},
        {**CONFIG["model"], "activation": "__import__"},
    ],
)
def test_config_that_makes_no_model(tmp_path: Path, model: Any) -> None:
    folder = save(tmp_path, 5).path
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model": model}))
    rewrite_manifest(folder)
    with refused(ExitCode.CHECKPOINT, r"config\.json"):
        load_all(folder)
