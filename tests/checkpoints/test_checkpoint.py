"""Checkpoints: round trip, rotation, damage, hostile files, kills and full disks at every point."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store, writing
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import MAX_FILES, REQUIRED_NAMES, render_manifest
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {
        "vocab_size": 11,
        "context_length": 8,
        "n_embeddings": 4,
        "n_heads": 2,
        "n_layers": 1,
        "ffn_hid_dim": 8,
    },
    "tokenizer": {"name": "gpt2", "fingerprint": "f" * 64},
}
HOSTILE = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "wte.weight": torch.randn(11, 4, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "blocks.0.bias": torch.randn(4, 2, generator=generator).t(),  # not contiguous
        "scale": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }


def make_state(seed: int) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter])
    (parameter * seed).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": seed,
        "cursor": {"epoch": 1, "seen": (1, 2.5, None, "x", True)},
    }


class FakeTokenizer:
    """Saves the files that it is given."""

    def __init__(self, **files: bytes) -> None:
        self.files = files or {"vocab.txt": b"a b c", "merges-1.json": b"[]"}

    def save(self, folder: Path) -> list[Path]:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in self.files]


def save(
    output_dir: Path,
    step: int,
    val_loss: float | None = None,
    seed: int = 0,
    tokenizer: Any | None = None,
) -> Checkpoint:
    return checkpoint_format.save_checkpoint(
        output_dir,
        step,
        make_weights(seed or step),
        make_state(seed or step),
        CONFIG,
        {"train_loss": 3.0, "val_loss": val_loss},
        tokenizer,
    )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@contextlib.contextmanager
def refused(code: ExitCode, pattern: str = "") -> Iterator[None]:
    with pytest.raises(PreflightError) as caught:
        yield
    assert caught.value.code == code, caught.value
    assert len(caught.value.lines) <= 5
    assert re.search(pattern, str(caught.value)), caught.value


@pytest.fixture(autouse=True)
def _quick_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hash remembered, and no waiting for the disk: what is durable the audit below shows,
    whose process is another."""
    checkpoint_format.forget_verified()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """A consistent manifest over whatever the files hold now, as an attacker would write it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["checksum"]
    for name in REQUIRED_NAMES:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_bytes(render_manifest(manifest | changes))


def load_all(path: Path) -> None:
    """Everything a run does with a checkpoint that the user named."""
    opened = store.open_checkpoint(str(path))
    assert opened.config
    checkpoint_format.load_weights(opened, None)
    checkpoint_format.load_training_state(opened)


# ------------------------------------------------------------------------------------ round trip


def test_round_trip_is_equal_bit_for_bit(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    assert saved.step == 5
    assert saved.val_loss is None
    assert saved.config == CONFIG
    assert sorted(os.listdir(saved.path)) == sorted([*REQUIRED_NAMES, "manifest.json"])
    assert os.listdir(saved.path.parent) == ["checkpoint-5"]
    shapes = {name: tuple(t.shape) for name, t in make_weights(5).items()}
    assert same(checkpoint_format.load_weights(saved, shapes), make_weights(5))
    assert same(checkpoint_format.load_training_state(saved), make_state(5))


def test_weights_file_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    weights = {name: t.contiguous() for name, t in make_weights(5).items()}
    expected = safetensors.torch.save(weights, metadata={"format": "pt"})
    assert (save(tmp_path, 5).path / "model.safetensors").read_bytes() == expected


def test_validation_is_recorded_afterwards(tmp_path: Path) -> None:
    amended = checkpoint_format.record_validation(save(tmp_path, 5), 2.25)
    again = store.find_newest(tmp_path)
    assert again is not None
    assert again.val_loss == amended.val_loss == 2.25
    assert again.manifest == amended.manifest
    assert again.manifest.losses["train_loss"] == 3.0
    assert checkpoint_format.record_validation(amended, float("nan")).val_loss is None


def test_names_that_open_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, val_loss=1.0)
    newest = save(tmp_path, 7, val_loss=2.0)
    for name in ("", *REQUIRED_NAMES, "manifest.json"):
        assert store.open_checkpoint(str(newest.path / name)).step == 7
    assert store.open_checkpoint(str(tmp_path)).step == 5
    assert store.open_checkpoint(str(tmp_path / "milestones")).step == 5
    shutil.copytree(newest.path, tmp_path / "my best model")
    assert store.open_checkpoint(str(tmp_path / "my best model")).step == 7


@pytest.mark.parametrize("name", ["a b", "new\nline", os.fsdecode(b"\xff\xfe"), "x" * 250, "-n"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    output_dir = tmp_path / name
    output_dir.mkdir()
    load_all(save(output_dir, 5).path)


def test_loaded_weights_outlive_the_file(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    weights = checkpoint_format.load_weights(saved)
    os.truncate(saved.path / "model.safetensors", 0)  # a mapping of it would be SIGBUS now
    assert same(weights, make_weights(5))


# ----------------------------------------------------------------------- newest, best, rotation


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
    assert store.retire_checkpoints(tmp_path, 1, protect=kept.path) == [
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


# ----------------------------------------------------------------------------- saving once more


def test_saving_again_at_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, 5, val_loss=2.0)
    again = save(tmp_path, 5)
    assert again.val_loss == 2.0  # same weights, so the loss is known
    other = save(tmp_path, 5, seed=6)
    assert other.val_loss is None
    assert same(checkpoint_format.load_weights(other), make_weights(6))
    (other.path / "manifest.json").write_text("damaged")
    load_all(save(tmp_path, 5).path)
    assert os.listdir(tmp_path / "milestones") == ["checkpoint-5"]


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
    assert len(os.listdir(folder)) == 4


@pytest.mark.parametrize(
    "bad",
    [
        lambda: {"x": object()},
        lambda: {"x": [1, {2: lambda: 0}]},
        lambda: {"x": {1, 2}},
    ],
)
def test_state_that_cannot_be_read_back_is_not_saved(
    tmp_path: Path, bad: Callable[[], Any]
) -> None:
    with pytest.raises(TypeError, match="not a plain type"):
        checkpoint_format.save_checkpoint(tmp_path, 5, make_weights(1), bad(), CONFIG, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_never_saved(tmp_path: Path, value: float) -> None:
    weights = make_weights(1)
    weights["wte.weight"][3, 2] = value
    with refused(ExitCode.DIVERGED, "wte.weight"):
        checkpoint_format.save_checkpoint(tmp_path, 5, weights, {}, CONFIG, {})
    with pytest.raises(ValueError, match="int64"):
        checkpoint_format.save_checkpoint(tmp_path, 5, {"x": torch.tensor([1])}, {}, CONFIG, {})
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------- damage


def mutate(raw: bytes, kind: str, place: int) -> bytes:
    if kind == "flip":
        place %= len(raw) * 8
        return raw[: place // 8] + bytes([raw[place // 8] ^ 1 << place % 8]) + raw[place // 8 + 1 :]
    return raw[: place % len(raw)] if kind == "cut" else raw + bytes([place % 256])


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, val_loss=2.0).path
    rng = random.Random(1)
    for name in (*REQUIRED_NAMES, "manifest.json"):
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
    load_all(folder)


@pytest.mark.parametrize("name", [*REQUIRED_NAMES, "manifest.json"])
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


def test_weights_only_folder_writes_text_but_resumes_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    (folder / "checkpoint.pt").unlink()
    opened = store.open_checkpoint(str(folder))
    assert same(checkpoint_format.load_weights(opened), make_weights(5))
    assert store.find_best(tmp_path) == opened
    with refused(ExitCode.CHECKPOINT, "weights only"):
        checkpoint_format.load_training_state(opened)
    with refused(ExitCode.CHECKPOINT, "none of the"):
        store.find_newest(tmp_path)


def test_foreign_files_beside_ours_are_never_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    (folder / "notes.txt").write_text("mine")
    load_all(folder)
    with refused(ExitCode.CHECKPOINT, r"notes\.txt is not a Preflight checkpoint"):
        store.open_checkpoint(str(folder / "notes.txt"))


# ----------------------------------------------------------------------- the tokenizer's files


def test_tokenizer_travels_inside(tmp_path: Path) -> None:
    saved = save(tmp_path, 5, tokenizer=FakeTokenizer())
    assert set(saved.manifest.files) == {*REQUIRED_NAMES, "vocab.txt", "merges-1.json"}
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


@pytest.mark.parametrize("name", [*REQUIRED_NAMES, "manifest.json", "../x", "a b", ".hidden"])
def test_tokenizer_cannot_take_other_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"may not save|files"):
        save(tmp_path, 5, tokenizer=FakeTokenizer(**{name: b"x"}))
    assert not list((tmp_path / "milestones").glob("*checkpoint*"))


# ------------------------------------------------------------------------------ another model


def test_other_shapes_are_told_apart_readably(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    shapes = {name: tuple(t.shape) for name, t in make_weights(5).items()}
    with refused(ExitCode.CHECKPOINT, r"wte.weight: checkpoint \(11, 4\), model \(12, 4\)"):
        checkpoint_format.load_weights(saved, shapes | {"wte.weight": (12, 4)})
    with refused(ExitCode.CHECKPOINT, r"more: checkpoint none, model \(1,\)"):
        checkpoint_format.load_weights(saved, shapes | {"more": (1,)})
    with refused(ExitCode.CHECKPOINT, "checkpoint .*, model none.* and 2 more"):
        checkpoint_format.load_weights(saved, {})


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor([1.0, float("nan")]), torch.tensor([float("-inf")]), torch.tensor([1, 2])],
)
def test_unusable_tensors_in_the_file_are_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = save(tmp_path, 5).path
    safetensors.torch.save_file({"some.name": tensor}, folder / "model.safetensors")
    rewrite_manifest(folder)
    with refused(ExitCode.CHECKPOINT, r"some\.name"):
        checkpoint_format.load_weights(store.open_checkpoint(str(folder)))


# --------------------------------------------------------------------------- hostile manifests

RAW_MANIFESTS = {
    "empty": b"",
    "garbage": os.urandom(100),
    "bom": b"\xef\xbb\xbf{}",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "nul": b"\0" * 50,
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "digits": b"1" * 100_000,
    "surrogate": b'{"format": "\\ud800"}',
    "big": b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
}


@pytest.mark.parametrize("kind", RAW_MANIFESTS)
def test_manifest_that_is_none(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path, 5).path
    (folder / "manifest.json").write_bytes(RAW_MANIFESTS[kind])
    with refused(ExitCode.CHECKPOINT, r"manifest\.json"):
        load_all(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"step": 5', b'"step": 5, "step": 5'),
        (b'"step": 5', b'"step": NaN'),
        (b'"step": 5', b'"step": 1e999'),
        (b'"step": 5', b'"step": 5.0'),
        (b'"step": 5', b'"step": 6'),
        (b'"train_loss": 3.0', b'"train_loss": 4.0'),
        (b"\n}", b"\n} "),
        (b"\n}", b"\n}{}"),
    ],
)
def test_manifest_edited_by_hand(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = save(tmp_path, 5).path / "manifest.json"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with refused(ExitCode.CHECKPOINT, r"manifest\.json"):
        load_all(path.parent)


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 2**70},
        {"step": -1},
        {"step": True},
        {"step": "5"},
        {"step": None},
        {"format": "other"},
        {"format": None},
        {"format_version": 3},
        {"format_version": 2.0},
        {"format_version": None},
        {"format_version": 2**70},
        {"format_version": 0},
        {"losses": []},
        {"losses": {"val_loss": "1"}},
        {"losses": {"val_loss": 10**400}},
        {"losses": {"val_loss": True}},
        {"versions": 1},
        {"versions": {"torch": 1}},
        {"files": {}},
        {"files": []},
        *(
            {"files": dict.fromkeys((*REQUIRED_NAMES, name), ENTRY)}
            for name in (
                "../../x",
                "..",
                ".",
                "",
                "a/b",
                "a\\b",
                "/etc/passwd",
                "C:x",
                ".hidden",
                "a\0b",
                "new\nline",
                "trailing\n",
                "\N{FULLWIDTH SOLIDUS}",
                "x" * 101,
                "manifest.json",
            )
        ),
        {"files": dict.fromkeys((*REQUIRED_NAMES, *map(str, range(MAX_FILES))), ENTRY)},
        {"files": dict.fromkeys(("/etc/passwd", "checkpoint.pt", "config.json"), ENTRY)},
        {"files": {name: {"bytes": 2**70, "sha256": "0" * 64} for name in REQUIRED_NAMES}},
        {"files": {name: {"bytes": -1, "sha256": "0" * 64} for name in REQUIRED_NAMES}},
        {"files": {name: {"bytes": 1, "sha256": "x"} for name in REQUIRED_NAMES}},
        {"files": {name: {"bytes": 1} for name in REQUIRED_NAMES}},
        {"files": dict.fromkeys(REQUIRED_NAMES, 7)},
    ],
)
def test_manifest_with_a_true_checksum_and_false_content(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = save(tmp_path, 5).path
    rewrite_manifest(folder, **changes)
    with refused(ExitCode.CHECKPOINT, r"manifest\.json"):
        load_all(folder)
    assert store.list_checkpoints(tmp_path) == []


def test_unknown_keys_and_files_are_kept_and_verified(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    (folder / "loss_mask.bin").write_bytes(b"later")
    entry = {"bytes": 5, "sha256": hashlib.sha256(b"later").hexdigest(), "kind": {"a": [1]}}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    files = manifest["files"] | {"loss_mask.bin": entry}
    rewrite_manifest(folder, files=files, later={"key": [None, 1.5, "\N{SNOWMAN}"]})
    load_all(folder)
    checkpoint_format.record_validation(store.open_checkpoint(str(folder)), 1.0)
    again = json.loads((folder / "manifest.json").read_bytes())
    assert again["later"] == {"key": [None, 1.5, "\N{SNOWMAN}"]}
    assert again["files"]["loss_mask.bin"] == entry
    with store.open_checkpoint(str(folder)).open("loss_mask.bin") as file:
        assert file.read() == b"later"
    for damage in (b"Later", b"late"):
        (folder / "loss_mask.bin").write_bytes(damage)
        with refused(ExitCode.CHECKPOINT, r"loss_mask\.bin"):
            load_all(folder)
        with refused(ExitCode.CHECKPOINT, "none of the 1 checkpoints"):
            store.find_newest(tmp_path)


def test_deeply_nested_unknown_key(tmp_path: Path) -> None:
    path = save(tmp_path, 5).path / "manifest.json"
    for depth in (990, 2000, 50_000):  # at the limits of reading and of rendering, and far beyond
        raw = path.read_bytes().replace(
            b'"step"', b'"x": ' + b"[" * depth + b"]" * depth + b', "step"'
        )
        path.with_name("manifest.json").write_bytes(raw)
        with refused(ExitCode.CHECKPOINT, r"manifest\.json"):
            load_all(path.parent)
        save(tmp_path, 5)


def test_newer_format_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    rewrite_manifest(folder, format_version=3)
    with refused(ExitCode.CHECKPOINT, "newer Preflight"):
        load_all(folder)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@HOSTILE
@given(
    key=st.sampled_from(
        sorted(["format", "format_version", "step", "losses", "files", "versions", "../x"])
    ),
    value=JSON_VALUES,
)
def test_any_value_in_any_key(tmp_path: Path, key: str, value: Any) -> None:
    shutil.rmtree(tmp_path / "milestones", ignore_errors=True)
    folder = save(tmp_path, 5).path
    rewrite_manifest(folder, **{key: value})
    try:
        load_all(folder)
    except PreflightError as error:
        assert error.code == ExitCode.CHECKPOINT
    else:  # what is neither a path nor a size may be anything of its type
        assert key in ("losses", "versions", "../x") or (key, value) in (
            ("step", 5),
            ("format_version", 2),
        )


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


# ------------------------------------------------------------------------------ hostile weights


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry_of(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BOMBS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header 2^63": pack({}, length=2**63),
    "header 2^64-1": pack({}, length=2**64 - 1),
    "header 100 MB": pack({}, length=100_000_000),
    "header past the end": pack({}, length=3),
    "not json": pack(b"garbage."),
    "not utf-8": pack(b"\xff" * 8),
    "array": pack([1, 2]),
    "shape overflow": pack({"a": entry_of([2**62, 2**62], 0, 4)}, b"\0" * 4),
    "shape of 1 TB": pack({"a": entry_of([2**38], 0, 4)}, b"\0" * 4),
    "offsets past the end": pack({"a": entry_of([4], 0, 16)}, b"\0" * 4),
    "offsets reversed": pack({"a": entry_of([1], 4, 0)}, b"\0" * 4),
    "offsets negative": pack({"a": entry_of([1], -4, 0)}, b"\0" * 4),
    "overlap": pack({"a": entry_of([1], 0, 4), "b": entry_of([1], 0, 4)}, b"\0" * 4),
    "hole": pack({"a": entry_of([1], 4, 8)}, b"\0" * 8),
    "trailing bytes": pack({"a": entry_of([1], 0, 4)}, b"\0" * 9),
    "negative shape": pack({"a": entry_of([-1], 0, 4)}, b"\0" * 4),
    "unknown type": pack({"a": entry_of([1], 0, 4, "OBJECT")}, b"\0" * 4),
    "twice": pack(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"\0" * 8,
    ),
    "deep": pack(b"[" * 100_000),
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("forged", [False, True])
def test_weights_bombs(tmp_path: Path, kind: str, forged: bool) -> None:
    folder = save(tmp_path, 5).path
    (folder / "model.safetensors").write_bytes(BOMBS[kind])
    if forged:
        rewrite_manifest(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(ExitCode.CHECKPOINT, r"model\.safetensors.*(git-lfs)?"):
        load_all(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 1024


@HOSTILE
@given(place=st.integers(0, 2**40), kind=st.sampled_from(["flip", "cut", "grow"]))
def test_mutated_weights_with_a_true_hash(tmp_path: Path, place: int, kind: str) -> None:
    """Whoever forges the hash may change values, but never makes the reader fall over."""
    shutil.rmtree(tmp_path / "milestones", ignore_errors=True)
    folder = save(tmp_path, 5).path
    path = folder / "model.safetensors"
    shapes = {name: tuple(t.shape) for name, t in make_weights(5).items()}
    path.write_bytes(mutate(path.read_bytes(), kind, place))
    rewrite_manifest(folder)
    opened = store.open_checkpoint(str(folder))
    try:
        weights = checkpoint_format.load_weights(opened, shapes)
    except PreflightError as error:
        assert error.code == ExitCode.CHECKPOINT
    else:
        assert {name: tuple(t.shape) for name, t in weights.items()} == shapes


# -------------------------------------------------------------------------------------- pickles


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def zip_of(pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def payloads(mark: Path) -> dict[str, bytes]:
    command = f"touch '{mark}'"
    python = f"open({str(mark)!r}, 'w')"
    system = Payload(os.system, command)
    inner = pickle.dumps(system, 2)
    return {
        "os.system": torch_bytes({"x": system}),
        "exec": torch_bytes({"x": Payload(exec, python)}),
        "eval": torch_bytes([Payload(eval, python)]),
        "subprocess": torch_bytes(Payload(subprocess.call, ["touch", str(mark)])),
        "open": torch_bytes(Payload(open, str(mark), "w")),
        "torch.load inside": torch_bytes(
            Payload(torch.storage._load_from_bytes, torch_bytes(system))
        ),
        "old torch format": torch_bytes(system, _use_new_zipfile_serialization=False),
        "bare pickle 0": pickle.dumps(system, 0),
        "bare pickle 2": inner,
        "bare pickle 5": pickle.dumps(system, 5),
        "proto 0 global": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "zip proto 0": zip_of(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."),
        "zip": zip_of(inner),
        "deflated zip": zip_of(inner, zipfile.ZIP_DEFLATED),
        "zip slip": zip_of(inner, **{"../../evil": b"x"}),
        "numpy": torch_bytes({"x": Payload(numpy.load, str(mark))}),
        "inst opcode": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "code in a safetensors name": pack({"__metadata__": {"x": command}}) + inner,
    }


@pytest.mark.parametrize(
    "where", ["checkpoint.pt", "model.safetensors", "bare", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("kind", sorted(payloads(Path("x"))))
def test_pickles_are_never_executed(tmp_path: Path, kind: str, where: str) -> None:
    mark = tmp_path / "executed"
    folder = save(tmp_path, 5).path
    raw = payloads(mark)[kind]
    if where == "bare":
        for name in (
            "x.pt",
            "x.pth",
            "x.ckpt",
            "x.safetensors",
            "x",
            "checkpoint.pt",
            "model.safetensors",
        ):
            (tmp_path / name).write_bytes(raw)
            with refused(ExitCode.CHECKPOINT, "is not a Preflight checkpoint"):
                load_all(tmp_path / name)
        (tmp_path / ".metadata").write_bytes(raw)  # a folder of torch's distributed checkpoints
        shutil.rmtree(tmp_path / "milestones")
        with refused(ExitCode.CHECKPOINT, "is not a Preflight checkpoint"):
            load_all(tmp_path)
    else:
        (folder / where).write_bytes(raw)
        if where != "manifest.json":
            rewrite_manifest(folder)
        with refused(ExitCode.CHECKPOINT, re.escape(where)):
            load_all(folder)
    assert not mark.exists()


def test_the_payloads_work(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for kind in ("os.system", "exec", "subprocess", "open", "torch.load inside"):
        torch.load(io.BytesIO(payloads(mark)[kind]), weights_only=False)
        assert mark.exists(), kind
        mark.unlink()


def test_states_that_only_weights_only_would_accept(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    looped: list[Any] = []
    looped.append(looped)
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]  # 2^60 leaves for a reader that walks them all
    for state in ([1], 5, {"x": looped}, {"x": bomb}, {"x": {1, 2}}):
        (folder / "checkpoint.pt").write_bytes(torch_bytes(state))
        rewrite_manifest(folder)
        opened = store.open_checkpoint(str(folder))
        if isinstance(state, dict) and not isinstance(state["x"], set):
            assert checkpoint_format.load_training_state(opened).keys() == {"x"}
        else:
            with refused(ExitCode.CHECKPOINT, "not a training state"):
                checkpoint_format.load_training_state(opened)


# --------------------------------------------------------------------------------- killed saves

SYSTEM_CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "posix_fallocate")


def run_killed(action: Callable[[], Any], point: int) -> bool:
    """Run `action` in a forked process, killed at its n-th system call: before it, or after it
    where `point` is odd. True when the process ended by itself."""
    child = os.fork()
    if child:
        return os.WIFEXITED(os.waitpid(child, 0)[1])
    try:
        torch.set_num_threads(1)
        count = 0

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if point == 2 * count:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if point == 2 * count + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        for name in SYSTEM_CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def find_unrecoverable_points(
    tmp_path: Path, prepare: Callable[[Path], Any], action: Callable[[Path], Any]
) -> tuple[int, list[int]]:
    """The kill points passed, and those after which no whole checkpoint was found."""
    bad: list[int] = []
    prepare(tmp_path / "before")
    for point in range(2, 1000):
        output_dir = tmp_path / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(tmp_path / "before", output_dir)
        done = run_killed(lambda place=output_dir: action(place), point)
        checkpoint_format.forget_verified()
        try:
            store.remove_leftovers(output_dir)
            found, damaged = store.scan_checkpoints(output_dir)
            assert found
            assert not damaged
            for each in found:
                checkpoint_format.verify_checkpoint(each)
                assert any(
                    same(checkpoint_format.load_weights(each), make_weights(seed))
                    for seed in (each.step, 77)
                )
            assert not list(output_dir.rglob(".tmp-*"))
        except (PreflightError, AssertionError):
            bad.append(point)
        if done or len(bad) > 5:
            return point, bad
    raise AssertionError("the save never ended")


def prepare_two(output_dir: Path) -> None:
    output_dir.mkdir()
    save(output_dir, 1, val_loss=2.0)
    save(output_dir, 2)


def save_and_rotate(output_dir: Path) -> None:
    new = save(output_dir, 3)
    checkpoint_format.record_validation(new, 1.0)
    store.retire_checkpoints(output_dir, 1)


def test_kill_at_every_point_of_save_and_rotation(tmp_path: Path) -> None:
    points, bad = find_unrecoverable_points(tmp_path, prepare_two, save_and_rotate)
    assert points > 50
    assert bad == []


def test_kill_at_every_point_of_replacing_the_only_one(tmp_path: Path) -> None:
    def prepare(output_dir: Path) -> None:
        output_dir.mkdir()
        save(output_dir, 5)

    points, bad = find_unrecoverable_points(
        tmp_path, prepare, lambda output_dir: save(output_dir, 5, seed=77)
    )
    assert points > 30
    assert bad == []


def test_kill_points_find_a_saver_without_rename(tmp_path: Path) -> None:
    """The check of the checks: written in place, as many tools do, it is caught."""

    @contextlib.contextmanager
    def in_place(folder: Path, size_bytes: int = 0) -> Iterator[Path]:
        folder.mkdir()
        yield folder

    def broken(output_dir: Path) -> None:
        storage.publish_folder = in_place  # in the forked child only
        save_and_rotate(output_dir)

    _, bad = find_unrecoverable_points(tmp_path, prepare_two, broken)
    assert len(bad) > 5


# ------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_every_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import errno

    output_dir = tmp_path / "run"
    prepare_two(output_dir)
    for point in range(1, 1000):
        count = 0
        with monkeypatch.context() as patch:

            def wrap(call: Callable[..., Any], stop: int = point) -> Callable[..., Any]:
                def counted(*arguments: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == stop:
                        number = getattr(errno, code)
                        raise OSError(number, os.strerror(number))
                    return call(*arguments, **options)

                return counted

            for name in SYSTEM_CALLS:
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                save(output_dir, 3)
            except PreflightError as error:
                assert error.code == ExitCode.STORAGE
                assert "checkpoint-3" in str(error) or "milestones" in str(error)
        if count < point:
            break
        steps = [c.step for c in store.list_checkpoints(output_dir)]
        assert steps in ([2, 1], [3, 2, 1])
        store.remove_leftovers(output_dir)
        shutil.rmtree(output_dir / "milestones" / "checkpoint-3", ignore_errors=True)
    assert point > 10
    load_all(save(output_dir, 3).path)


@pytest.mark.parametrize("limit", [0, 1, 100, 340, 400, 4096, 5000])
def test_file_size_limit_cuts_writes_short(tmp_path: Path, limit: int) -> None:
    """A short write, then EFBIG: the pattern of a disk that fills up in the middle of a file."""
    prepare_two(tmp_path / "run")

    def save_limited() -> None:
        storage.reserve_bytes = lambda file, size: None  # so that the write itself fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with refused(ExitCode.STORAGE, "File too large"):
            save(tmp_path / "run", 3)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            save_limited()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(os.listdir(tmp_path / "run" / "milestones")) == ["checkpoint-1", "checkpoint-2"]


def test_torch_never_hides_the_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fail(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        write = fail

    real = writing.HashingFile.__init__
    monkeypatch.setattr(writing.HashingFile, "__init__", lambda self, file: real(self, Full()))
    with refused(ExitCode.STORAGE, r"checkpoint-5: No space left on device\n.*bytes missing"):
        save(tmp_path, 5)
    with pytest.raises(Exception, match=r"No space|unexpected pos"):
        torch.save(make_state(1), Full())


def test_too_little_room_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with refused(ExitCode.STORAGE, r"checkpoint-5: No space left.*\n.*[\d,]{7,} bytes missing"):
        save(tmp_path, 5)
    assert os.listdir(tmp_path / "milestones") == ["checkpoint-4"]


@pytest.mark.parametrize("name", [*REQUIRED_NAMES, "manifest.json", "vocab.txt"])
def test_disk_that_lies_is_caught_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = writing.FolderWriter.read_back

    def read_back_changed(self: writing.FolderWriter) -> None:
        path = self.folder / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        real(self)

    monkeypatch.setattr(writing.FolderWriter, "read_back", read_back_changed)
    with refused(ExitCode.STORAGE, f"{name} differs from what was written"):
        save(tmp_path, 5, tokenizer=FakeTokenizer())
    assert os.listdir(tmp_path / "milestones") == []


def test_output_folder_that_vanished_or_became_a_link(tmp_path: Path) -> None:
    with refused(ExitCode.STORAGE, "is gone"):
        save(tmp_path / "gone", 5)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "milestones").symlink_to(tmp_path / "elsewhere")
    with refused(ExitCode.STORAGE, "milestones is a link"):
        save(tmp_path / "run", 5)
    assert os.listdir(tmp_path / "elsewhere") == []


# ----------------------------------------------------------------------------- durability audit

AUDITED = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_checkpoint as t
out = Path({out!r})
for step in (1, 2, 3, 3):
    new = t.save(out, step)
    t.checkpoint_format.record_validation(new, 9.0 - step)
    t.store.retire_checkpoints(out, 1)
"""
CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")


