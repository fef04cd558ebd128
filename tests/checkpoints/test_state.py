"""``checkpoint.pt``: plain types only, and no pickle is ever executed."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.samples import (
    CONFIG,
    load_all,
    make_weights,
    payloads,
    refused,
    rewrite_manifest,
    same,
    save,
    torch_bytes,
)
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.core.errors import ExitCode


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
