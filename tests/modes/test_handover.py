"""`--import` and `--export` as a user calls them: the whole way there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formats.shapes import GPT2, TEMPLATE, draw_model, train_bpe

import main
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import find_best
from preflight.core.errors import ExitCode, PreflightError
from preflight.formats import hf_export
from preflight.formats.proof import proof_error
from preflight.modes.export_model import find_exporter, read_outgoing
from preflight.modes.import_model import find_importer
from preflight.settings import model_config_to_dict
from preflight.settings.kinds import IMPORTERS


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_export, "ask_transformers", lambda *_: [])
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run", quantization=None)
    return tmp_path / "run"


def write_checkpoint(folder: Path, quantization: str | None) -> None:
    model = draw_model(GPT2, train_bpe())
    config = {
        "model": model_config_to_dict(model.config),
        "tokenizer": model.tokenizer.describe(),
        "origin": {"source": "x", "sha256": "0", "quantization": quantization},
    }
    save_checkpoint(
        *(folder, 3, model.weights, {"a": 1}, config, {"val_loss": 2.5}, model.tokenizer),
        extra_files={"chat_template.jinja": TEMPLATE.encode()},
    )


def test_there_and_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--export", "out", "--output-dir", "run", "--quantize", "f32"]) == 0
    said = capsys.readouterr().out
    assert "weights are bit-equal" in said
    assert said.splitlines()[-1].startswith("out: huggingface, f32, ")
    config = json.loads(Path("out/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert "val_loss | 2.5000 nats" in Path("out/README.md").read_text()
    assert main.main(["--import", "out", "--output-dir", "back"]) == 0
    checkpoint = find_best(Path("back"))
    assert checkpoint.step == 0
    assert set(checkpoint.config["origin"]) == {"format", "source", "sha256", "quantization"}
    before = read_outgoing(find_best(run), Path("none"))
    after = read_outgoing(checkpoint, Path("none"))
    assert after.chat_template == TEMPLATE
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
    assert after.sample is not None
    assert len(after.sample) > 100
    prompt = ["--prompts", "the quick", "--max-new-tokens", "4", "--device", "cpu", "--seed", "1"]
    capsys.readouterr()
    texts = []
    for folder in ("run", "back"):
        assert main.main(["--generate", "--output-dir", folder, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_training_does_not_continue_from_weights_alone(
    run: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--export", "out", "--output-dir", "run"]) == 0
    assert main.main(["--import", "out", "--output-dir", "back"]) == 0
    flags = ["--train", "--text-file", str(tiny_text), "--output-dir", "back", "--device", "cpu"]
    assert main.main(flags) == ExitCode.CHECKPOINT
    assert "training cannot continue from weights only" in capsys.readouterr().err


def test_nothing_is_replaced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    assert main.main(["--export", "out", "--output-dir", "run"]) == ExitCode.STORAGE
    assert list(Path("out").iterdir()) == []
    assert main.main(["--export", "there", "--output-dir", "run"]) == 0
    assert main.main(["--import", "there", "--output-dir", "run"]) == ExitCode.STORAGE
    assert "holds checkpoints already" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["proof", "disk", "stop"])
def test_what_does_not_prove_itself_is_not_there(
    broken: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: BaseException = proof_error("it is not")
    code = int(ExitCode.CHECK_FAILED)
    if broken == "disk":
        error, code = OSError(28, "No space left on device"), int(ExitCode.STORAGE)
    if broken == "stop":
        error, code = KeyboardInterrupt(), int(ExitCode.SIGINT)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(hf_export.HuggingFaceExporter, "verify", fail)
    before = sorted(run.parent.iterdir())
    assert main.main(["--export", "out", "--output-dir", "run"]) == code
    assert sorted(run.parent.iterdir()) == before


def test_weights_are_not_quantised_twice(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small").mkdir()
    write_checkpoint(tmp_path / "small", quantization="q4_1")
    flags = ["--export", "x.gguf", "--output-dir", "small", "--quantize", "q8_0"]
    assert main.main(flags) == ExitCode.CHECKPOINT
    assert "quantised as q4_1 before" in capsys.readouterr().err
    assert main.main(["--export", "out", "--output-dir", "small"]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--import", "gone"], ExitCode.CHECKPOINT, "no such file"),
        (["--import", "run"], ExitCode.CHECKPOINT, "Preflight's own"),
        (["--import", "text.md"], ExitCode.CHECKPOINT, "expected a Hugging Face folder"),
        (["--export", "x.onnx", "--output-dir", "run"], ExitCode.FLAGS, "no format ends in .onnx"),
        (["--export", "x", "--quantize", "q8_0", "--output-dir", "run"], ExitCode.FLAGS, "q8_0"),
        (["--export", "x", "--output-dir", "none"], ExitCode.CHECKPOINT, "no checkpoint in none"),
        (["--import", "a", "--export", "b"], ExitCode.FLAGS, "--import and --export"),
        (["--import"], ExitCode.FLAGS, "expected one argument"),
    ],
)
def test_a_mistake_is_told(
    flags: list[str], code: int, told: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.md").write_text("x")
    assert main.main(flags) == code
    assert told in capsys.readouterr().err


def test_each_format_is_found(tmp_path: Path) -> None:
    assert find_exporter(Path("x.gguf")).name == "gguf"
    assert find_exporter(Path("my.model-1.5")).name == "huggingface"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    assert find_importer(tmp_path).name == "huggingface"
    assert find_importer(tmp_path / "ckpt.pt").name in IMPORTERS.names()
    with pytest.raises(PreflightError):
        find_importer(tmp_path / "none")
