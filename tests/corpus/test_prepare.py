"""Preparation: documents, faults in text and folders, reuse and rebuild, interrupted builds."""

from __future__ import annotations

import dataclasses
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
from corpus.bad_texts import BAD_TEXTS, GOOD
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenization.hostile_texts import TEXTS, build_tokenizer

from conftest import TINY_FLAGS, CommandRunner
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.signals import StopFlag
from preflight.corpus import build as build_module
from preflight.corpus import builder
from preflight.corpus.build import prepare_data
from preflight.corpus.data_report import REPORT_NAMES
from preflight.corpus.metadata import render_metadata
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.corpus.sources import builtin, find_sources
from preflight.corpus.sources import text as text_source
from preflight.corpus.split import is_validation
from preflight.corpus.workers import Encoders
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
GPT2 = load_tokenizer("gpt2")


def build(
    tmp_path: Path,
    *texts: str | bytes,
    tokenizer: Tokenizer = GPT2,
    block_bytes: int = 64,
    n_workers: int = 0,
    may_replace: build_module.MayReplace | None = None,
    **values: Any,
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
    return prepare_data(
        data_settings,
        tokenizer,
        may_replace=may_replace,
        block_bytes=block_bytes,
        n_workers=n_workers,
    )


def read_ids(data: DataFolder, split: str) -> list[int]:
    return np.concatenate(list(getattr(data, split).open())).tolist()


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
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# ---- whole folders ------------------------------------------------------------------------------


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), block_bytes=st.integers(16, 5000))
@settings(max_examples=40)
def test_files_become_documents_in_shards(texts: list[str], block_bytes: int) -> None:
    texts = ["words. " + text.replace("\0", "") + " more words" for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        data = build(Path(folder), *texts, block_bytes=block_bytes)
        documents = read_documents(data)
        found = [GPT2.decode_bytes(ids) for ids in documents["train"] + documents["val"]]
        assert b"".join(found) == "".join(texts).encode()
        assert all(
            ids == GPT2.encode(text.decode()).tolist()
            for ids, text in zip(documents["train"] + documents["val"], found, strict=True)
        )
        assert data.train.n_bytes + data.val.n_bytes == len("".join(texts).encode())
        assert data.train.n_documents == len(documents["train"])
        assert data.val.n_documents == len(documents["val"]) > 0


def test_workers_and_block_sizes_give_the_same_folder(tmp_path: Path) -> None:
    draw = random.Random(1)
    text = "".join(
        draw.choice(["word ", "\n", "\u6f22\u5b57\u3002", "a" * 300, "^" * 50, "12 "])
        for _ in range(3000)
    )
    trees = []
    for number, (block_bytes, n_workers) in enumerate(((64, 0), (1000, 2), (2**20, 0))):
        data = build(
            tmp_path / str(number),
            text,
            block_bytes=block_bytes,
            n_workers=n_workers,
            shard_size=2000,
        )
        # The report names the text, which lies in another folder each time.
        tree = hash_tree(data.path)
        trees.append({name: tree[name] for name in tree.keys() - set(REPORT_NAMES)})
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) > 10


def test_worker_killed_then_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "some words of text, again and again. " * 3000
    expected = build(tmp_path / "a", text)
    original = Encoders._collect
    killed = []

    def kill_once(self: Any, block: Any, future: Any) -> Any:
        if not killed and self._pool is not None:
            killed.append(True)
            os.kill(next(iter(self._pool._processes)), signal.SIGKILL)
        return original(self, block, future)

    monkeypatch.setattr(Encoders, "_collect", kill_once)
    data = build(tmp_path / "b", text, n_workers=2, block_bytes=1000)
    assert killed
    assert data.fingerprint == expected.fingerprint
    assert "a tokenising process was lost" in capsys.readouterr().err


def test_workers_that_die_as_they_start(tmp_path: Path) -> None:
    """As a process that memory has no room for does: `false` stands for the interpreter."""
    code = """
import multiprocessing.resource_tracker
from preflight.core.log import configure_logging
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer
if __name__ == "__main__":
    configure_logging("info")
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.set_executable("/bin/false")
    tokenizer = load_tokenizer("gpt2")
    settings = DataSettings(text_file=("text.txt",), num_workers=2)
    print(prepare_data(settings, tokenizer).train.n_tokens)
"""
    (tmp_path / "text.txt").write_text("some words of text, again and again. " * 100_000)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 800_000
    assert "a tokenising process was lost" in done.stderr


