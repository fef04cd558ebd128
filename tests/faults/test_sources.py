"""Damaged and hostile sources through the command line: the reason, the place, and nothing lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from corpus.sources.hub_server import Fault, HubServer

import main
from preflight.core.errors import ExitCode
from preflight.corpus.data_report import JSON_NAME

from .harness import find_message_faults, hash_tree

FLAGS = ("--tokenizer", "byte", "--num-workers", "1", "--data-dir", "data")
ROWS = [f"row {i} with some words that are its own {i * i}" for i in range(400)]
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(ROWS)).encode()
CSV = b"id,text\n" + b"".join(b"%d,%s\n" % (i, text.encode()) for i, text in enumerate(ROWS))
PAGE = (
    "<page><title>T{0}</title><ns>0</ns><id>{0}</id><revision><id>1</id>"
    "<text>Some '''words''' of article {0}.</text></revision></page>\n"
)
DUMP = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n'
    + "".join(PAGE.format(i) for i in range(300))
    + "</mediawiki>\n"
).encode()
Refuse = Callable[..., None]


def make_parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=100)
    return file.getvalue()


PARQUET = make_parquet(id=list(range(400)), text=ROWS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data folder that must stay as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("a line of text\n" * 60)
    assert main.main(["--prepare", *FLAGS, "--text-file", "good.txt"]) == 0
    return tmp_path


@pytest.fixture
def refuse(place: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run `--prepare`, which must be refused for the reason in `words`."""

    def run(name: str, content: bytes, words: str, *more: str, code: int = ExitCode.TEXT) -> None:
        (place / name).write_bytes(content)
        before = hash_tree(place / "data")
        capsys.readouterr()
        assert main.main(["--prepare", *FLAGS, "--text-file", name, *more]) == code
        assert find_message_faults(capsys.readouterr().err, words) == ""
        behind = hash_tree(place / "data")
        assert {k: v for k, v in behind.items() if ".building" not in k} == before

    return run


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("inner", ["jsonl", "csv", "txt", "xml"])
def test_compressed_files_that_are_cut_off(refuse: Refuse, kind: str, inner: str) -> None:
    plain = {"jsonl": JSONL, "csv": CSV, "txt": "\n".join(ROWS).encode(), "xml": DUMP}[inner]
    packed = PACKERS[kind](plain)
    refuse(f"a.{inner}.{kind}", packed[: len(packed) * 2 // 3], f"a.{inner}.{kind}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", PARQUET[:-40], "a.parquet"),
        ("a.parquet", PARQUET[:3000] + bytes(500) + PARQUET[3500:], "a.parquet"),
        ("a.parquet", make_parquet(title=ROWS, name=ROWS), "title"),
        ("a.parquet", make_parquet(text=list(range(400))), "int64"),
        ("a.jsonl", JSONL.replace(b'"text"', b'"a": "b", "words"'), "words"),
        ("a.jsonl", JSONL + b'{"text": "half \\ud800"}\n', "401"),
        ("a.jsonl", JSONL + b'{"text": "no end\n', "401"),
        ("a.jsonl", JSONL + b'{"text": null}\n' * 9, "9 of 409 rows hold no text"),
        ("a.jsonl", JSONL + b'{"text": NaN}\n' * 9, "9 of 409 rows hold no text"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "UTF-16"),
        ("a.json", b'[{"text": "one"}, {"text": "two"', "a.json"),
        ("a.csv", CSV.replace(b"id,text", b"id,words"), "words"),
        ("a.xml", DUMP[: len(DUMP) // 2], "page"),
        ("a.xml", DUMP.replace(b"T250<", b"T250&nothing;<"), "250"),
        ("a.txt.gz", gzip.compress(b"a" * 200 * 2**20), "a.txt.gz"),
        ("a.jsonl", b"", "a.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files(refuse: Refuse, name: str, content: bytes, words: str) -> None:
    refuse(name, content, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--text-column", "body"), '"id", "text"'),
        (("--filter", "gofer_quality"), "gopher_quality"),
        (("--filter", "gopher_quality.words=3"), "min_words"),
        (("--mix", "a=0.7", "b=0.3"), "--mix b"),
        (("--mix", "a=2"), "--mix"),
        (("--clean", "latex"), "--clean"),
        (("--source", "fineweb"), "hf:"),
        (("--val-file", "nowhere.txt"), "nowhere.txt"),
        (("--filter", "score>0.5"), "empty"),
    ],
)
def test_mistakes_in_flags(refuse: Refuse, flags: tuple[str, ...], words: str) -> None:
    code = ExitCode.TEXT if flags[0] in ("--text-column", "--val-file") else ExitCode.FLAGS
    code = ExitCode.TEXT if flags[-1] == "score>0.5" else code
    refuse("a.jsonl", JSONL, words, *flags, code=code)


def test_null_rows_are_left_out_when_they_may_be(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "a.jsonl").write_bytes(JSONL + b'{"text": null}\n' * 9)
    flags = ["--text-file", "a.jsonl", "--allow-bad-rows", "--json"]
    assert main.main(["--prepare", *FLAGS, *flags]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert (totals["n_rows"], totals["n_bad_rows"], totals["n_kept"]) == (409, 9, 400)


def test_ids_outside_the_vocabulary(refuse: Refuse) -> None:
    file = io.BytesIO()
    np.save(file, np.array([1, 2, 300] * 50, np.uint16))
    refuse("ids.npy", file.getvalue(), "300")


# ---- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub_flags(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    def build(url: str) -> list[str]:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        return ["--prepare", *FLAGS, "--source", "hf:someone/pages"]

    return build


def test_a_hub_that_cannot_be_reached(
    hub_flags: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        flags = hub_flags(f"http://127.0.0.1:{unused.getsockname()[1]}")
    began = time.monotonic()
    assert main.main(flags) == ExitCode.TEXT
    assert time.monotonic() - began < 3
    assert find_message_faults(capsys.readouterr().err, "hf:someone/pages") == ""


@pytest.mark.parametrize(("status", "words"), [(401, "token"), (403, "token"), (404, "pages")])
def test_a_hub_that_refuses(
    hub_flags: Callable[[str], list[str]],
    capsys: pytest.CaptureFixture[str],
    status: int,
    words: str,
) -> None:
    with HubServer("someone/pages", {"data/a.parquet": PARQUET}) as server:
        server.always = Fault("status", status)
        assert main.main(hub_flags(server.url)) == ExitCode.TEXT
    assert find_message_faults(capsys.readouterr().err, words) == ""


def test_a_stream_from_the_hub_is_what_the_file_holds(
    place: Path, hub_flags: Callable[[str], list[str]]
) -> None:
    (place / "b.parquet").write_bytes(PARQUET)
    with HubServer("someone/pages", {"data/a.parquet": PARQUET}) as server:
        assert main.main(hub_flags(server.url)) == 0
    local = ["--text-file", "b.parquet", "--data-dir", "local"]
    assert main.main(["--prepare", *FLAGS[:-2], *local]) == 0
    for name in ("train/shard_00000.npy", "val/shard_00000.npy"):
        assert (place / "data" / name).read_bytes() == (place / "local" / name).read_bytes()
    assert json.loads((place / "data" / JSON_NAME).read_text())["totals"]["n_kept"] == 400
