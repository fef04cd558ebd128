"""Data sets of the hub, read by the real client from a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus.forks import Fork
from corpus.sources.hub_server import COMMIT, Fault, HubServer

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources import hub, hub_client, parquet_rows
from preflight.corpus.sources import hub_read_ahead as read_ahead
from preflight.corpus.sources.hub_client import Patience
from preflight.corpus.sources.hub_files import HubFile, choose_files
from preflight.corpus.sources.rows import Batch
from preflight.settings import DataSettings

REPO = "someone/pages"
QUICK = Patience(reach=1.0, stall=0.5, total=3.0, first_pause=0.02, longest_pause=0.1)
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
---
# Pages
"""


def make_rows(file: int, n: int = 230) -> list[str | None]:
    chance = random.Random(file)
    return [
        None
        if chance.random() < 0.02
        else f"{file} {i} Möwe 🐦 " + chance.randbytes(chance.randrange(400)).hex()
        for i in range(n)
    ]


def make_parquet(texts: list[str | None], group_rows: int = 50) -> bytes:
    """With a column that nothing reads and that is far larger than the text."""
    noise = np.random.default_rng(len(texts))
    table = pa.table(
        {
            "fat": [noise.bytes(2_000) for _ in texts],
            "text": texts,
            "score": [i / len(texts) for i in range(len(texts))],
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=group_rows)
    return out.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    train = {f"data/train-0000{i}.parquet": make_parquet(make_rows(i)) for i in range(3)}
    return {"README.md": CARD, **train}


EXPECTED = [text for i in range(3) for text in make_rows(i)]


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 6_000)
    monkeypatch.setattr(parquet_rows, "_STEP_BYTES", 2_000)
    monkeypatch.setattr(read_ahead, "_BLOCK_BYTES", 2**12)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(REPO, dict(files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def open_source(patience: Patience = QUICK, **flags: Any) -> hub.HubSource:
    name = flags.pop("source", f"hf:{REPO}")
    (source,) = hub.find(None, DataSettings(source=name, **flags)) or []
    source._patience = patience
    return source


def read_items(source: hub.HubSource, after: Any = None) -> list[tuple[int, Any, list[str | None]]]:
    """First row, `after` and texts of each batch."""
    found = []
    for item in source.batches(after):
        if isinstance(item, Batch):
            texts = [row.text for row in source.parse(item.payload, item.first_row)]
            found.append((item.first_row, json.loads(json.dumps(item.after)), texts))
        else:
            found.append((item.row, item.after, [b"".join(item.document).decode()]))
    return found


def read_texts(source: hub.HubSource, after: Any = None) -> list[str | None]:
    return [text for _, _, texts in read_items(source, after) for text in texts]


def expect_error(*words: str, source: hub.HubSource | None = None) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        read_texts(source or open_source())
    assert len(caught.value.lines) <= 5
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_rows_are_exact_and_in_order(server: HubServer, workers: int) -> None:
    source = open_source(workers=workers)
    facts = source.scan(None)
    items = read_items(source)
    assert [text for item in items for text in item[2]] == EXPECTED
    assert [item[0] for item in items] == [
        sum(len(texts) for _, _, texts in items[:i]) for i in range(len(items))
    ]
    assert len(items) > 25
    parquet = [content for name, content in server.files.items() if name.endswith("parquet")]
    assert facts.size == sum(map(len, parquet))
    assert sum(item.n_bytes for item in source.batches()) == facts.size
    assert COMMIT in facts.notes[0]


def test_workers_read_at_once_and_within_their_number(server: HubServer) -> None:
    server.pause = 0.03
    source = open_source(workers=4)
    assert read_texts(source) == EXPECTED
    assert 3 <= server.most_running <= 5  # and the next file's footer


@pytest.mark.parametrize("every", [15, pytest.param(4, marks=pytest.mark.slow)])
def test_it_resumes_behind_every_batch(server: HubServer, every: int, full: bool) -> None:
    every = 1 if full else every
    source = open_source()
    items = read_items(source)
    for i, (_, after, _) in enumerate(items):
        if i % every and after[1]:  # always at the end of a file
            continue
        rest = read_items(source, after)
        assert rest == items[i + 1 :] or [t for r in rest for t in r[2]] == [
            text for item in items[i + 1 :] for text in item[2]
        ]
        assert not rest or rest[0][0] == items[i + 1][0]


def test_only_the_columns_that_are_used_are_transferred(server: HubServer) -> None:
    source = open_source(filter=("score>=0.5", "absent>1"))
    size = source.scan(None).size
    scores = [
        row.columns
        for item in source.batches()
        for row in source.parse(item.payload, item.first_row)
    ]
    assert scores == [{"score": i / 230} for _ in range(3) for i in range(230)]
    assert server.n_bytes < 0.35 * size  # of it, the footers are the larger part


def test_memory_of_what_is_read_ahead_is_bounded(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "BUDGET_BYTES", 3 * 2**12)
    kept: list[read_ahead.ReadAhead] = []
    build = read_ahead.ReadAhead.__init__

    def note(self: read_ahead.ReadAhead, *args: Any) -> None:
        build(self, *args)
        kept.append(self)

    monkeypatch.setattr(read_ahead.ReadAhead, "__init__", note)
    assert read_texts(open_source(workers=8)) == EXPECTED
    assert 2**12 < kept[0].largest_bytes <= 3 * 2**12


def test_columns_that_drift_apart_neither_block_nor_change_rows(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter's column is far ahead of, or behind, the text: the budget must not lock up."""
    monkeypatch.setattr(read_ahead, "BUDGET_BYTES", 2**13)
    texts: list[str | None] = ["x" * 40_000, *("y" for _ in range(3_000)), "z" * 40_000]
    names = [n for n in server.files if n.endswith("parquet")]
    out = io.BytesIO()
    columns = {"text": texts, "score": np.random.default_rng(0).random(len(texts))}
    pq.write_table(pa.table(columns), out, use_dictionary=False, compression="none")
    server.files = {"README.md": CARD, names[0]: out.getvalue()}
    assert read_texts(open_source(filter=("score>0.5",))) == texts


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 500),
        Fault("status", 502),
        Fault("status", 429, {"Retry-After": "1"}),
        Fault("status", 403),  # of the store, whose signed address has expired
        Fault("stall"),
        Fault("cut"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status}",
)
def test_faults_that_pass_change_nothing(server: HubServer, fault: Fault) -> None:
    server.faults = {3: fault, 9: fault, 10: fault}
    begin = time.monotonic()
    patient = dataclasses.replace(QUICK, total=20.0)  # two pauses may meet the same request
    assert read_texts(open_source(patient)) == EXPECTED
    assert not server.faults
    if fault.headers:
        assert time.monotonic() - begin > 1


def test_the_pause_that_the_hub_asks_for_is_read() -> None:
    assert hub_client._read_pause({"Retry-After": "7"}) == 7
    assert hub_client._read_pause({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert hub_client._read_pause({"RateLimit": '"api";r=0;t=55'}) == 55
    assert hub_client._read_pause({}) is None


def test_what_came_before_the_connection_broke_is_not_asked_for_again(server: HubServer) -> None:
    assert read_texts(open_source()) == EXPECTED
    whole, server.n_bytes = server.n_bytes, 0
    server.faults = {first: Fault("cut") for first in range(server.n_parts + 2, server.n_parts + 9)}
    assert read_texts(open_source()) == EXPECTED
    assert server.n_bytes < whole  # the cut halves are not in this count


def test_a_hub_that_stays_broken_is_given_up_in_time(server: HubServer) -> None:
    source = open_source(Patience(stall=0.3, total=0.6, first_pause=0.02))
    source.scan(None)
    server.always = Fault("stall")
    begin = time.monotonic()
    expect_in_batches(source, "given up after", "the same command continues")
    assert time.monotonic() - begin < 3
    server.always = Fault("status", 429, {"Retry-After": "4000"})
    expect_in_batches(source, "429", "67 min")


def expect_in_batches(source: hub.HubSource, *words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        read_texts(source)
    assert caught.value.code == ExitCode.TEXT
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("kind", ["other_bytes", "whole"])
def test_other_bytes_than_were_asked_for_are_refused(server: HubServer, kind: str) -> None:
    source = open_source()
    source.scan(None)
    server.faults = {server.n_parts + 4: Fault(kind)}
    expect_in_batches(source, "the hub")


def test_damaged_bytes_are_refused_and_what_came_before_is_sound(server: HubServer) -> None:
    source = open_source(workers=1)
    source.scan(None)
    server.faults = {server.n_parts + 6: Fault("damage")}
    texts: list[str | None] = []

    def read_all() -> None:
        for item in source.batches():
            texts.extend(row.text for row in source.parse(item.payload, item.first_row))

    with pytest.raises(PreflightError) as caught:
        read_all()
    assert caught.value.code == ExitCode.TEXT
    assert texts == EXPECTED[: len(texts)]


def test_a_token_that_is_refused_is_told(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    expect_error("gated", "401", "to the token that is set", "hf auth login", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert read_texts(open_source()) == EXPECTED


def test_what_is_not_there_is_named(server: HubServer) -> None:
    expect_error("no such data set", "else", source=open_source(source="hf:someone/else"))
    expect_error("no such revision", "v9", source=open_source(source=f"hf:{REPO}@v9"))
    assert read_texts(open_source(source=f"hf:{REPO}@{COMMIT}")) == EXPECTED
    expect_error("'body'", "fat, text, score", source=open_source(text_column="body"))
    expect_error("holds binary", source=open_source(text_column="fat"))


def test_without_a_network_the_error_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        begin = time.monotonic()
        error = expect_error("cannot be reached", "--text-file", source=open_source(Patience()))
        assert error.code == ExitCode.TEXT
        assert time.monotonic() - begin < 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expect_error("HF_HUB_OFFLINE", source=open_source(Patience()))


def test_names_that_are_none_are_refused_before_anything_is_asked() -> None:
    for name in ("fineweb", "hf:", "hf:a/b/c", "hf:a b", "s3:a/b"):
        with pytest.raises(PreflightError) as caught:
            hub.find(None, DataSettings(source=name))
        assert caught.value.code == ExitCode.FLAGS
    assert hub.find("x.txt", DataSettings(source="hf:a/b")) is None
    assert hub.find(None, DataSettings()) is None


# ---- killed -------------------------------------------------------------------------------------


def write_rows(after: Any, end: int) -> None:
    """A line for each batch, to a pipe."""
    (source,) = hub.find(None, DataSettings(source=f"hf:{REPO}")) or []
    source.scan(None)
    for item in source.batches(after):
        texts = [row.text for row in source.parse(item.payload, item.first_row)]
        os.write(end, json.dumps([item.after, item.first_row, texts]).encode() + b"\n")


@pytest.mark.slow
def test_killed_at_random_moments_no_row_comes_twice_and_none_is_lost(
    server: HubServer, tmp_path: Path
) -> None:
    server.pause = 0.005
    chance, after, texts, kills = random.Random(4), None, [], 0
    while len(texts) < len(EXPECTED):
        begin, end = os.pipe()
        child = Fork(functools.partial(write_rows, after, end), tmp_path / "said")
        os.close(end)
        with open(begin, "rb") as pipe:
            lines = [pipe.readline() for _ in range(chance.randrange(1, 12))]
            child.end(0)
            lines += pipe.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):
                after, first, found = json.loads(line)
                assert first == len(texts)
                texts += found
        kills += 1
        assert kills < 60
    assert texts == EXPECTED
    assert kills >= 4


# ---- which files --------------------------------------------------------------------------------


def choose(
    names: list[str], wanted: str | None = None, card: dict[str, Any] | None = None
) -> list[str]:
    files = [HubFile(name, 1, "") for name in names]
    return [file.path for file in choose_files(files, card or {}, wanted, "hf:a/b").files]


def test_files_are_chosen_by_the_card() -> None:
    card = {
        "configs": [
            {"config_name": "all", "data_files": [{"split": "train", "path": "data/**/*.parquet"}]},
            {
                "config_name": "small",
                "data_files": [
                    {"split": "test", "path": "sample/t*"},
                    {"split": "train", "path": ["sample/1?BT/*", "sample/extra"]},
                ],
            },
            {"config_name": "plain", "data_dir": "more", "data_files": "[ab]*.parquet"},
        ]
    }
    names = [
        *("data/x/1.parquet", "data/2.parquet", "sample/10BT/0.parquet", "sample/10BT/y/0.parquet"),
        *("sample/t.parquet", "sample/extra/9.parquet", "more/a.parquet", "more/c.parquet"),
    ]
    assert choose(names, "all", card) == ["data/2.parquet", "data/x/1.parquet"]
    assert choose(names, "small", card)[0] == "sample/10BT/0.parquet"
    assert choose(names, "small", card)[-1] == "sample/extra/9.parquet"
    assert "sample/10BT/y/0.parquet" not in choose(names, "small", card)
    assert "sample/t.parquet" not in choose(names, "small", card)
    assert choose(names, "plain", card) == ["more/a.parquet"]
    for wanted in (None, "other"):
        with pytest.raises(PreflightError, match="all small plain") as caught:
            choose(names, wanted, card)
        assert caught.value.code == ExitCode.FLAGS


def test_files_are_chosen_by_folders_without_a_card() -> None:
    converted = ["en/train/0000.parquet", "en/test/0000.parquet", "de/train/0000.parquet"]
    assert choose(converted, "en") == ["en/train/0000.parquet"]
    with pytest.raises(PreflightError, match="de en"):
        choose(converted)
    assert choose(["b.parquet", "a.parquet", "x.txt"]) == ["a.parquet", "b.parquet"]
    assert choose(["data/train-1.parquet", "data/test-1.parquet"]) == ["data/train-1.parquet"]
    assert choose(["data/validation-1.parquet"]) == ["data/validation-1.parquet"]
    assert choose(["sample/10BT/1.parquet", "data/1.parquet"], "10BT") == ["sample/10BT/1.parquet"]
    with pytest.raises(PreflightError, match=r"(?s)2 .zst.*refs/convert/parquet") as caught:
        choose(["a.jsonl.zst", "b.jsonl.zst", "README.md"])
    assert caught.value.code == ExitCode.TEXT
