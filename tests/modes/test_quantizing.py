"""`--quantize int8` of `--generate` and `--evaluate`, and `--export --weights-only`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from formats.shapes import TEMPLATE
from test_finetuning import make_chats, read_weights
from test_init_from import ORIGIN, OWN, write_base

import main
from conftest import build
from generate import load_model
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core.errors import ExitCode
from preflight.modes import export_weights, finetune

CPU = ["--device", "cpu"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    return tmp_path / "base"


def test_the_cost_is_told_and_text_comes(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*CPU, "--output-dir", "base", "--prompts", "the quick", "--max-new-tokens", "4"]
    assert main.main(["--generate", *flags, "--quantize", "int8"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the quick")
    [line] = [line for line in said.err.splitlines() if line.startswith("int8: ")]
    before, after = (float(line.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert abs(after - before) < 0.02
    told = float(line.split("(")[1].split()[0])
    assert told == pytest.approx(after - before, abs=1.01e-4)


def test_an_evaluation_says_that_it_is_of_int8(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--evaluate", "quick", *CPU, "--output-dir", "base", "--json"]
    assert main.main([*flags, "--quantize", "int8"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert main.main(flags) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (small["dtype"], whole["dtype"]) == ("int8", "float32")
    assert small["tasks"] != whole["tasks"]


@pytest.mark.parametrize("mode", ["--generate", "--evaluate"])
def test_other_kinds_are_of_files(
    mode: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([mode, "--output-dir", "base", "--quantize", "q8_0"]) == ExitCode.FLAGS
    assert "use --quantize int8" in capsys.readouterr().err
    assert main.main(["--export", "x", "--output-dir", "base", "--quantize", "int8"]) == 2


def test_weights_only_of_adapters(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (json.dumps(chat) for chat in make_chats(8))
    Path("chats.jsonl").write_text("\n".join(lines) + "\n")
    values = {"finetune": ["chats.jsonl"], "from_checkpoint": "base", "output_dir": "out"}
    assert finetune.run(build(OWN | values | {"max_steps": 3, "lora_rank": 2})) == 0
    capsys.readouterr()
    assert main.main(["--export", "model", "--weights-only", "--output-dir", "out"]) == 0
    assert "weights are bit-equal" in capsys.readouterr().out
    found, trained = open_checkpoint("model"), find_best(Path("out"))
    assert sorted(path.name for path in Path("model").iterdir()) == sorted(
        [*found.manifest.files, "manifest.json"]
    )
    models = [load_model(c, torch.device("cpu"), torch.float32)[0] for c in (found, trained)]
    weights = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert not torch.equal(
        weights[0]["layers.0.self_attn.qkv_proj.weight"],
        read_weights(find_best(base).path)["layers.0.self_attn.qkv_proj.weight"],
    )
    assert found.step == 3
    assert found.val_loss == trained.val_loss
    assert found.config["origin"] == ORIGIN
    assert Path("model/chat_template.jinja").read_text() == TEMPLATE
    assert Path("model/checkpoint.pt").stat().st_size < 2000
    shutil.rmtree("out")
    shutil.rmtree("base")
    flags = ["--generate", "--checkpoint-path", "model", "--prompts", "a", "--max-new-tokens", "2"]
    assert main.main([*flags, *CPU]) == 0
    more = ["--output-dir", "new", "--export", "again", "--weights-only"]
    assert main.main([*more, "--checkpoint-path", "model/milestones"]) == ExitCode.CHECKPOINT
    assert main.main([*more, "--checkpoint-path", "model"]) == 0


def test_weights_only_that_does_not_prove_itself_is_not_there(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--export", "model", "--weights-only", "--output-dir", "base"]
    before = sorted(Path().iterdir())
    write = export_weights._write

    def write_other(checkpoint, model, tokenizer, folder) -> None:  # type: ignore[no-untyped-def]
        write(checkpoint, model, tokenizer, folder)
        next(iter(model.parameters())).data += 1

    monkeypatch.setattr(export_weights, "_write", write_other)
    assert main.main(flags) == ExitCode.CHECK_FAILED
    assert sorted(Path().iterdir()) == before
    assert main.main(["--export", "checkpoint-5", *flags[2:]]) == ExitCode.FLAGS
    assert "is of step 0" in capsys.readouterr().err