# ---- documents and the split --------------------------------------------------------------------


def test_separator_splits_documents_across_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_source, "_READ_BYTES", 7)
    texts = [f"document {i} <|endoftex" for i in range(40)]
    data = build(
        tmp_path, "<|endoftext|>".join([*texts, "", "end"]), document_separator="<|endoftext|>"
    )
    documents = read_documents(data)
    found = [GPT2.decode(ids) for ids in documents["train"] + documents["val"]]
    assert data.metadata.split.by == "tail"
    assert found[:38] == texts[:38]
    assert "".join(found) == "".join([*texts, "end"])


def test_many_documents_are_split_by_document(tmp_path: Path) -> None:
    texts = [f"this is document number {i}" for i in range(400)]
    data = build(tmp_path, "|||".join(texts), document_separator="|||")
    assert data.metadata.split.by == "documents"
    assert (data.train.n_documents, data.val.n_documents) == (380, 20)
    val = [GPT2.decode(ids) for ids in read_documents(data)["val"]]
    assert set(val) < set(texts)


@given(st.integers(1, 3000), st.floats(0.001, 0.5))
@settings(max_examples=50)
def test_validation_share_by_document(n_documents: int, share: float) -> None:
    chosen = sum(is_validation(i, share) for i in range(n_documents))
    assert abs(chosen - n_documents * share) <= 1.001


def test_tail_is_cut_behind_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    data = build(tmp_path, text, val_split=0.1)
    train, val = (GPT2.decode(ids[0]) for ids in read_documents(data).values())
    assert train + val == text
    assert train.endswith("\n")
    assert 0.08 < len(val) / len(text) < 0.1


def test_folder_glob_and_skipped_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("second " * 30)
    (folder / "a.txt").write_text("first " * 30)
    (folder / "inner" / "c.txt").write_text("third " * 30)
    (folder / ".hidden").write_text("no")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfd" * 30)
    (folder / "dangling").symlink_to("nowhere")
    data = prepare_data(DataSettings(text_file=(str(folder),), data_dir=str(folder / "data")), GPT2)
    names = [source.name for source in data.metadata.sources]
    assert names == ["texts/a.txt", "texts/b.txt", "texts/inner/c.txt"]
    assert "skipped 2 of 5 files" in capsys.readouterr().err
    (folder / "bad.txt").unlink()
    glob = DataSettings(text_file=(str(folder / "*.txt"),), data_dir=str(tmp_path / "d2"))
    again = prepare_data(glob, GPT2)
    assert [s.name for s in again.metadata.sources] == ["a.txt", "b.txt"]


def test_what_is_left_out_of_a_folder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    for name in ("a.txt", "closed/b.txt", "run/metrics.jsonl", ".git/config", ".notes", "data/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}, some words long")
    (folder / "loop").symlink_to(folder)
    real = os.scandir

    def scan(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    values = DataSettings(
        text_file=(str(folder),), data_dir=str(folder / "data"), output_dir=str(folder / "run")
    )
    (folder / "data" / "x").rename(folder / "x")
    assert [path.label for path in find_sources(values)] == [f"{folder}/a.txt", f"{folder}/x"]
    told = capsys.readouterr().err
    for words in (
        f"linked folders are left out (1, the first: {folder}/loop)",
        f"folders that this program writes are left out (2, the first: {folder}/data)",
        f"hidden folders and caches are left out (1, the first: {folder}/.git)",
        f"hidden files are left out (1, the first: {folder}/.notes)",
        f"folders that cannot be read (Permission denied) are left out (1, the first: {folder}/clo",
    ):
        assert words in told


def test_a_run_never_reads_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "data/b.txt", "data/metadata.json", "data/train/c.txt", "out/m.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("some words")

    def find(*given: str) -> list[str]:
        values = DataSettings(text_file=given, data_dir="data", output_dir="out")
        return [source.label for source in find_sources(values)]

    assert find(".") == find("*") == find("**/*.txt") == ["a.txt"]
    assert find("data/*") == find("data/*.txt") == ["data/b.txt"]
    assert find("data/b.txt", "data/metadata.json") == ["data/b.txt", "data/metadata.json"]
    assert "files that this program writes are left out (2, the first: data" in (
        capsys.readouterr().err
    )
    for name in ("data", "out", "data/train", "../" + tmp_path.name + "/out"):
        with pytest.raises(PreflightError, match="this program writes that folder") as caught:
            find(name)
        assert caught.value.code == ExitCode.FLAGS


@pytest.mark.parametrize(
    "pair", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "link"), (".", "b")]
)
def test_folders_within_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("link").symlink_to("a")
    with pytest.raises(PreflightError, match="one is the other or lies within it") as caught:
        find_sources(DataSettings(data_dir=pair[0], output_dir=pair[1]))
    assert caught.value.code == ExitCode.FLAGS
    assert len(find_sources(DataSettings(data_dir="a", output_dir="ab"))) == 1


