"""`--init-from`: a new run that begins with the weights of a checkpoint, imported or trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.shapes import GPT2, LLAMA, TEMPLATE, draw_model, train_bpe
from test_finetuning import make_chats, read_weights
from test_training_run import assert_equal_states, read_rows, read_state, stop_after
from torch.nn import functional

import main
from conftest import build
from generate import load_model
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import find_best
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.modes import check, finetune, train
from preflight.modes.setup import RunSetup
from preflight.settings import ModelConfig, RunConfig, model_config_to_dict

ORIGIN = {"format": "gguf", "source": "x.gguf", "sha256": "0", "quantization": "q4_1"}
OWN = {"device": "cpu", "mixed_precision": False, "num_workers": 1, "batch_size": 4}
MakeRun = Callable[..., RunConfig]


def write_base(folder: Path, config: ModelConfig = LLAMA) -> None:
    """What `--import` of a small Llama leaves."""
    model = draw_model(config, train_bpe())
    described = {
        "model": model_config_to_dict(model.config),
        "tokenizer": model.tokenizer.describe(),
        "origin": ORIGIN,
    }
    folder.mkdir()
    weights = {name: weight / 4 for name, weight in model.weights.items()}
    files = {"chat_template.jinja": TEMPLATE.encode()}
    save_checkpoint(
        *(folder, 0, weights, {}, described, {"val_loss": None}, model.tokenizer),
        extra_files=files,
    )


@pytest.fixture
def make(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """The configuration of a run from the base; keywords are flags, ``None`` removes one."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")

    def make_config(**flags: Any) -> RunConfig:
        values = OWN | {"init_from": "base", "text_file": [str(tiny_text)], "output_dir": "out"}
        given = {name: v for name, v in (values | flags).items() if v is not None}
        return build(given)

    return make_config


def test_it_begins_where_the_base_stands(make: MakeRun, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (tmp_path / "base").rglob("*") if p.is_file()}
    assert train.run(make(max_steps=30, learning_rate=3e-3, eval_every=30)) == 0
    rows = read_rows(tmp_path / "out")
    model, tokenizer = load_model(find_best(tmp_path / "base"), torch.device("cpu"), torch.float32)
    with RunSetup(make(max_steps=30), StopFlag(), continues=False).open_loader() as loader:
        ids, targets = loader.next_batch()
    logits = model(ids)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert rows[0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert rows[0]["step"] == 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert {p: p.read_bytes() for p in before} == before

    made = find_best(tmp_path / "out")
    assert made.model_config == find_best(tmp_path / "base").model_config
    assert made.config["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    base = find_best(tmp_path / "base").manifest.files["model.safetensors"]
    assert made.config["base"]["weights_sha256"] == base.sha256
    assert made.config["base"]["step"] == 0
    assert made.config["origin"] == ORIGIN
    assert (made.path / "chat_template.jinja").read_text() == TEMPLATE


def test_a_cut_run_equals_the_unbroken_one(
    make: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"max_steps": 8, "checkpoint_every": 3, "eval_every": 8, "learning_rate": 1e-3}
    assert train.run(make(output_dir="whole", **flags)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train.run(make(output_dir="cut", **flags)) == ExitCode.SIGTERM
    shutil.rmtree(tmp_path / "base")  # the run's own checkpoints have all that it needs
    assert train.run(make(output_dir="cut", init_from=None, **flags)) == 0
    assert_equal_states(read_state(tmp_path / "cut", 8), read_state(tmp_path / "whole", 8))
    logs = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in read_rows(tmp_path / name)]
        for name in ("cut", "whole")
    ]
    assert logs[0] == logs[1]
    configs = [find_best(tmp_path / name).config for name in ("cut", "whole")]
    assert configs[0]["base"] == configs[1]["base"]
    assert configs[0]["origin"] == ORIGIN


def test_weights_of_a_trained_run_and_the_learning_rate(make: MakeRun, tmp_path: Path) -> None:
    assert train.run(make(max_steps=2, eval_every=2)) == 0
    assert train.run(make(max_steps=1, init_from="out", output_dir="next")) == 0
    first = find_best(tmp_path / "next")
    assert first.config["training"]["learning_rate"] == 1e-4
    assert first.config["base"]["step"] == 2
    assert first.config["origin"] == ORIGIN
    before, after = (read_weights(find_best(tmp_path / n).path) for n in ("out", "next"))
    changes = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(changes) < 2e-4  # one step of AdamW at the peak moves a weight by the rate


def test_other_ids_are_refused_and_text_is_prepared_anew(
    make: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte = {"init_from": None, "model_size": "nano", "tokenizer": "byte", "max_steps": 1}
    assert train.run(make(output_dir="other", **byte)) == 0
    with pytest.raises(PreflightError) as raised:
        train.run(make(text_file=None, max_steps=1))
    assert raised.value.code == ExitCode.DATA
    assert "made with another tokenizer (byte)" in raised.value.lines[0]
    assert train.run(make(max_steps=1)) == 0
    made = json.loads((tmp_path / "data/metadata.json").read_text())["tokenizer"]
    assert made["fingerprint"] == train_bpe().fingerprint
    assert train.run(make(text_file=None, max_steps=1, output_dir="again")) == 0


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ({"n_layers": 3}, ExitCode.CHECKPOINT, "n_layers: checkpoint 2, flags 3"),
        ({"model_size": "nano"}, ExitCode.CHECKPOINT, "holds another model"),
        ({"tokenizer": "gpt2"}, ExitCode.CHECKPOINT, "flags gpt2"),
        ({"model_family": "gpt2"}, ExitCode.CHECKPOINT, "model_family"),
        ({"output_dir": "base"}, ExitCode.FLAGS, "holds the run that --init-from names"),
        ({"init_from": "gone"}, ExitCode.CHECKPOINT, "gone is not a Preflight checkpoint"),
        ({"window": 100}, ExitCode.FLAGS, "--window 100"),
    ],
)
def test_what_contradicts_the_base_is_refused(
    flags: dict[str, Any], code: ExitCode, told: str, make: MakeRun, tmp_path: Path
) -> None:
    if flags.get("output_dir") == "base":
        (tmp_path / "base/milestones/checkpoint-0/checkpoint.pt").touch()
    with pytest.raises(PreflightError) as raised:
        RunSetup(make(**flags), StopFlag(), continues=False).check_before_data()
    assert raised.value.code == code
    assert told in " ".join(raised.value.lines)
    assert not (tmp_path / "data").exists()