def find_durability_faults(lines: list[str], output_dir: str) -> tuple[int, list[str]]:
    """Renames in an strace log, and those without fsync of what is renamed before, of the folder
    after."""
    dirty: set[str] = set()  # paths written or named since their last fsync
    waiting: dict[str, str] = {}  # folder whose names are not durable -> the rename
    renames, faults = 0, []
    for line in lines:
        match = CALL.search(line)
        if not match or output_dir not in line or match[3].startswith("-"):
            continue
        call, arguments = match[1], match[2]
        paths = [p for p in re.findall(r'[<"](/[^>"]*)[>"]', arguments) if output_dir in p]
        if call in ("write", "pwrite64", "ftruncate", "fallocate"):
            dirty.add(paths[0])
        elif call in ("fsync", "fdatasync"):
            dirty.discard(paths[0])
            waiting.pop(paths[0], None)
        elif call.startswith("rename"):
            renames += 1
            source, target = paths[-2:]
            faults += [
                f"not fsynced before rename: {p}"
                for p in dirty
                if p == source or p.startswith(source + "/")
            ]
            waiting[os.path.dirname(target)] = line
    return renames, faults + [f"folder not fsynced after: {line}" for line in waiting.values()]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_rename_is_durable(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    code = AUDITED.format(root=str(ROOT), tests=str(Path(__file__).parent), out=str(output_dir))
    calls = "write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2"
    log = tmp_path / "log"
    subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "--seccomp-bpf",
            "-s",
            "8",
            "-o",
            log,
            "-e",
            f"trace={calls}",
            sys.executable,
            "-c",
            code,
        ],
        check=True,
        timeout=120,
    )
    lines = log.read_text(errors="replace").splitlines()
    renames, faults = find_durability_faults(lines, str(output_dir))
    assert renames >= 10  # three saves, a replacement, four validations, two retirements
    assert faults == []
    without = [line for line in lines if "fsync(" not in line]
    assert len(find_durability_faults(without, str(output_dir))[1]) > 10
