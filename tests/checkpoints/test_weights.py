"""``model.safetensors``: its bytes, its shapes, and hostile files."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.samples import (
    HOSTILE,
    load_all,
    make_weights,
    mutate,
    pack,
    refused,
    rewrite_manifest,
    same,
    save,
)
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.core.errors import ExitCode, PreflightError


def test_weights_file_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    weights = {name: t.contiguous() for name, t in make_weights(5).items()}
    expected = safetensors.torch.save(weights, metadata={"format": "pt"})
    assert (save(tmp_path, 5).path / "model.safetensors").read_bytes() == expected


def test_loaded_weights_outlive_the_file(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    weights = checkpoint_format.load_weights(saved)
    os.truncate(saved.path / "model.safetensors", 0)  # a mapping of it would be SIGBUS now
    assert same(weights, make_weights(5))


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
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("-inf")]),
        torch.tensor([1, 2]),
        torch.tensor([1e300], dtype=torch.float64),
    ],
)
def test_unusable_tensors_in_the_file_are_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    folder = save(tmp_path, 5).path
    safetensors.torch.save_file({"some.name": tensor}, folder / "model.safetensors")
    rewrite_manifest(folder)
    with refused(ExitCode.CHECKPOINT, r"some\.name"):
        checkpoint_format.load_weights(store.open_checkpoint(str(folder)))


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
    "twice the same": pack(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
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
