"""Every kind of export beside transformers and llama.cpp: families, ties, weights, tokenizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gguf_models import LLAMA, SHAPE, load

from preflight.formats.gguf_export import GgufExporter
from preflight.formats.hf_export import HuggingFaceExporter
from preflight.formats.protocol import Exporter, OutgoingModel
from preflight.models.building import build_model
from preflight.settings import ModelConfig
from preflight.tokenization import Tokenizer
from preflight.tokenization.characters import CharTokenizer

TEXT = (
    "Once upon a time the capital of France is where 1 + 1 = 2.\n"
    "def main():\n    return the capital\nIt's a naïve café, said the fox.\n"
) * 6
LETTERS = CharTokenizer("".join(sorted({*TEXT})))
FAMILIES = {"gpt2": {}, "llama": LLAMA | {"n_kv_heads": 2}}


def make(family: str, tied: bool, is_trained: bool, tokenizer: Tokenizer) -> OutgoingModel:
    """A model with the weights that it begins with, made larger, or taught the text."""
    size = tokenizer.vocab_size + 3
    config = ModelConfig(vocab_size=size, tied=tied, **SHAPE | FAMILIES[family])
    torch.manual_seed(5)
    model = build_model(config)
    ids = torch.from_numpy(tokenizer.encode(TEXT).astype("int64"))
    if is_trained:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            starts = torch.randint(len(ids) - 33, (4,))
            rows = torch.stack([ids[start : start + 33] for start in starts])
            logits = model(rows[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 3, "it has learned nothing"
    else:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return OutgoingModel(config, weights, tokenizer, None, {"name": family}, ids[:200])


def prove(exporter: Exporter, model: OutgoingModel, path: Path) -> str:
    """Write an export in f32, and what its proof says."""
    exporter.check(model, "f32")
    exporter.export(model, path, "f32")
    told = "\n".join(exporter.verify(model, path, "f32"))
    agreed = re.search(r"the tokenizers agree on ([\d,]+) texts", told)
    assert agreed is not None
    assert int(agreed[1].replace(",", "")) >= 3000
    return told


def read_gap(told: str, engine: str) -> float:
    """The largest difference that a proof tells of an engine."""
    (gap,) = re.findall(rf"{engine}: .*tokens differ by (\S+) at most", told)
    return float(gap)


def prove_folder(model: OutgoingModel, path: Path) -> None:
    path.mkdir()
    told = prove(HuggingFaceExporter(), model, path)
    assert read_gap(told, "transformers") <= 1e-5
    assert "transformers: 30 of 30 greedy tokens" in told


# Every two choices meet in one of them.
PAIRS = [
    ("gpt2", True, False, "gpt2"),
    ("llama", False, True, "gpt2"),
    ("gpt2", False, True, "bpe"),
    ("llama", True, False, "bpe"),
    ("gpt2", True, True, "byte"),
    ("llama", False, False, "byte"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied", "is_trained", "tokenizer"), PAIRS)
def test_both_engines_compute_what_was_exported(
    family: str, tied: bool, is_trained: bool, tokenizer: str, tmp_path: Path
) -> None:
    model = make(family, tied, is_trained, load(tokenizer))
    prove_folder(model, tmp_path / "folder")
    told = prove(GgufExporter(), model, tmp_path / "x.gguf")
    assert read_gap(told, r"llama\.cpp") <= 2e-3
    assert "llama.cpp: 30 of 30 greedy tokens" in told


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_characters_reach_transformers(family: str, tmp_path: Path) -> None:
    model = make(family, True, True, LETTERS)
    prove_folder(model, tmp_path / "folder")