def test_notes_on_many_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, *[b"\xef\xbb\xbf" + GOOD.encode()] * 5, GOOD)
    told = capsys.readouterr().err
    assert told.count("byte order mark") == 1
    assert "text0.txt and 4 more: a byte order mark" in told


def test_byte_order_mark_is_dropped_and_the_rest_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "one\r\ntwo\rthree\n\0four <|endoftext|> five\n" * 9
    data = build(tmp_path, b"\xef\xbb\xbf" + text.encode())
    documents = read_documents(data)
    assert "".join(GPT2.decode(d) for s in ("train", "val") for d in documents[s]) == text
    said = capsys.readouterr().err
    assert "byte order mark" in said
    assert "<|endoftext|>' is taken as plain text" in said


def test_sample_is_prepared_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builtin, "SAMPLE_BYTES", 700_000)
    data_settings = DataSettings(data_dir=str(tmp_path / "data"))
    data = prepare_data(data_settings, GPT2)
    assert "built-in sample" in capsys.readouterr().err
    assert data.metadata.sources[0].name.startswith("built-in sample (python 3.")
    assert data.train.n_documents > 80
    assert prepare_data(data_settings, GPT2).fingerprint == data.fingerprint
    assert "reusing" in capsys.readouterr().err
    assert not (tmp_path / "data" / build_module.BUILDING_NAME).exists()


def test_prose_of_the_sample_flows_and_its_code_keeps_its_lines() -> None:
    code = "    if x:\n\ty()  \n\n    more()\n \t\n"
    text = f"A sentence\nthat goes on:\n\n{code}The\n  end.\n\n>>> f(1)\n2"
    assert builtin._flow(text).split("\n\n") == [
        "A sentence that goes on:",
        "    if x:\n        y()",
        "    more()",
        "The end.",
        ">>> f(1)\n2\n",
    ]


# ---- faults in the text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read_bytes"),
    [(name, 2**20) for name in BAD_TEXTS]
    # The same offsets and lines when a read ends anywhere; a kind is judged by the first read.
    + [(name, 10) for name in BAD_TEXTS if "UTF" not in name and name != "NULs"],
)
def test_bad_text_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read_bytes: int
) -> None:
    monkeypatch.setattr(text_source, "_READ_BYTES", read_bytes)
    content, message = BAD_TEXTS[name]
    path = tmp_path / "bad text.txt"
    path.write_bytes(content)
    before = build(tmp_path / "old", GOOD)
    tree = hash_tree(before.path)
    with pytest.raises(PreflightError) as caught:
        prepare_data(DataSettings(text_file=(str(path),), data_dir=str(before.path)), GPT2)
    assert caught.value.code == ExitCode.TEXT
    assert message in str(caught.value)
    assert hash_tree(before.path) == tree  # the old data folder is as it was


def test_missing_and_special_files_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    names = ["missing.txt", "dangling", "folder", "socket", "none-*.txt", "a\n\udcff"]
    for name in [str(tmp_path / name) for name in names] + ["/dev/zero", "/dev/null", "x" * 300]:
        began = time.monotonic()
        with pytest.raises(PreflightError) as caught:
            prepare_data(DataSettings(text_file=(name,), data_dir=str(tmp_path / "d")), GPT2)
        assert caught.value.code == ExitCode.TEXT
        assert time.monotonic() - began < 0.5
    assert not (tmp_path / "d").exists()
    listening.close()


