"""Preparation: ids exactly those of one piece, faults in text and folders, interrupted builds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import prepare
from config import DataSettings, ExitCode, PreflightError
from prepare import DataFolder, encode_run, load_data_folder, prepare_data
from signals import StopFlag
from tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
GPT2 = load_tokenizer("gpt2")


@functools.cache
def build_other_pattern(name: str) -> Tokenizer:
    """cl100k's or o200k's split pattern over GPT-2's ranks: no network needed."""
    original = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = lambda *args, **kwargs: {}  # type: ignore[assignment]
    try:
        pattern = getattr(openai_public, name)()["pat_str"]
    finally:
        openai_public.load_tiktoken_bpe = original
    encoding = tiktoken.Encoding(
        f"test_{name}", pat_str=pattern, mergeable_ranks=GPT2.encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    return Tokenizer(encoding)


TOKENIZERS = {
    "gpt2": GPT2,
    "cl100k_base": build_other_pattern("cl100k_base"),
    "o200k_base": build_other_pattern("o200k_base"),
}


def build(
    tmp_path: Path, *texts: str | bytes, tokenizer: Tokenizer = GPT2, block_bytes: int = 64,
    n_workers: int = 0, **values: Any,
) -> DataFolder:
    """Prepare `texts` as files of their own, with small blocks."""
    tmp_path.mkdir(exist_ok=True)
    names = []
    for number, text in enumerate(texts):
        path = tmp_path / f"text{number}.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        names.append(str(path))
    values = {"data_dir": str(tmp_path / "data"), "shard_size": 1024, **values}
    data_settings = DataSettings(text_file=tuple(names), **values)
    return prepare._prepare(Path(data_settings.data_dir), data_settings, tokenizer, None,
                            block_bytes, n_workers)


def read_ids(data: DataFolder, split: str) -> list[int]:
    return np.concatenate(getattr(data, split).open()).tolist()


def read_documents(data: DataFolder, tokenizer: Tokenizer = GPT2) -> dict[str, list[list[int]]]:
    """The ids of each document, by split."""
    documents: dict[str, list[list[int]]] = {}
    for split in ("train", "val"):
        documents[split] = [[]]
        for token in read_ids(data, split):
            if token == tokenizer.end_of_text_id:
                documents[split].append([])
            else:
                documents[split][-1].append(token)
        assert documents[split].pop() == []  # one end-of-text after each document
    return documents


def hash_tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


# ---- exactness ----------------------------------------------------------------------------------

RUNS = st.builds(
    lambda unit, count: unit * count,
    st.sampled_from(["a", "A", "ab", "Ab", "^", "1", " ", "\n", "\r\n", "\r", "\t ", " \n", "\u6f22",
                     "\u6f22A", "\u3002", "\U0001f600", "'", "'s", "/", "\n/", "\u0301", "\xa0",
                     "\u3000", "x'll", "\x1c", "\u0130", "=-", "\ufeff", "\0", "<|endoftext|>"]),
    st.integers(1, 90),
)
WORDS = st.sampled_from(["the ", "we'll", " I'M", "don't ", "\n\n", "  ", "x = 1\n", "12345", "3.14",
                         "\u4f60\u597d\u3002", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "caf\xe9 ",
                         "\u043f\u0440\u0438\u0432\u0435\u0442", "://", "\r\n", "HTTPServer"])
TEXTS = st.lists(st.one_of(RUNS, WORDS, st.text(max_size=12)), min_size=1, max_size=12).map("".join)


def cut_and_encode(text: str, tokenizer: Tokenizer, block_bytes: int) -> list[int]:
    """What the builder does with one document, without files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        with open(path, "rb") as file:
            source = prepare.Source("x", path, 0, "", (), None)  # type: ignore[arg-type]
            document = prepare._Document(source, 0, path.stat().st_size)
            ids: list[int] = []
            for _, data, _, _ in prepare._cut_document(document, file, 0, block_bytes):
                if isinstance(data, str):
                    for part in encode_run(tokenizer.encoding, data, window_bytes=128):
                        ids += part.tolist()
                else:
                    assert len(data) <= block_bytes + 16
                    ids += prepare.encode_block(tokenizer.encoding, data.decode()).tolist()
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, block_bytes=st.integers(16, 200))
@example(text="\u6f22" * 30 + "A" * 200 + "b", block_bytes=64)
@example(text="x" * 70 + " " * 90 + "\n" * 40 + "y", block_bytes=64)
@example(text="." * 64 + "\n" * 9 + "/" * 30 + "a" * 500, block_bytes=64)
@settings(max_examples=100)
def test_cutting_never_changes_the_ids(name: str, text: str, block_bytes: int) -> None:
    tokenizer = TOKENIZERS[name]
    assert cut_and_encode(text, tokenizer, block_bytes) == tokenizer.encode(text)


@given(data=st.text(alphabet="ab1^= \n", min_size=1, max_size=3000), window=st.integers(64, 300))
@settings(max_examples=60)
def test_long_pieces_are_merged_as_in_one_piece(data: str, window: int) -> None:
    encoding = GPT2.encoding
    for piece in (data, data.replace(" ", "a").replace("\n", "b")):
        parts = prepare._merge_in_windows(encoding, piece, 0, len(piece), window)
        assert [i for part in parts for i in part] == encoding._encode_single_piece(piece)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("unit", ["a", "^", " ", "\U0001f600", "ab1^", "\u6f22", "A"])
def test_long_runs_are_exact_with_real_windows(name: str, unit: str) -> None:
    text = "x " + unit * (300_000 // len(unit.encode()))
    encoding = TOKENIZERS[name].encoding
    found = np.concatenate(list(encode_run(encoding, text)))
    assert found.tolist() == encoding.encode_ordinary(text)


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), block_bytes=st.integers(16, 5000))
@settings(max_examples=40)
def test_files_become_documents_in_shards(texts: list[str], block_bytes: int) -> None:
    texts = ["words of text. " + text + " more words" for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        data = build(Path(folder), *texts, block_bytes=block_bytes)
        documents = read_documents(data)
        found = [GPT2.decode_bytes(ids) for ids in documents["train"] + documents["val"]]
        assert b"".join(found) == "".join(texts).encode()
        assert all(
            ids == GPT2.encode(text.decode())
            for ids, text in zip(documents["train"] + documents["val"], found, strict=True)
        )
        assert data.train.n_bytes + data.val.n_bytes == len("".join(texts).encode())
        assert data.train.n_documents == len(documents["train"])
        assert data.val.n_documents == len(documents["val"]) > 0


def test_workers_and_block_sizes_give_the_same_folder(tmp_path: Path) -> None:
    draw = random.Random(1)
    text = "".join(draw.choice(["word ", "\n", "\u6f22\u5b57\u3002", "a" * 300, "^" * 50, "12 "])
                   for _ in range(3000))
    trees = []
    for number, (block_bytes, n_workers) in enumerate(((64, 0), (1000, 2), (2**20, 0))):
        data = build(tmp_path / str(number), text, block_bytes=block_bytes, n_workers=n_workers,
                     shard_size=2000)
        trees.append(hash_tree(data.path))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) > 10


def test_worker_killed_then_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "some words of text, again and again. " * 3000
    expected = build(tmp_path / "a", text)
    original = prepare._Encoders._collect
    killed = []

    def kill_once(self: Any, block: Any, future: Any) -> Any:
        if not killed and self._pool is not None:
            killed.append(True)
            os.kill(next(iter(self._pool._processes)), signal.SIGKILL)
        return original(self, block, future)

    monkeypatch.setattr(prepare._Encoders, "_collect", kill_once)
    data = build(tmp_path / "b", text, n_workers=2, block_bytes=1000)
    assert killed
    assert data.fingerprint == expected.fingerprint
    assert "a tokenising process was lost" in capsys.readouterr().err


# ---- documents and the split --------------------------------------------------------------------


def test_separator_splits_documents_across_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_READ_BYTES", 7)
    texts = [f"document {i} <|endoftex" for i in range(40)]
    data = build(tmp_path, "<|endoftext|>".join([*texts, "", "end"]),
                 document_separator="<|endoftext|>")
    documents = read_documents(data)
    found = sorted(GPT2.decode(ids) for ids in documents["train"] + documents["val"])
    assert found == sorted([*texts, "end"])
    assert data.metadata["split"]["by"] == "tail"


def test_many_documents_are_split_by_document(tmp_path: Path) -> None:
    texts = [f"this is document number {i}" for i in range(400)]
    data = build(tmp_path, "|||".join(texts), document_separator="|||")
    assert data.metadata["split"]["by"] == "documents"
    assert (data.train.n_documents, data.val.n_documents) == (380, 20)
    val = [GPT2.decode(ids) for ids in read_documents(data)["val"]]
    assert set(val) < set(texts)


@given(st.integers(1, 3000), st.floats(0.001, 0.5))
@settings(max_examples=50)
def test_validation_share_by_document(n_documents: int, share: float) -> None:
    chosen = sum(prepare._is_validation(i, share) for i in range(n_documents))
    assert abs(chosen - n_documents * share) <= 1.001


def test_tail_is_cut_behind_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    data = build(tmp_path, text, val_split=0.1)
    train, val = (GPT2.decode(ids[0]) for ids in read_documents(data).values())
    assert train + val == text
    assert train.endswith("\n")
    assert 0.08 < len(val) / len(text) < 0.1


def test_folder_glob_and_skipped_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("second " * 30)
    (folder / "a.txt").write_text("first " * 30)
    (folder / "inner" / "c.txt").write_text("third " * 30)
    (folder / ".hidden").write_text("no")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfd" * 30)
    (folder / "dangling").symlink_to("nowhere")
    data = prepare_data(
        DataSettings(text_file=(str(folder),), data_dir=str(folder / "data")), GPT2, 4
    )
    names = [source["name"] for source in data.metadata["sources"]]
    assert names == ["texts/a.txt", "texts/b.txt", "texts/inner/c.txt"]
    assert "skipped 2 of 5 files" in capsys.readouterr().err
    again = prepare_data(
        DataSettings(text_file=(str(folder / "*.txt"),), data_dir=str(tmp_path / "d2")), GPT2, 4
    ) if (folder / "bad.txt").unlink() is None else None
    assert again is not None
    assert [s["name"] for s in again.metadata["sources"]] == ["a.txt", "b.txt"]


def test_byte_order_mark_is_dropped_and_the_rest_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "one\r\ntwo\rthree\n\0four <|endoftext|> five\n" * 9
    data = build(tmp_path, b"\xef\xbb\xbf" + text.encode())
    documents = read_documents(data)
    assert "".join(GPT2.decode(d) for s in ("train", "val") for d in documents[s]) == text
    said = capsys.readouterr().err
    assert "byte order mark" in said
    assert "9 times" in said


def test_sample_is_prepared_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 700_000)
    data_settings = DataSettings(data_dir=str(tmp_path / "data"))
    data = prepare_data(data_settings, GPT2, 128)
    assert "built-in sample" in capsys.readouterr().err
    assert data.metadata["sources"][0]["name"].startswith("built-in sample (python 3.")
    assert data.metadata["split"]["by"] == "documents"
    assert prepare_data(data_settings, GPT2, 128).fingerprint == data.fingerprint
    assert "reusing" in capsys.readouterr().err
    assert not (tmp_path / "data" / prepare.BUILDING_NAME).exists()
