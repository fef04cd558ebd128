"""Flags that a call does not use: each is named, and has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import main
from conftest import build
from preflight.settings import RunConfig, build_options
from preflight.settings.kinds import MODES
from preflight.settings.run import GROUPS
from preflight.settings.unused import IDLE_FLAGS, MODE_FLAGS, drop_unused

GPU = {"target_gpu": "RTX 4090"}


def test_the_tables_name_modes_groups_and_flags_that_exist() -> None:
    assert {*MODE_FLAGS} == {*MODES.names()}
    options = build_options()
    for row in MODE_FLAGS.values():
        assert not {*row} - {*GROUPS, *options}
    for idle in IDLE_FLAGS:
        assert not {*idle.names} - {*options}
        assert not {*idle.modes} - {*MODES.names()}


@pytest.mark.parametrize(
    ("mode", "flags", "named"),
    [
        (
            "generate",
            {"learning_rate": 1.0, "seed": 3, "top_k": 5, "output_dir": "x"},
            "learning_rate",
        ),
        ("generate", {"compile_model": False, "n_layers": 2, "device": "cpu"}, "compile_model"),
        ("generate", {"text_file": ["a"], "json": True}, "json"),
        ("generate", {"checkpoint_path": "c", "output_dir": "o"}, "output_dir"),
        ("generate", {"do_sample": False, "top_k": 5, "stop": ["a"]}, "top_k"),
        (
            "train",
            {"temperature": 1.0, "checkpoint_path": "c", "log_every": 1},
            "temperature checkpoint_path",
        ),
        (
            "train",
            {"target_batch_size": 4, "price_per_hour": 1.0},
            "target_batch_size price_per_hour",
        ),
        ("train", {"optimizer": "sgd", "beta1": 0.5, "beta2": 0.5, "eps": 1e-3}, "beta2 eps"),
        ("train", {"val_split": 0.1, "document_separator": "x"}, "document_separator"),
        ("train", {"text_file": ["a"], "val_split": 0.1, "document_separator": "x"}, ""),
        ("check", {"json": True, "log_every": 3, "price_per_hour": 1.0, "measure": True}, ""),
        ("check", {**GPU, "device": "cpu", "measure": False, "price_per_hour": 1.0}, "device"),
        (
            "check",
            {"gpu_memory": 8.0, "price_per_hour": 1.0, "measure": True},
            "measure price_per_hour",
        ),
        ("validate-only", {"json": True, "measure": False}, "measure"),
        ("get-optimal-bs", {"batch_size": 4, "json": True, "test_batch_sizes": [1]}, "batch_size"),
        (
            "get-optimal-bs",
            {**GPU, "gpu_memory": 20.0, "device": "cpu", "price_per_hour": 1.0},
            "device price_per_hour",
        ),
        ("a mode of another package", {"temperature": 1.0, "learning_rate": 1.0}, ""),
    ],
)
def test_unused_flags_are_named_and_reset(
    mode: str, flags: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = build(flags)
    used, unused = drop_unused(mode, config)
    assert {*unused} == {*named.split()}
    for name, option in build_options().items():
        expected = option.default if name in unused else config.get(option)
        assert used.get(option) == expected
    assert {*used.sources} == {*flags} - {*unused}


def test_flags_of_the_text_without_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"val_split": 0.1, "shard_size": 2000, "num_workers": 1, "document_separator": "x"}
    assert {*drop_unused("train", build(flags))[1]} == {"document_separator"}  # of the sample
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.json").write_text("{}")
    used, unused = drop_unused("train", build(flags))
    assert {*unused} == {*flags}
    assert used.data == build({}).data
    assert drop_unused("train", build(flags | {"text_file": ["a"]}))[1] == {}


def test_they_are_told_and_not_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    received: list[RunConfig] = []
    monkeypatch.setattr(MODES, "load", lambda mode: lambda config: received.append(config) or 0)
    (tmp_path / "run.json").write_text(json.dumps({"batch_size": 4, "top_p": 0.5}))
    argv = ["--generate", "--config", "run.json", "--learning-rate", "1", "--no-auto-resume"]
    assert main.main(argv) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: --learning-rate is not used by --generate",
        "warning: --no-auto-resume is not used by --generate",
        "not used of run.json: --batch-size",
    ]
    assert {*received[0].sources} == {"config", "top_p"}