def test_terminal_is_a_mistake_in_the_flags(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    settings = DataSettings(text_file=(os.ttyname(theirs),), data_dir=str(tmp_path / "d"))
    with pytest.raises(PreflightError, match="a terminal") as caught:
        prepare_data(settings, GPT2)
    assert caught.value.code == ExitCode.FLAGS
    assert not (tmp_path / "d").exists()
    os.close(ours)
    os.close(theirs)


def test_pipe_within_a_folder_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(GOOD)
    os.mkfifo(tmp_path / "texts" / "pipe")
    build_settings = DataSettings(text_file=(str(tmp_path / "texts"),), data_dir=str(tmp_path))
    assert prepare_data(build_settings, GPT2).train.n_documents == 1
    assert "skipped 1 of 2 files" in capsys.readouterr().err


def test_file_with_a_false_size_and_sparse_file(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(2**40)
    for path in (str(sparse), "/proc/self/mem"):
        with pytest.raises(PreflightError) as caught:
            prepare_data(DataSettings(text_file=(path,), data_dir=str(tmp_path / "d")), GPT2)
        assert caught.value.code == ExitCode.TEXT
    if Path("/proc/cpuinfo").exists():  # its size is 0; it may well change between the passes
        try:
            data = prepare_data(
                DataSettings(text_file=("/proc/filesystems",), data_dir=str(tmp_path / "d")),
                GPT2,
            )
            assert data.metadata.sources[0].size > 0
        except PreflightError as error:
            assert error.code == ExitCode.TEXT


def test_pipe_is_copied_first(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(GOOD))
    writer.start()
    data = prepare_data(DataSettings(text_file=(str(pipe),), data_dir=str(tmp_path / "d")), GPT2)
    writer.join()
    assert data.metadata.sources[0].size == len(GOOD)
    assert sorted(p.name for p in data.path.iterdir()) == [
        *(".lock", "data_report.html", "data_report.json", "metadata.json", "tokenizer"),
        *("train", "val"),
    ]


def test_standard_input(preflight: CommandRunner, tmp_path: Path) -> None:
    result = preflight(
        "--train", "--text-file", "-", "--max-steps", "1", *TINY_FLAGS, stdin=GOOD * 20
    )
    assert result.returncode == 0, result.stderr
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_bytes())
    assert metadata["sources"][0]["size"] == len(GOOD) * 20


def test_compiled_python_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "texts" / "__pycache__").mkdir(parents=True)
    (tmp_path / "texts" / "a.py").write_text(GOOD)
    (tmp_path / "texts" / "__pycache__" / "a.pyc").write_bytes(b"\0" * 99)
    found = find_sources(DataSettings(text_file=(str(tmp_path / "texts"),)))
    assert [item.name for item in found] == ["texts/a.py"]


def test_file_that_changes_between_the_passes_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(tmp_path, GOOD)
    tree = hash_tree(old.path)
    original = build_module.build_plan

    def change(*args: Any) -> Any:
        plan = original(*args)
        with open(tmp_path / "text0.txt", "r+b") as file:
            file.write(b"P")
        return plan

    monkeypatch.setattr(build_module, "build_plan", change)
    with pytest.raises(PreflightError, match="changed while it was being read") as caught:
        build(tmp_path, GOOD + "more words\n")
    assert caught.value.code == ExitCode.TEXT
    assert {k: v for k, v in hash_tree(old.path).items() if not k.startswith(".building")} == tree


# ---- reuse, rebuild, damage ---------------------------------------------------------------------


def test_what_makes_a_rebuild_and_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = build(tmp_path, GOOD * 3)
    for values, said in (
        ({"shard_size": 2048}, "reusing"),
        ({"val_split": 0.2}, "--val-split changed from 0.05 to 0.2"),
        ({"document_separator": "after"}, "--document-separator changed from None to 'after'"),
    ):
        capsys.readouterr()
        build(tmp_path, GOOD * 3, **values)
        assert said in capsys.readouterr().err
    build(tmp_path, GOOD * 3 + "x")
    assert "rebuilding" in (err := capsys.readouterr().err)
    assert "the text changed (text0.txt)" in err
    build(tmp_path, GOOD * 3 + "x", tokenizer=build_tokenizer("cl100k_base"))
    assert "the tokenizer changed from gpt2 to test_cl100k_base" in capsys.readouterr().err
    with pytest.raises(PreflightError, match="test_cl100k_base") as caught:
        prepare_data(DataSettings(data_dir=str(data.path)), GPT2)
    assert caught.value.code == ExitCode.DATA


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    data = build(tmp_path, GOOD, shard_size=64)
    assert len(data.train.shards) > 2
    unverified = {".lock", *REPORT_NAMES}  # a report is for people
    files = [p for p in data.path.rglob("*") if p.is_file() and p.name not in unverified]
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(0)
    for _ in range(400):
        path = draw.choices(files, sizes)[0]
        content = path.read_bytes()
        at = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(PreflightError, match=path.name) as caught:
            load_data_folder(data.path, GPT2)
        assert caught.value.code == ExitCode.DATA
        path.write_bytes(content)
    load_data_folder(data.path, GPT2)


