"""Every kind of source: the ids of each document, and the same shards after any number of kills."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from corpus.forks import Fork, fork_build
from corpus.sources.hub_server import HubServer
from corpus.test_rows import hash_tree, read_ids

from preflight.corpus.build import prepare_data
from preflight.corpus.split import is_validation
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer

GPT2 = load_tokenizer("gpt2")
N_KILLS = 6
WORDS = "the quick brown f\u00f6x jumps over 12 lazy dogs\n and sleeps \u6f22\u5b57".split(" ")


def draw_texts(n: int) -> list[str]:
    draw = random.Random(7)
    return [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randrange(20, 400))) for i in range(n)]


TEXTS = draw_texts(4000)


def make_csv() -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([["id", "text"], *enumerate(TEXTS)])
    return file.getvalue().encode()


def make_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), file, row_group_size=150)
    return file.getvalue()


def make_dump() -> bytes:
    pages = [
        f"<page><title>T{i}</title><ns>0</ns><id>{i}</id><revision><id>1</id>"
        f"<text>{text}</text></revision></page>\n"
        for i, text in enumerate(TEXTS)
    ]
    streams = [pages[i : i + 100] for i in range(0, len(pages), 100)]
    head = b'<mediawiki version="0.11" xml:lang="en">\n'
    middle = b"".join(bz2.compress("".join(stream).encode()) for stream in streams)
    return bz2.compress(head) + middle + bz2.compress(b"</mediawiki>\n")


def make_ids() -> bytes:
    ids = [i for text in TEXTS for i in (*GPT2.encoding.encode_ordinary(text), 50256)]
    return np.array(ids, np.uint16).tobytes()


def make_jsonl() -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)
    ).encode()


SOURCES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": make_jsonl,
    "a.jsonl.zst": lambda: b"".join(
        zstd.compress(make_jsonl()[i : i + 2**18]) for i in range(0, len(make_jsonl()), 2**18)
    ),
    "a.json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "a.csv.xz": lambda: lzma.compress(make_csv(), preset=0),
    "a.parquet": make_parquet,
    "a.xml.bz2": make_dump,
    "a.txt.gz": lambda: gzip.compress("\x1e".join(TEXTS).encode(), 1),
    "a.bin": make_ids,
    "hub": make_parquet,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_killed_again_and_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"shard_size": 100_000, "clean": "none"}
    content = SOURCES[name]()
    with HubServer("someone/pages", {"data/a.parquet": content}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        if name == "hub":
            values["source"] = "hf:someone/pages"
        else:
            (tmp_path / name).write_bytes(content)
            values["text_file"] = (str(tmp_path / name),)
        if name == "a.txt.gz":
            values["document_separator"] = "\x1e"
        whole, cut = (
            DataSettings(**values, data_dir=str(tmp_path / folder)) for folder in ("whole", "cut")
        )
        seconds = run_to_the_end(whole)
        # Killed before half of what an unbroken run takes: the first never comes to the end.
        n_killed = kill_until_done(cut, name, seconds / 2)
    assert n_killed >= 1
    assert hash_tree(tmp_path / "cut") == hash_tree(tmp_path / "whole")
    check_ids(tmp_path / "whole", name)


def start(settings: DataSettings) -> Fork:
    return fork_build(settings, GPT2, Path(f"{settings.data_dir}.said"), save_seconds=0.02)


def run_to_the_end(settings: DataSettings) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    assert start(settings).end()
    return time.monotonic() - began


def kill_until_done(settings: DataSettings, name: str, most_seconds: float) -> int:
    """How often it was killed, each time after at most so many seconds."""
    draw = random.Random(name)
    for n_killed in range(N_KILLS):
        if start(settings).end(draw.uniform(0.05, 1) * most_seconds):
            return n_killed
    run_to_the_end(settings)
    return N_KILLS


def check_ids(folder: Path, name: str) -> None:
    """Each document encoded in one piece, with the end of the text behind it."""
    data = prepare_data(DataSettings(data_dir=str(folder)), GPT2)
    if name == "a.bin":
        ids = read_ids(data, "train") + read_ids(data, "val")
        assert np.array(ids, np.uint16).tobytes() == make_ids()
        return
    for split in ("train", "val"):
        expected: list[int] = []
        for number, text in enumerate(TEXTS):
            if is_validation(number, 0.05) == (split == "val"):
                shown = f"T{number}\n\n{text}" if name == "a.xml.bz2" else text
                expected += [*GPT2.encoding.encode_ordinary(shown), GPT2.end_of_text_id]
        assert read_ids(data, split) == expected
    assert os.path.exists(folder / "data_report.html")
