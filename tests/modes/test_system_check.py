"""`--check`: sections, exit codes, problems and warnings, and figures against a real run."""

from __future__ import annotations

import io
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
from preflight.core.units import format_bytes, format_seconds
from preflight.corpus.build import prepare_data
from preflight.device.cards import find_card
from preflight.foresight import fits
from preflight.modes import check, check_sections, train
from preflight.modes.check import build_report
from preflight.modes.report import (
    SECTIONS,
    Answer,
    Report,
    compare,
    format_label,
    format_value,
    is_in_colour,
)
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


def read_answers(report: Report) -> list[str]:
    """The lines before the first blank one."""
    return report.to_text().split("\n\n")[0].splitlines()


def test_three_answers_come_first(make_config: MakeConfig) -> None:
    report = build_report(make_config(price_per_hour=3600.0))
    fit, time_and_cost, learning = read_answers(report)
    memory = report.sections["memory analysis"]
    needed, available = (format_bytes(memory[f"{name}_bytes"]) for name in ("needed", "available"))
    assert fit == f"Does it fit?         yes: {needed} needed, {available} available on cpu"
    rows = report.sections["performance estimation"]
    seconds = format_seconds(rows["total_seconds"])
    assert time_and_cost.startswith(f"How long, how dear?  {seconds}: estimated; finished 20")
    assert time_and_cost.endswith(f"cost {rows['cost']:,.2f} at 3600 per hour")
    # 640 tokens for 1.6 million parameters, and a validation part of a few hundred tokens.
    assert learning.startswith("Will it learn?       doubtful: 0.0016 tokens per parameter; ")
    assert learning.endswith("see Warnings") or learning.endswith("under Warnings")
    assert report.to_dict()["answers"][0]["verdict"] == "yes"
    assert "--price-per-hour adds the cost" in read_answers(build_report(make_config()))[1]


def test_the_answers_of_runs_that_cannot_be(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(check_sections, "judge_fit", lambda *args: "does not fit")
        patch.setattr(check_sections, "suggest_fit", lambda *args: "--batch-size 1")
        fit, *_, first = read_answers(build_report(make_config()))
    assert fit.startswith("Does it fit?         no: ")
    assert first.startswith("First of all         does not fit: ")
    absent = read_answers(build_report(make_config(device="cuda:99")))
    assert "unknown: --device cuda:99" in absent[0]
    assert "unknown: --device cuda:99" in absent[1]
    assert "doubtful" in absent[2]
    no_text = read_answers(build_report(make_config(text_file=["missing.txt"])))
    assert "yes: " in no_text[0]
    assert "unknown: missing.txt" in no_text[1]
    assert "unknown: missing.txt" in no_text[2]
    monkeypatch.setattr(fits, "free_bytes", lambda path: 10)
    assert "no: the disk lacks room" in read_answers(build_report(make_config()))[0]


def test_a_run_without_a_warning_learns(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_plan_warnings", lambda *args: [])
    learning = read_answers(build_report(make_config()))[2]
    assert learning == "Will it learn?       yes: 0.0 tokens per parameter, no warning"


@pytest.mark.parametrize(
    ("environment", "terminal", "coloured"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    assert is_in_colour(stream) is coloured
    report = Report(answers=[Answer("Does it fit?", "no", "why"), Answer("How long?", "3 s", "ok")])
    text = report.to_text(in_colour=is_in_colour(stream))
    assert ("\x1b[31mno\x1b[0m: why\n" in text) is coloured
    assert "How long?            3 s: ok\n" in text


@pytest.mark.parametrize("place", range(len(check.QUICK_STEPS + check.STEPS)))
def test_a_step_that_fails_leaves_a_whole_report(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: int,
) -> None:
    def fail(found: Any) -> None:
        raise KeyError("of this step")

    steps = [*check.QUICK_STEPS, *check.STEPS]
    steps[place] = (steps[place][0], fail)
    n_quick = len(check.QUICK_STEPS)
    monkeypatch.setattr(check, "QUICK_STEPS", tuple(steps[:n_quick]))
    monkeypatch.setattr(check, "STEPS", tuple(steps[n_quick:]))
    assert check.run(make_config()) == 1
    said = capsys.readouterr()
    assert "KeyError: 'of this step'" in said.out.split("1 problem in the way")[1]
    assert all(f"{name.capitalize()}\n" in said.out for name in SECTIONS)
    assert said.out.startswith("Does it fit?")
    assert ("warning: KeyError" in said.err) == (place < n_quick)  # told before the text is read


def test_only_the_data_folder_the_report_and_a_picture_are_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    before = list_tree(tmp_path)
    assert check.run(make_config(measure=True)) == 0
    new = {name for name in list_tree(tmp_path) if name not in before}
    assert {name.split("/")[0] for name in new} == {"data", "training_output"}
    assert sorted(n for n in new if n.startswith("training_output")) == [
        "training_output/check_report.json",
        "training_output/schedule.png",
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
    flags = report.sections["system information"]["flags_set"]
    assert "--learning-rate 0.002 (from the checkpoint)" in flags
    assert "a caller" not in flags
    assert report.problems == []
    written = Path("training_output/metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, written) if row["event"] == "eval"][-1]
    bits = report.sections["dataset"]["checkpoint_bits_per_byte"]
    assert bits == pytest.approx(last["bits_per_byte"], abs=1e-4)
    Path("other.txt").write_text("A loss on another text cannot be compared.\n" * 500)
    newest = "training_output/milestones/checkpoint-4"
    new_text = build_report(
        make_config(max_steps=12, resume_from=newest, text_file=["other.txt"], data_dir="other")
    )
    assert "checkpoint_bits_per_byte" not in new_text.sections["dataset"]
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
