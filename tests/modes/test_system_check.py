"""`--check`: sections, exit codes, problems and warnings, and figures against a real run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MakeConfig
from preflight.core.strict_json import read_json
from preflight.corpus.build import prepare_data
from preflight.device.cards import find_card
from preflight.foresight import fits
from preflight.modes import check, train
from preflight.modes.check import build_report
from preflight.modes.report import SECTIONS, Report, compare, format_label, format_value
from preflight.tokenization import load_tokenizer


def list_tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def problems_of(report: Report) -> str:
    return "\n".join(f"{problem.text} {problem.fix}" for problem in report.problems)


def test_sections_in_order_and_the_same_figures_as_json(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.run(make_config()) == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"\n{name.capitalize()}\n") if i else text.index(name.capitalize())
        for i, name in enumerate(SECTIONS)
    ]
    assert places == sorted(places)
    saved = read_json(Path("training_output/check_report.json"))
    keys = [name.replace(" ", "_") for name in SECTIONS]
    assert [key for key in saved if key in keys] == keys
    for name in keys[:-2]:
        for key, value in saved[name].items():
            assert f"  {format_label(key):<28} {format_value(key, value)}\n" in text, key
    for advice in saved["warnings"]:
        assert advice["text"] in text
        assert advice["fix"] in text
    assert saved["ok"] is True
    assert saved["problems"] == []
    assert saved["model"]["shape"] == "2L-32H-2A"
    assert saved["memory_analysis"]["verdict"] == "fits"
    assert "estimate, not measured" in text
    assert check.run(make_config(json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == saved["model"]
    assert printed["dataset"] == saved["dataset"]
    assert printed["training_configuration"] == saved["training_configuration"]


def test_only_the_data_folder_and_the_report_are_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    before = list_tree(tmp_path)
    assert check.run(make_config(measure=True)) == 0
    new = {name for name in list_tree(tmp_path) if name not in before}
    assert {name.split("/")[0] for name in new} == {"data", "training_output"}
    assert [n for n in new if n.startswith("training_output")] == [
        "training_output/check_report.json"
    ]
    before = list_tree(tmp_path)
    check.run(make_config())
    assert set(list_tree(tmp_path)) == set(before)


def test_measured_figures_stand_beside_predicted_ones(make_config: MakeConfig, device: str) -> None:
    report = build_report(make_config(measure=True, price_per_hour=2.0, device=device))
    rows = report.sections["performance estimation"]
    assert rows["timed_steps"] >= 5
    assert set(rows["tokens_per_second"]) == {"predicted", "measured", "ratio"}
    assert 0 < rows["model_flops_utilisation_share"] < 1.5
    assert rows["cost"] == pytest.approx(rows["total_seconds"] / 1800, abs=0.01)
    memory = report.sections["memory analysis"]
    held = memory["resident_bytes" if device == "cpu" else "allocated_bytes"]
    assert held["ratio"] == pytest.approx(held["measured"] / held["predicted"], 1e-3)


@pytest.mark.slow
def test_predicted_time_against_a_real_run(make_config: MakeConfig) -> None:
    config = make_config(measure=True, max_steps=20)
    total = build_report(config).sections["performance estimation"]["total_seconds"]
    began = time.perf_counter()
    train.run(config)
    real = time.perf_counter() - began
    assert real / 3 < total < real * 3  # the machine may be busy in one of the two


def test_a_card_that_is_not_here(make_config: MakeConfig) -> None:
    report = build_report(make_config(mixed_precision=None, target_gpu="RTX 4090"))
    memory = report.sections["memory analysis"]
    assert memory["device"] == "RTX 4090"
    assert memory["available_bytes"] == find_card("RTX 4090").usable_bytes
    assert memory["verdict"] == "fits"
    rows = report.sections["performance estimation"]
    assert rows["basis"].startswith("estimate, not measured: assumes 60%")
    assert report.sections["training configuration"]["precision"] == "bfloat16"
    old = build_report(make_config(target_gpu="T4", mixed_precision=None))
    assert old.sections["training configuration"]["precision"] == "float16"


def test_a_size_that_does_not_fit(make_config: MakeConfig) -> None:
    flags = {
        "n_layers": 2,
        "n_heads": 4,
        "n_embeddings": 256,
        "context_length": 256,
        "mixed_precision": None,
        "batch_size": 128,
        "compile_model": False,
    }
    report = build_report(make_config(gpu_memory=1.2, **flags))
    assert report.sections["memory analysis"]["verdict"] == "does not fit"
    assert "--batch-size" in problems_of(report)
    # What is suggested fits indeed.
    words = report.problems[0].fix.split()
    batch = int(words[words.index("--batch-size") + 1])
    again = build_report(
        make_config(
            gpu_memory=1.2,
            **flags | {"batch_size": batch},
            gradient_checkpointing="--gradient-checkpointing" in words,
            gradient_accumulation_steps=math.ceil(128 / batch),
        )
    )
    assert again.problems == []
    assert "not_known" in again.sections["performance estimation"]
    hopeless = build_report(make_config(gpu_memory=0.3, batch_size=2))
    assert "no batch size fits" in problems_of(hopeless)


def test_five_faults_in_one_report(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare_data(make_config().data, load_tokenizer("gpt2"))
    shard = Path("data/train/shard_00000.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(fits, "free_bytes", lambda path: 10)
    Path("blocked").write_text("a file")
    config = make_config(
        text_file=[], vocab_size=100, gpu_memory=0.1, target_gpu="RTX 4090", resume_from="nowhere"
    )
    assert check.run(config) == 1
    out = capsys.readouterr().out
    for words in ("--vocab-size 100", "is damaged", "disk: ", "nowhere", "does not fit"):
        assert words in out.split("problems in the way")[1], words
    assert "5 problems in the way" in out
    assert "Memory analysis" in out
    assert json.loads(Path("training_output/check_report.json").read_text())["ok"] is False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"device": "cuda:99"}, "--device"),
        ({"target_gpu": "Voodoo 2"}, "--gpu-memory"),
        ({"tokenizer": "klingon"}, "--tokenizer"),
        ({"text_file": ["missing.txt"]}, "missing.txt"),
        ({"output_dir": "tiny.txt/run"}, "tiny.txt/run"),
    ],
)
def test_each_problem_names_its_flag_and_hides_nothing(
    make_config: MakeConfig,
    flags: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check.run(make_config(**flags)) == 1
    out = capsys.readouterr().out
    assert words in out.split("in the way")[1]
    assert all(f"{name.capitalize()}\n" in out for name in SECTIONS)
    assert "platform" in out


def test_a_run_that_would_be_continued(make_config: MakeConfig) -> None:
    train.run(make_config(max_steps=4))
    report = build_report(make_config(max_steps=12))
    rows = report.sections["training configuration"]
    assert "checkpoint-4, step 4" in rows["continues"]
    assert report.problems == []
    other = build_report(make_config(n_layers=3))
    assert "n_layers: checkpoint 2, flags 3" in problems_of(other)


def test_out_of_memory_in_a_trial_is_a_problem(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "measure_cost", fail)
    report = build_report(make_config(measure=True))
    assert "out of memory in a trial step" in problems_of(report)
    assert "estimate, not measured" in report.sections["performance estimation"]["basis"]


def test_values_read_well() -> None:
    shown = {
        "a_bytes": 3 * 2**30,
        "b_share": 0.125,
        "c_seconds": 0.25,
        "d_seconds": 7200.0,
        "learning_rate": 6e-4,
        "n": 12345,
        "x": 1.5,
        "flag": True,
        "none": None,
    }
    assert [format_value(key, value) for key, value in shown.items()] == [
        "3.0 GiB",
        "12.5%",
        "250.0 ms",
        "2 h 00 min",
        "6.00e-04",
        "12,345",
        "1.50",
        "yes",
        "unknown",
    ]
    both = compare(2**20, 2**21)
    assert format_value("peak_bytes", both) == "predicted 1.0 MiB, measured 2.0 MiB, ratio 2.000"
    assert compare(5, None) == 5
    assert np.isfinite(both["ratio"])
