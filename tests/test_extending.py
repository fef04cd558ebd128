"""The recipes of docs/extending.md: a fake of each kind is one row, and a run uses them all."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenization.fakes import PairTokenizer

import main
from conftest import TINY_FLAGS
from preflight.checkpoints.store import find_newest
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources import Document, Source, SourceFacts
from preflight.formats.protocol import Exporter, ImportedModel, Importer, OutgoingModel
from preflight.models.protocol import LanguageModel
from preflight.settings import DataSettings, ModelConfig, RunConfig, TrainingSettings, kinds
from preflight.settings.kinds import (
    ACTIVATIONS,
    MODE_SUMMARIES,
    MODES,
    OPTIMIZERS,
    SCHEDULES,
    SOURCES,
    TOKENIZERS,
    TRACKERS,
)
from preflight.training.optimizers import OptimizerSpec
from preflight.training.plan import TrainingPlan
from preflight.training.trackers import Row, Tracker
from transformer_model import DecoderOnlyTransformer

TEXT = "one more line of a text that comes from nowhere. " * 100


class SignDescent(torch.optim.Optimizer):
    """Moves each weight by the learning rate against its gradient's sign. It keeps no state."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])


def build_sign_descent(
    groups: Any, training: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    return SignDescent([p for group in groups for p in group.parameters], learning_rate)


class Nowhere(Source):
    """Two documents that no file holds."""

    name, label = "nowhere", "nowhere:"
    texts = (TEXT, TEXT[::-1])

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        data = [text.encode() for text in self.texts]
        digest = hashlib.sha256(b"".join(data)).hexdigest()
        return SourceFacts(sum(map(len, data)), digest, array("q", map(len, data)))

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        for text in self.texts[start:]:
            yield iter([text.encode()[offset:]])
            offset = 0


def find_nowhere(given: str | None, settings: DataSettings) -> list[Source] | None:
    return [Nowhere()] if given == "nowhere:" else None


class ListTracker:
    rows: ClassVar[list[Row]] = []

    def __init__(self, output_dir: Path) -> None:
        self.rows.clear()

    def resume(self, step: int) -> None:
        self.rows.append({"event": "resumed", "step": step})

    def log(self, row: Row) -> None:
        self.rows.append(row)


class NamesExporter:
    """Writes the names of the weights, one a line; an importer of nothing beside it."""

    name = "names"
    quantizations = ("none",)
    makes_folder = False

    def accepts(self, path: Path) -> bool:
        return path.suffix == ".names"

    def check(self, model: OutgoingModel, quantization: str) -> None:
        assert quantization in self.quantizations

    def export(self, model: OutgoingModel, path: Path, quantization: str) -> None:
        path.write_text("\n".join(model.weights))

    def verify(self, model: OutgoingModel, path: Path, quantization: str) -> list[str]:
        assert path.read_text().split("\n") == list(model.weights)
        return ["all names are equal"]

    def read(self, path: Path) -> ImportedModel:
        raise PreflightError(ExitCode.CHECKPOINT, f"{path} has names alone")


def halve(step: int, plan: TrainingPlan) -> float:
    return plan.peak_learning_rate / 2 ** (step + 1)


def run_hello(config: RunConfig) -> int:
    print(f"hello from {config.control.output_dir}")
    return 0


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each fake, and nothing left of it afterwards."""
    added: list[tuple[Any, str, Any]] = [
        (ACTIVATIONS, "softsign", "torch.nn.functional:softsign"),
        (OPTIMIZERS, "sign", OptimizerSpec(build_sign_descent, lambda *_: 0)),
        (SCHEDULES, "halve", halve),
        (TOKENIZERS, "fake pairs", PairTokenizer),
        (SOURCES, "nowhere", find_nowhere),
        (TRACKERS, "list", ListTracker),
        (MODES, "hello", run_hello),
    ]
    for registry, name, target in added:
        monkeypatch.setattr(registry, "_targets", registry._targets | {name: target})
    monkeypatch.setitem(MODE_SUMMARIES, "hello", "say hello")


def test_a_run_of_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--train` for two steps on a fake tokenizer, source, optimizer, schedule and tracker."""
    monkeypatch.chdir(tmp_path)
    names = ["--tokenizer", "fake pairs", "--text-file", "nowhere:", "--optimizer", "sign"]
    names += ["--scheduler", "halve", "--activation", "softsign", "--learning-rate", "0.01"]
    flags = ["--train", *TINY_FLAGS, *names, "--max-steps", "2", "--val-split", "0.2"]
    assert main.main(flags) == 0
    newest = find_newest(tmp_path / "training_output")
    assert newest is not None
    assert newest.step == 2
    assert newest.config["tokenizer"]["kind"] == "pairs"
    with newest.open("tokenizer_pairs.txt") as file:  # the tokenizer's own file travels inside
        assert file.read() == b"fake pairs"
    assert newest.config["training"]["optimizer"] == "sign"
    steps = [row for row in ListTracker.rows if row["event"] == "step"]
    assert [row["learning_rate"] for row in steps] == [0.005, 0.0025]
    ids = np.load("data/train/shard_00000.npy")
    expected = PairTokenizer("fake pairs").encode(TEXT)
    assert ids[: len(expected)].tolist() == expected.tolist()
    generated = ["--generate", "--device", "cpu", "--prompts", "one", "--max-new-tokens", "4"]
    assert main.main(generated) == 0
    assert main.main(["--check", "--no-measure", *flags[1:]]) == 0


def test_a_mode_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--hello", "--output-dir", "here"]) == 0
    assert capsys.readouterr().out == "hello from here\n"
    assert main.main(["--help"]) == 0
    assert "--hello" in capsys.readouterr().out


def test_the_protocols_are_met() -> None:
    """The model, an exporter and a tracker have the shape that their users rely on."""
    config = ModelConfig(97, 16, 8, 2, 1, 16)
    model: LanguageModel = DecoderOnlyTransformer(config)
    tokens = torch.zeros((2, 8), dtype=torch.long)
    assert model(tokens).shape == (2, 8, 97)
    masked = tokens.clone()
    masked[0] = -100
    with torch.no_grad():
        total, half = float(model(tokens, tokens)), float(model(tokens, masked))
    assert total == pytest.approx(2 * half)
    assert {group.kind for group in model.parameter_groups()} == {"matrix", "embedding", "scalar"}
    assert isinstance(NamesExporter(), Exporter)
    assert isinstance(NamesExporter(), Importer)
    tracker: Tracker = ListTracker(Path())
    tracker.log({"event": "step", "step": 1})


def test_the_recipes_name_every_registry() -> None:
    """A registry without a recipe would be a seam that nobody finds."""
    text = (Path(main.__file__).parent / "docs" / "extending.md").read_text(encoding="utf-8")
    registries = [name for name in vars(kinds) if name.isupper() and "SUMMARIES" not in name]
    registries = [name for name in registries if not name.startswith("_")]
    assert registries
    for name in registries:
        assert f"`{name}`" in text, name
