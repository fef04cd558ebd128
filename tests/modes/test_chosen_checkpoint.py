"""The checkpoint that `--generate` takes, while a run is deleting and adding some."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import samples

from conftest import build
from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import PreflightError
from preflight.device.runtime import build_runtime
from preflight.modes import generate
from preflight.modes.generate import choose_checkpoint, load_chosen


def test_it_looks_again_where_a_run_deletes_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for step, loss in ((5, 1.0), (6, 2.0)):
        samples.save(output_dir, step, loss)
    config = build({"output_dir": str(output_dir), "device": "cpu", "mixed_precision": False})
    runtime = build_runtime(config.system)
    chosen = choose_checkpoint(config)
    loaded = []

    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        assert (device, dtype) == (runtime.device, torch.float32)
        loaded.append(checkpoint.step)
        if checkpoint.step == 5:  # retired by a run between the choice and the reading
            shutil.rmtree(checkpoint.path)
            checkpoint.open("config.json")
        return "model", "tokenizer"

    monkeypatch.setattr(generate, "load_model", load)
    assert load_chosen(config, chosen, runtime) == ("model", "tokenizer")
    assert loaded == [5, 6]
    monkeypatch.setattr(generate, "load_model", lambda c, *rest: c.open("missing"))
    with pytest.raises(PreflightError, match="does not list it"):
        load_chosen(config, choose_checkpoint(config), runtime)
