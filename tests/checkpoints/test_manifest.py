"""Manifests: open to later versions, closed to impossible and hostile content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.samples import (
    HOSTILE,
    load_all,
    refused,
    rewrite_manifest,
    save,
)
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.format import read_checkpoint
from preflight.checkpoints.manifest import MAX_FILES, REQUIRED_NAMES
from preflight.core import strict_json
from preflight.core.errors import ExitCode, PreflightError


def test_validation_is_recorded_afterwards(tmp_path: Path) -> None:
    amended = checkpoint_format.record_validation(save(tmp_path, 5), 2.25)
    again = store.find_newest(tmp_path)
    assert again is not None
    assert again.val_loss == amended.val_loss == 2.25
    assert again.manifest == amended.manifest
    assert again.manifest.losses["train_loss"] == 3.0
    assert checkpoint_format.record_validation(amended, float("nan")).val_loss is None


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
        {"format_version": 4},
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
        *(
            {"files": {name: ENTRY | {"chunk_bytes": size} for name in REQUIRED_NAMES}}
            for size in (0, -1, 1, 1023, 2**40, 2**70, 4096.0, "4096", True)
        ),
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


def test_nested_deeper_than_python_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 and later can parse more levels than they can render."""
    saved = save(tmp_path, 5)
    nested: list[Any] = []
    for _ in range(3000):
        nested = [nested]
    content = saved.manifest.model_dump() | {"checksum": "0" * 64, "x": nested}
    monkeypatch.setattr(strict_json, "parse_json", lambda raw: content)
    with refused(ExitCode.CHECKPOINT, r"manifest\.json: nested too deeply"):
        read_checkpoint(saved.path)


def test_newer_format_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    rewrite_manifest(folder, format_version=4)
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
            ("format_version", 3),
        )
