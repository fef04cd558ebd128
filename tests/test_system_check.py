"""`--check`: sections, exit codes, problems and warnings, and figures against a real run."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import learnability
import performance
import system_check
import training_run
from config import ModelConfig, RunConfig, TrainingSettings, build_config
from hardware import find_card
from learnability import find_content_warnings, find_plan_warnings, scan_content
from performance import (
    RunCost,
    _choose_loads,
    _Load,
    estimate_cost,
    estimate_disk_bytes,
    estimate_run_time,
    measure_product_flops,
)
from prepare import DataFolder, prepare_data
from storage import read_json
from system_check import SECTIONS, Report, build_report, compare, format_label, format_value
from tokenizer import load_tokenizer
from trainer import build_plan

TINY = {
    "model_size": "custom", "n_layers": 2, "n_heads": 2, "n_embeddings": 32, "context_length": 32,
    "batch_size": 4, "device": "cpu", "mixed_precision": False, "max_steps": 20,
    "num_workers": 1, "measure": False,
}
MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(values: dict[str, Any]) -> RunConfig:
    return build_config(values, dict.fromkeys(values, "the command line"))


@pytest.fixture
def make_config(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    monkeypatch.chdir(tmp_path)
    return lambda **flags: build(TINY | {"text_file": [str(tiny_text)]} | flags)


def list_tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def problems_of(report: Report) -> str:
    return "\n".join(f"{problem.text} {problem.fix}" for problem in report.problems)


def test_sections_in_order_and_the_same_figures_as_json(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert system_check.run_check(make_config()) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{name.capitalize()}\n") if i else text.index(name.capitalize())
              for i, name in enumerate(SECTIONS)]
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
    assert system_check.run_check(make_config(json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == saved["model"]
    assert printed["dataset"] == saved["dataset"]
    assert printed["training_configuration"] == saved["training_configuration"]


def test_only_the_data_folder_and_the_report_are_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    before = list_tree(tmp_path)
    assert system_check.run_check(make_config(measure=True)) == 0
    new = {name for name in list_tree(tmp_path) if name not in before}
    assert {name.split("/")[0] for name in new} == {"data", "training_output"}
    assert [n for n in new if n.startswith("training_output")] == [
        "training_output/check_report.json"]
    before = list_tree(tmp_path)
    system_check.run_check(make_config())
    assert set(list_tree(tmp_path)) == set(before)


def test_measured_figures_stand_beside_predicted_ones(make_config: MakeConfig) -> None:
    report = build_report(make_config(measure=True, price_per_hour=2.0))
    rows = report.sections["performance estimation"]
    assert rows["timed_steps"] >= 5
    assert set(rows["tokens_per_second"]) == {"predicted", "measured", "ratio"}
    assert 0 < rows["model_flops_utilisation_share"] < 1.5
    assert rows["cost"] == pytest.approx(rows["total_seconds"] / 1800, abs=0.01)
    resident = report.sections["memory analysis"]["resident_bytes"]
    assert resident["ratio"] == pytest.approx(resident["measured"] / resident["predicted"], 1e-3)


@pytest.mark.slow
def test_predicted_time_against_a_real_run(make_config: MakeConfig) -> None:
    config = make_config(measure=True, max_steps=40)
    total = build_report(config).sections["performance estimation"]["total_seconds"]
    began = time.perf_counter()
    training_run.run_training(config)
    real = time.perf_counter() - began
    assert real / 3 < total < real * 3  # the machine may be busy in one of the two


def test_a_card_that_is_not_here(make_config: MakeConfig) -> None:
    report = build_report(make_config(
        model_size="small", n_layers=None, n_heads=None, n_embeddings=None, context_length=None,
        mixed_precision=None, target_gpu="RTX 4090"))
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
    flags = {"n_layers": 3, "n_heads": 4, "n_embeddings": 256, "context_length": 256,
             "mixed_precision": None, "batch_size": 128, "compile_model": False}
    report = build_report(make_config(gpu_memory=1.5, **flags))
    assert report.sections["memory analysis"]["verdict"] == "does not fit"
    assert "--batch-size" in problems_of(report)
    # What is suggested fits indeed.
    words = report.problems[0].fix.split()
    batch = int(words[words.index("--batch-size") + 1])
    again = build_report(make_config(
        gpu_memory=1.5, **flags | {"batch_size": batch},
        gradient_checkpointing="--gradient-checkpointing" in words,
        gradient_accumulation_steps=math.ceil(128 / batch)))
    assert again.problems == []
    assert "not_known" in again.sections["performance estimation"]
    hopeless = build_report(make_config(gpu_memory=0.6, **flags))
    assert "no batch size fits" in problems_of(hopeless)


def test_five_faults_in_one_report(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare_data(make_config().data, load_tokenizer("gpt2"), 32)
    shard = Path("data/train/shard_00000.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(system_check, "free_bytes", lambda path: 10)
    Path("blocked").write_text("a file")
    config = make_config(text_file=[], vocab_size=100, gpu_memory=0.1, target_gpu="RTX 4090",
                         resume_from="nowhere", batch_size=512)
    assert system_check.run_check(config) == 1
    out = capsys.readouterr().out
    for words in ("--vocab-size 100", "is damaged", "disk: ", "nowhere", "does not fit"):
        assert words in out.split("problems in the way")[1], words
    assert "5 problems in the way" in out
    assert "Memory analysis" in out
    assert json.loads(Path("training_output/check_report.json").read_text())["ok"] is False


@pytest.mark.parametrize(("flags", "words"), [
    ({"device": "cuda:99"}, "--device"),
    ({"target_gpu": "Voodoo 2"}, "--gpu-memory"),
    ({"tokenizer": "klingon"}, "--tokenizer"),
    ({"text_file": ["missing.txt"]}, "missing.txt"),
    ({"context_length": 12_000, "batch_size": 1}, "--context-length"),
    ({"val_split": 0.001}, "--val-split"),
    ({"output_dir": "tiny.txt/run"}, "tiny.txt/run"),
])
def test_each_problem_names_its_flag_and_hides_nothing(
    make_config: MakeConfig, flags: dict[str, Any], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert system_check.run_check(make_config(**flags)) == 1
    out = capsys.readouterr().out
    assert words in out.split("in the way")[1]
    assert all(f"{name.capitalize()}\n" in out for name in SECTIONS)
    assert "platform" in out


def test_a_run_that_would_be_continued(make_config: MakeConfig) -> None:
    training_run.run_training(make_config(max_steps=4))
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

    monkeypatch.setattr(system_check, "measure_cost", fail)
    report = build_report(make_config(measure=True))
    assert "out of memory in a trial step" in problems_of(report)
    assert "estimate, not measured" in report.sections["performance estimation"]["basis"]


# ---- will it learn? -----------------------------------------------------------------------------

MODEL = ModelConfig(1000, 64, 64, 4, 3, 256)


def build_folder(tmp_path: Path, n_train: int, n_val: int) -> Any:
    """As much of a data folder as the warnings look at."""
    split = type("Split", (), {})
    train, val = split(), split()
    train.n_tokens, val.n_tokens = n_train, n_val
    folder = split()
    folder.train, folder.val = train, val
    return folder


def find_keys(tmp_path: Path, n_train: int, n_val: int, **flags: Any) -> set[str]:
    values = {"model_size": "custom", "n_layers": 3, "n_heads": 4, "n_embeddings": 64,
              "context_length": 64, "batch_size": 64} | flags
    config = build(values)
    model = config.model.resolve(1000)
    plan = build_plan(config.training, config.control, 64, max(1, n_train // 64),
                      max(1, n_val // 64))
    found = find_plan_warnings(config, model, plan, build_folder(tmp_path, n_train, n_val))
    assert all(advice.text and "--" in advice.fix for advice in found)
    return {advice.key for advice in found}


SOUND = {"n_train": 2_000_000, "n_val": 50_000}


@pytest.mark.parametrize(("changes", "key"), [
    ({"n_train": 100_000}, "tokens_per_parameter"),
    ({"n_train": 300_000, "num_epochs": 20.0}, "epochs"),
    ({"n_train": 300_000, "num_epochs": 20.0}, "dropout"),
    ({"batch_size": 1, "learning_rate": 1e-2}, "tokens_per_step"),
    ({"max_steps": 1500, "warmup_steps": 1500}, "warmup"),
    ({"n_val": 2000}, "validation"),
    ({"eval_every": 10_000}, "evaluation_interval"),
    ({"checkpoint_every": 10_000}, "checkpoint_interval"),
])
def test_every_warning_has_its_cause(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    assert find_keys(tmp_path, **SOUND) == set()
    assert key in find_keys(tmp_path, **SOUND | changes)


def test_the_suggested_batch_and_rate_end_the_warning(tmp_path: Path) -> None:
    flags = {"model_size": "small", "n_layers": None, "n_heads": None, "n_embeddings": None,
             "context_length": None, "batch_size": 3}
    config = build(flags)
    model = config.model.resolve(50257)
    folder = build_folder(tmp_path, 10**9, 10**6)

    def find(**changes: Any) -> list[learnability.Advice]:
        config = build(flags | changes)
        plan = build_plan(config.training, config.control, 1024, 10**6, 10**3)
        found = find_plan_warnings(config, model, plan, folder)
        return [advice for advice in found if advice.key == "tokens_per_step"]

    words = find()[0].fix.replace(",", "").split()
    assert find(gradient_accumulation_steps=int(words[1])) == []
    assert find(learning_rate=0.99 * float(words[4])) == []
    assert find(gradient_accumulation_steps=64) == []


def prepare_text(folder: Path, documents: list[str]) -> DataFolder:
    source = folder / "text.txt"
    source.write_text("|||".join(documents), encoding="utf-8")
    values = {"text_file": [str(source)], "data_dir": str(folder / "data"),
              "document_separator": "|||", "num_workers": 1}
    return prepare_data(build(values).data, load_tokenizer("gpt2"), 16)


def test_suspicious_content(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    documents = [f"Document {i} tells of {i * 7} ships and {i + 3} harbours, and of the "
                 f"{i}th voyage to the {i * 13} islands." for i in range(400)]

    def find(texts: list[str], name: str) -> tuple[learnability.Content, set[str]]:
        (tmp_path / name).mkdir()
        content = scan_content(prepare_text(tmp_path / name, texts), tokenizer)
        return content, {advice.key for advice in find_content_warnings(content)}

    content, keys = find(documents, "sound")
    assert (keys, content.duplicate_documents, content.replacement_characters) == (set(), 0, 0)
    assert content.n_documents == 400
    content, keys = find(documents + documents[:40], "twice")
    assert (keys, content.duplicate_documents) == ({"duplicates"}, 40)
    content, keys = find([text.replace("ships", "sh\ufffdps\ufffd") for text in documents], "bad")
    assert (keys, content.replacement_characters) == ({"replacement_characters"}, 800)
    content, keys = find([*documents, " ".join(documents * 9)], "large")
    assert keys == {"large_document"}
    assert content.largest_tokens > 30_000


def test_scanning_goes_on_across_shards_and_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"The {i}th line is here, and it has some {i * 3} words more to be counted, so "
                 "that it is longer than sixteen tokens." for i in range(300)]
    data = prepare_text(tmp_path, documents)
    whole = scan_content(data, load_tokenizer("gpt2"))
    monkeypatch.setattr(learnability, "_CHUNK_TOKENS", 100)
    assert scan_content(data, load_tokenizer("gpt2")) == whole
    assert whole.scanned_tokens == data.train.n_tokens + data.val.n_tokens
    monkeypatch.setattr(learnability, "MAX_SCANNED_TOKENS", 1000)
    part = scan_content(data, load_tokenizer("gpt2"))
    assert 900 < part.scanned_tokens <= 1000
    assert part.duplicate_documents == 0


# ---- time ---------------------------------------------------------------------------------------


def test_a_run_adds_up() -> None:
    cost = RunCost(2.0, 0.1, 1.0, 5.0, 30.0, "test")
    config = build({"max_steps": 100, "checkpoint_every": 30, "eval_every": 25,
                    "checkpoint_minutes": 1.0})
    plan = build_plan(config.training, config.control, 256, 10_000, 50)
    found = estimate_run_time(cost, plan, config.control)
    assert (found.n_checkpoints, found.n_evaluations) == (4, 4)
    assert found.training_seconds == 200
    assert found.checkpoint_seconds == 20
    assert found.evaluation_seconds == pytest.approx(4 * (plan.eval_windows * 0.1 + 1), abs=4)
    assert found.total_seconds == pytest.approx(sum(
        (30, 200, found.evaluation_seconds, 20)))
    rest = estimate_run_time(cost, plan, config.control, done_steps=60)
    assert (rest.training_seconds, rest.n_evaluations, rest.n_checkpoints) == (80, 2, 2)
    # Every minute is every 30 steps; every six seconds is every third.
    often = dataclasses.replace(config.control, checkpoint_minutes=0.1)
    assert estimate_run_time(cost, plan, often).n_checkpoints == 34


def test_an_estimate_grows_with_the_work() -> None:
    card = find_card("A100 SXM 80GB")
    small = build({"model_size": "small"}).model.resolve(50257)

    def rate(model: ModelConfig, batch: int, **flags: Any) -> float:
        training = TrainingSettings(batch_size=batch)
        cost = estimate_cost(model, training, dtype=torch.bfloat16, card=card, **flags)
        return batch * model.context_length / cost.step_seconds

    # Public runs of GPT-2 124M on an A100 lie between 90 and 190 thousand tokens a second.
    assert 90_000 < rate(small, 16) < 190_000
    assert rate(small, 16, compile_model=True) > rate(small, 16)
    assert rate(small, 16, gradient_checkpointing=True) < rate(small, 16)
    wide = dataclasses.replace(small, n_layers=24)
    assert rate(wide, 16) < rate(small, 16)
    assert rate(small, 1) < rate(small, 16)


def test_long_steps_are_timed_in_part() -> None:
    full = _Load(4, 8, 1024)
    assert _choose_loads(full, 2.0, True) == (None, full)
    low, high = _choose_loads(full, 12.0, True)
    assert high == _Load(1, 8, 1024)
    low, high = _choose_loads(full, 800.0, True)
    assert (high.micro_steps, high.sequences) == (1, 1)
    assert low is not None
    assert low.tokens <= 8 < high.tokens < 1024
    # Compiled or on CUDA the shapes stay.
    assert _choose_loads(full, 100.0, False) == (_Load(1, 8, 1024), _Load(2, 8, 1024))
    assert _choose_loads(_Load(1, 8, 1024), 100.0, False) == (None, _Load(1, 8, 1024))


def test_a_part_scales_to_the_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time that is made to follow the work exactly is extrapolated exactly."""
    config = make_config(batch_size=8, gradient_accumulation_steps=4)
    tokenizer = load_tokenizer("gpt2")
    data = prepare_data(config.data, tokenizer, 32)
    model = config.model.resolve(tokenizer.vocab_size)
    plan = build_plan(config.training, config.control, 32, 100, 10)
    runtime = training_run.build_runtime(config.system, 20)
    clock = [0.0]

    def train_step(self: Any, step: int, batches: Any) -> Any:
        flops = sum(_Load(1, len(x), x.shape[1]).count_flops(model) for x, _ in batches)
        clock[0] += 0.5 + flops / 1e9
        return type("Result", (), {"loss": torch.zeros(())})()

    monkeypatch.setattr(performance.Trainer, "train_step", train_step)
    monkeypatch.setattr(performance.time, "perf_counter", lambda: clock[0])
    Path("training_output").mkdir()
    cost = performance.measure_cost(config, model, plan, runtime, data, tokenizer, 100.0)
    whole = 0.5 + _Load(4, 8, 32).count_flops(model) / 1e9
    assert cost.step_seconds == pytest.approx(whole, rel=1e-6)
    assert "scaled" in cost.basis
    assert cost.peak_bytes is None


def test_disk_and_product_rate() -> None:
    config = build({"max_checkpoints": 3})
    one = estimate_disk_bytes(MODEL, config.training, config.control, 1)
    assert estimate_disk_bytes(MODEL, config.training, config.control) == 5 * one
    assert measure_product_flops(torch.device("cpu"), torch.float32) > 1e8


def test_values_read_well() -> None:
    shown = {"a_bytes": 3 * 2**30, "b_share": 0.125, "c_seconds": 0.25, "d_seconds": 7200.0,
             "learning_rate": 6e-4, "n": 12345, "x": 1.5, "flag": True, "none": None}
    assert [format_value(key, value) for key, value in shown.items()] == [
        "3.0 GiB", "12.5%", "250.0 ms", "2 h 00 min", "6.00e-04", "12,345", "1.50", "yes",
        "unknown"]
    both = compare(2**20, 2**21)
    assert format_value("peak_bytes", both) == "predicted 1.0 MiB, measured 2.0 MiB, ratio 2.000"
    assert compare(5, None) == 5
    assert np.isfinite(both["ratio"])