HOSTILE_METADATA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda m: None,
    "list": lambda m: [],
    "missing key": lambda m: {k: v for k, v in m.items() if k != "train"},
    "negative": lambda m: m | {"shard_size": -1},
    "boolean": lambda m: m | {"version": True},
    "huge": lambda m: m | {"shard_size": 2**70},
    "newer": lambda m: m | {"version": 3},
    "version 0": lambda m: m | {"version": 0},
    "traversal": lambda m: m["train"]["shards"][0].update(name="../../x.npy") or m,
    "absolute": lambda m: m["train"]["shards"][0].update(name="/etc/passwd") or m,
    "tokens": lambda m: m["train"].update(n_tokens=1) or m,
    "max id": lambda m: m["train"]["shards"][0].update(max_id=1) or m,
    "dtype": lambda m: m | {"dtype": "float64"},
}


@pytest.mark.parametrize("is_forged", [False, True])
@pytest.mark.parametrize("name", HOSTILE_METADATA)
def test_hostile_metadata_is_refused(tmp_path: Path, name: str, is_forged: bool) -> None:
    """Forged: with a checksum that fits."""
    data = build(tmp_path, GOOD)
    path = data.path / "metadata.json"
    content = HOSTILE_METADATA[name](json.loads(path.read_text()))
    if is_forged and not isinstance(content, dict):
        return
    path.write_bytes(render_metadata(content) if is_forged else json.dumps(content).encode())
    with pytest.raises(PreflightError) as caught:
        load_data_folder(data.path, GPT2)
    assert caught.value.code == ExitCode.DATA
    assert str(data.path) in str(caught.value)


def forge(data: DataFolder, **values: Any) -> None:
    path = data.path / "metadata.json"
    path.write_bytes(render_metadata(json.loads(path.read_text()) | values))


def test_unknown_keys_are_accepted_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = build(tmp_path, GOOD)
    forge(data, extra={"a": 1}, sources=[data.metadata.sources[0].model_dump() | {"kind": "text"}])
    found = load_data_folder(data.path, GPT2)
    assert found.metadata.model_dump()["extra"] == {"a": 1}
    assert found.fingerprint == data.fingerprint
    assert build(tmp_path, GOOD).metadata.model_dump()["extra"] == {"a": 1}
    assert "reusing" in capsys.readouterr().err
    path = data.path / "metadata.json"
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(PreflightError, match="checksum"):
        load_data_folder(data.path, GPT2)


def test_listed_files_are_verified_and_others_refused(tmp_path: Path) -> None:
    data = build(tmp_path, GOOD)
    mask, digest = data.path / "train" / "mask_00000.npy", hashlib.sha256(b"mask").hexdigest()
    entry = {"name": "train/mask_00000.npy", "n_bytes": 4, "sha256": digest}
    mask.write_bytes(b"mask")
    with pytest.raises(PreflightError, match="does not list it"):
        load_data_folder(data.path, GPT2)
    forge(data, files=[entry])
    assert load_data_folder(data.path, GPT2).fingerprint == data.fingerprint
    for damage in (lambda: mask.write_bytes(b"mast"), lambda: mask.write_bytes(b"m"), mask.unlink):
        damage()
        with pytest.raises(PreflightError, match="mask_00000") as caught:
            load_data_folder(data.path, GPT2)
        assert caught.value.code == ExitCode.DATA
    for name in ("/etc/passwd", "../text0.txt", "train/../../text0.txt", "", ".", "a//b", "a\0"):
        forge(data, files=[entry | {"name": name}])
        with pytest.raises(PreflightError, match="path within the data folder"):
            load_data_folder(data.path, GPT2)


