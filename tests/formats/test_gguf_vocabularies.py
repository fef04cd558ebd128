"""Published vocabularies, and llama.cpp's own texts with the ids that it has for them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from preflight.formats.gguf_header import read_header
from preflight.formats.gguf_vocabulary import read_tokenizer

pytestmark = pytest.mark.slow
_SOURCE = "llama_cpp_python-0.3.36"
_INSIDE = f"{_SOURCE}/vendor/llama.cpp/models/ggml-vocab-"
_NAMES = ("command-r", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "refact")
_BETWEEN = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def folder() -> Path:
    """The vocabularies, fetched once and kept in the folder of temporary files."""
    folder = Path(tempfile.gettempdir()) / "preflight-test-models"
    archive = folder / f"{_SOURCE}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "-q", "-d", str(folder), "llama-cpp-python==0.3.36"], check=True)
    if not (folder / _SOURCE).is_dir():
        with tarfile.open(archive) as file:
            wanted = [member for member in file if member.name.startswith(_INSIDE)]
            file.extractall(folder, wanted, filter="data")
    return folder


@pytest.mark.parametrize("name", [*_NAMES, "starcoder"])
def test_ids_of_llama_cpps_own_texts(name: str, folder: Path) -> None:
    path = folder / f"{_INSIDE}{name}.gguf"
    with open(path, "rb") as file:
        keys = read_header(path, file).keys
    tokenizer = read_tokenizer(keys, len(keys["tokenizer.ggml.tokens"]), name)
    texts = path.with_name(f"{path.name}.inp").read_bytes().decode().split(_BETWEEN)[:-1]
    lines = path.with_name(f"{path.name}.out").read_text().splitlines()
    assert len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text).tolist() == [int(number) for number in line.split()], text