def test_a_run_keeps_its_base(make: MakeRun, tmp_path: Path) -> None:
    write_base(tmp_path / "another", GPT2)
    assert train.run(make(max_steps=1)) == 0
    with pytest.raises(PreflightError, match="--init-from names other weights"):
        train.run(make(max_steps=2, init_from="another"))
    plain = {"model_size": "nano", "tokenizer": "byte", "data_dir": "bytes", "output_dir": "plain"}
    assert train.run(make(init_from=None, max_steps=1, **plain)) == 0
    with pytest.raises(PreflightError, match="began from random weights"):
        train.run(make(max_steps=2, output_dir="plain", init_from="out"))


def test_the_report_is_about_the_same_model(make: MakeRun) -> None:
    report = check.build_report(make(max_steps=3, measure=False))
    assert not report.problems
    model = report.sections["model"]
    config = find_best(Path("base")).model_config
    assert model["context"] == config.context_length
    assert model["shape"] == config.label
    plan = report.sections["training configuration"]
    assert plan["begins_with"].startswith("base/milestones/checkpoint-0")
    assert plan["learning_rate"] == 1e-4
    assert "tokens_per_parameter" not in {warning.key for warning in report.warnings}


def test_modes_that_cannot_begin_with_it_say_so(
    make: MakeRun, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init-from", "base", "--text-file", str(tiny_text), "--device", "cpu"]
    assert main.main(["--find-lr", *flags]) == ExitCode.FLAGS
    assert "--init-from: short trainings begin with random weights" in capsys.readouterr().err
    assert main.main(["--train", *flags, "--resume-from", "base"]) == ExitCode.FLAGS
    assert main.main(["--train", "--output-dir", "base", *flags[2:]]) == ExitCode.CHECKPOINT
    assert "another --output-dir and --init-from" in capsys.readouterr().err


def test_fine_tuning_keeps_where_the_model_came_from(
    make: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (json.dumps(chat) for chat in make_chats(8))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    values = {"finetune": ["chats.jsonl"], "from_checkpoint": "base", "output_dir": "out"}
    assert finetune.run(build(OWN | values | {"max_steps": 1, "lora_rank": 2})) == 0
    assert finetune.run(build(OWN | values | {"max_steps": 2, "lora_rank": 2})) == 0
    assert find_best(tmp_path / "out").config["origin"] == ORIGIN
    flags = ["--export", "x.gguf", "--quantize", "q8_0", "--output-dir", "out"]
    assert main.main(flags) == ExitCode.CHECKPOINT
    assert "quantised as q4_1 before" in capsys.readouterr().err