V1 = Path(__file__).parents[1] / "fixtures" / "v1"


def test_format_v1_is_read_and_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(V1 / "data", tmp_path / "data")
    tree = hash_tree(tmp_path / "data")
    data = load_data_folder(tmp_path / "data", GPT2)
    config = json.loads((V1 / "run/milestones/checkpoint-4/config.json").read_text())
    assert data.fingerprint == config["data"]["fingerprint"]
    assert data.metadata.version == 1
    values = {"data_dir": str(tmp_path / "data")}
    found = prepare_data(DataSettings(text_file=(str(V1 / "text.txt"),), **values), GPT2)
    assert "reusing" in capsys.readouterr().err
    assert hash_tree(tmp_path / "data") == tree
    values["data_dir"] = str(tmp_path / "new")
    new = prepare_data(DataSettings(text_file=(str(V1 / "text.txt"),), **values), GPT2)
    assert new.metadata.version == 2
    assert new.fingerprint == found.fingerprint == data.fingerprint
    forge(data, version=1, train=data.metadata.train.model_dump() | {"n_tokens": 1})
    with pytest.raises(PreflightError, match="sum over its shards"):
        load_data_folder(data.path, GPT2)


def test_damaged_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build(tmp_path, GOOD * 20)
    first, second = (shard.path for shard in data.train.shards[:2])
    good = first.read_bytes()

    def swap() -> None:
        first.write_bytes(second.read_bytes())

    damages: list[Callable[[], Any]] = [
        lambda: first.write_bytes(good[:-2]),
        lambda: first.write_bytes(good + b"\0\0"),
        first.unlink,
        lambda: (data.path / "train" / "shard_00099.npy").write_bytes(good),
        swap,
        lambda: (first.unlink(), first.symlink_to(second)),
    ]
    for damage in damages:
        damage()
        with pytest.raises(PreflightError) as caught:
            prepare_data(DataSettings(data_dir=str(data.path)), GPT2)
        assert caught.value.code == ExitCode.DATA
        assert "shard_000" in str(caught.value)
        first.unlink(missing_ok=True)
        first.write_bytes(good)
        (data.path / "train" / "shard_00099.npy").unlink(missing_ok=True)
    first.write_bytes(good[:-2])
    again = build(tmp_path, GOOD * 20)  # with the text at hand: rebuilt, and said why
    assert "rebuilding" in (err := capsys.readouterr().err)
    assert "shard_00000.npy is damaged: expected" in err
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train/cats.jpg", "{}"),
        ("train/shard_00000.npy", "named like one of ours"),
        ("val/shard_00000.npy/cats.jpg", "a folder named like one of ours"),
        ("metadata.json", "{}"),
        ("metadata.json", '{"loss": NaN}'),
        ("metadata.json", "[" * 100_000),
        ("metadata.json", ""),
        (".building/thesis.txt", "a text"),
        (".building/journal.json", '{"key": "a diary"}'),
        (".building/metadata.json", "{}"),
        (".building/train/thesis.txt", "a text"),
    ],
)
def test_another_programs_files_are_never_replaced(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    for texts in ((GOOD,), ()):
        if not texts and name != ".building/metadata.json" and name.startswith("."):
            continue
        with pytest.raises(PreflightError) as caught:
            build(tmp_path, *texts)
        assert caught.value.code == ExitCode.DATA
        assert str(tmp_path / "data") in str(caught.value)
        assert path.read_text() == content
        assert sorted(set(tmp_path.rglob("*")) - {tmp_path / "text0.txt"}) == before


def test_files_beside_a_complete_folder_are_never_replaced(tmp_path: Path) -> None:
    data = build(tmp_path, GOOD)
    names = ("train/shard_00007.npy", "val/notes.txt", "data_report.json", "data_report.html")
    for name in names:
        (data.path / name).write_text("mine")
        with pytest.raises(PreflightError, match="not provably Preflight's") as caught:
            build(tmp_path, GOOD + "more")
        assert caught.value.code == ExitCode.DATA
        assert (data.path / name).read_text() == "mine"
        (data.path / name).unlink()
    assert load_data_folder(data.path, GPT2).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "name",
    [".building", ".building/train", "train", "val", "metadata.json", ".lock", "data_report.html"],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_links_in_a_data_folder_are_not_followed(
    tmp_path: Path, name: str, is_complete: bool
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("a text")
    if is_complete:
        build(tmp_path, GOOD)
        shutil.rmtree(tmp_path / "data" / name, ignore_errors=True)
        (tmp_path / "data" / name).unlink(missing_ok=True)
    link = tmp_path / "data" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(mine / "thesis.txt" if "." in name[1:] or name == ".lock" else mine)
    with pytest.raises(PreflightError) as caught:
        build(tmp_path, GOOD + "more")
    assert caught.value.code == ExitCode.STORAGE if name == ".lock" else ExitCode.DATA
    assert str(link) in str(caught.value)
    assert (mine / "thesis.txt").read_text() == "a text"
    assert os.listdir(mine) == ["thesis.txt"]
    assert link.is_symlink()


def test_complete_folder_is_kept_when_it_may_not_be_replaced(tmp_path: Path) -> None:
    data = build(tmp_path, GOOD)
    before = hash_tree(data.path)
    asked: list[tuple[str, str | None]] = []

    def may_replace(reason: str, old: str | None, built: DataFolder | None) -> None:
        assert old == (None if built else data.fingerprint)
        fingerprint = built.fingerprint if built else None
        asked.append((reason, fingerprint))
        if fingerprint != data.fingerprint:
            raise PreflightError(ExitCode.DATA, "in use")

    with pytest.raises(PreflightError, match="in use"):
        build(tmp_path, GOOD + "more", may_replace=may_replace)
    assert asked == [("the text changed (text0.txt)", None)]
    assert hash_tree(data.path) == before
    assert not (data.path / ".building").exists()
    # Damaged shards of the same text are built again, of another text they stay.
    shard = data.path / "train" / "shard_00000.npy"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert build(tmp_path, GOOD, may_replace=may_replace).fingerprint == data.fingerprint
    assert asked[1][1] == data.fingerprint
    assert hash_tree(data.path) == before
    content = (data.path / "metadata.json").read_bytes()
    (data.path / "metadata.json").write_bytes(content.replace(b"sources", b"sourCes"))
    damaged = hash_tree(data.path)
    with pytest.raises(PreflightError, match="in use"):
        build(tmp_path, GOOD + "more", may_replace=may_replace)
    assert hash_tree(data.path) == damaged
    assert not (data.path / ".building").exists()


def test_lock_is_held_while_building(tmp_path: Path) -> None:
    data = build(tmp_path, GOOD)
    with FolderLock(data.path, shared=True):
        build(tmp_path, GOOD)  # reuse disturbs nobody
        with pytest.raises(PreflightError) as caught:
            build(tmp_path, GOOD + "more")
    assert caught.value.code == ExitCode.LOCKED


# ---- interrupted builds -------------------------------------------------------------------------

DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
from preflight.core import storage
from preflight.corpus import build
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer

left = int(sys.argv[1])

def counted(name):
    original = getattr(os, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    setattr(os, name, call)

for name in ("fsync", "replace", "rename", "posix_fallocate", "unlink", "mkdir", "rmdir"):
    counted(name)
settings = DataSettings(text_file={texts!r}, data_dir={data!r}, shard_size=1024, val_split=0.2)
build.prepare_data(settings, load_tokenizer("gpt2"), block_bytes=700, n_workers=0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_point_then_run_again_gives_the_same_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before every call that changes the disk, over an older folder; then once more."""
    draw = random.Random(2)
    text = "".join(
        draw.choice(["word ", "line\n", "number 12 ", "\u6f22\u5b57"]) for _ in range(1500)
    )
    values: dict[str, Any] = {"val_split": 0.2, "block_bytes": 700}
    expected = hash_tree(build(tmp_path / "whole", text, **values).path)
    old = build(tmp_path / "old", GOOD)
    source = tmp_path / "whole" / "text0.txt"
    resumed = 0
    for kill_at in range(1, 1000):
        target = tmp_path / f"cut{kill_at}"
        shutil.copytree(old.path, target / "data")
        code = DRIVER.format(root=str(ROOT), texts=(str(source),), data=str(target / "data"))
        status = _run_forked(code, str(kill_at))
        if status == 0:
            break
        assert status == signal.SIGKILL
        if not (target / "data" / ".building" / "metadata.json").exists():
            load_data_folder(target / "data", GPT2)  # the old one or the new, always whole
        again = DataSettings(
            text_file=(str(source),), data_dir=str(target / "data"), shard_size=1024, val_split=0.2
        )
        prepare_data(again, GPT2, block_bytes=333, n_workers=0)
        resumed += "resuming at shard" in capfd.readouterr().err
        assert hash_tree(target / "data") == expected
        shutil.rmtree(target)
    else:
        pytest.fail("never got to the end")
    assert kill_at > 50
    assert resumed > 10


def _run_forked(code: str, *argv: str) -> int:
    """Run `code` in a fork of this process, without its start-up cost; the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            sys.argv = ["driver", *argv]
            exec(compile(code, "driver", "exec"), {"__name__": "driver"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def test_unfinished_folder_without_text_is_an_error_and_a_finished_build_is_moved(
    tmp_path: Path,
) -> None:
    data = build(tmp_path, GOOD * 5)
    tree = hash_tree(data.path)
    building = data.path / build_module.BUILDING_NAME
    building.mkdir()
    os.rename(data.path / "val", building / "val")
    os.rename(data.path / "metadata.json", building / "metadata.json")
    settings = DataSettings(data_dir=str(data.path))
    assert prepare_data(settings, GPT2).fingerprint == data.fingerprint
    assert hash_tree(data.path) == tree
    (data.path / "metadata.json").unlink()
    with pytest.raises(PreflightError, match="not provably") as caught:
        prepare_data(settings, GPT2)
    assert caught.value.code == ExitCode.DATA


def test_stop_keeps_finished_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class StopSoon(StopFlag):
        polls = 0

        @property
        def stopping(self) -> bool:
            self.polls += 1
            if self.polls > 30:
                self.received = signal.SIGTERM
            return self.received is not None

    expected = build(tmp_path / "whole", GOOD * 50)
    settings = DataSettings(
        text_file=(str(tmp_path / "whole" / "text0.txt"),),
        shard_size=1024,
        data_dir=str(tmp_path / "d"),
    )
    with pytest.raises(PreflightError, match="what is done is kept") as caught:
        prepare_data(settings, GPT2, StopSoon(), block_bytes=1000, n_workers=0)
    assert caught.value.code == ExitCode.SIGTERM
    assert not list((tmp_path / "d").rglob(".tmp-*"))
    shutil.copytree(tmp_path / "d", tmp_path / "damaged")
    data = prepare_data(settings, GPT2, block_bytes=1000, n_workers=0)
    assert "resuming at shard" in capsys.readouterr().err
    assert hash_tree(data.path) == hash_tree(expected.path)

    kept = next((tmp_path / "damaged").rglob("shard_00000.npy"))  # what was kept went bad
    kept.write_bytes(kept.read_bytes()[:-1])
    settings = dataclasses.replace(settings, data_dir=str(tmp_path / "damaged"))
    data = prepare_data(settings, GPT2, block_bytes=1000, n_workers=0)
    assert "resuming" not in capsys.readouterr().err
    assert hash_tree(data.path) == hash_tree(expected.path)


def test_full_disk_is_told_of_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "free_bytes", lambda path: 100)
    with pytest.raises(PreflightError) as caught:
        build(tmp_path, GOOD)
    assert caught.value.code == ExitCode.STORAGE


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL of the parent leaves no process behind."""
    source = tmp_path / "text.txt"
    source.write_text(GOOD * 4000)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from preflight.corpus import build\nfrom preflight.settings import DataSettings\n"
        "from preflight.tokenization import load_tokenizer\n"
        "if __name__ == '__main__':\n"
        f"    build.prepare_data(DataSettings(text_file=({str(source)!r},), shard_size=2000,\n"
        f"        data_dir={str(tmp_path / 'd')!r}), load_tokenizer('gpt2'),\n"
        "        block_bytes=5000, n_workers=2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not list((tmp_path / "d").rglob("shard_*.npy")):
        time.sleep(0.02)
    children = [int(pid) for pid in _list_children(process.pid)]
    assert process.poll() is None
    assert children
    process.kill()
    process.wait()
    while time.monotonic() < deadline and any(_is_alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in children)


def _list_children(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from path.read_text().split()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
