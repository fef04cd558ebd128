"""Files of chats: every kind gives the same chats, and every fault is told with its place."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.chats.reading import open_chat_file, read_chats
from preflight.corpus.sources import rows

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}: \u6f22\u5b57 \U0001f600 \u0000"},
            {"role": "assistant", "content": f"Answer {i}"},
        ]
    }
    for i in range(1000)
]


def write_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=300)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": write_lines,
    "marked.ndjson": lambda rows: b"\xef\xbb\xbf" + write_lines(rows),
    "blank.jsonl": lambda rows: b"".join(b"\n" + write_lines([row]) for row in rows),
    "a.jsonl.gz": lambda rows: gzip.compress(write_lines(rows)),
    "a.jsonl.zst": lambda rows: zstd.compress(write_lines(rows)),
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "a.json.bz2": lambda rows: bz2.compress(json.dumps(rows).encode()),
    "inside.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "lines.json": write_lines,
    "a.parquet": write_parquet,
}


def read_all(path: Path) -> list[tuple[str, str, Any, int]]:
    """Form, place, messages and stored bytes of each row."""
    file = open_chat_file(path)
    file.scan(None)
    return [
        (form.name, found.chat.place, found.chat.messages, found.n_bytes)
        for form, found in read_chats(file)
    ]


def fail(path: Path) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        read_all(path)
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    assert len(caught.value.lines) <= 5
    return caught.value


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)  # many batches
    path = tmp_path / name
    path.write_bytes(KINDS[name](ROWS))
    found = read_all(path)
    unit = "row" if name in ("a.json", "a.json.bz2", "inside.json", "a.parquet") else "line"
    numbers = range(2, 2 * len(ROWS) + 1, 2) if name == "blank.jsonl" else range(1, len(ROWS) + 1)
    assert [place for _, place, _, _ in found] == [f"{name}, {unit} {n:,}" for n in numbers]
    for row, (form, _, messages, _) in zip(ROWS, found, strict=True):
        assert form == "OpenAI messages"
        assert [{"role": m.role, "content": m.content} for m in messages] == row["messages"]
    n_bytes = sum(n for *_, n in found)
    assert 0.9 * path.stat().st_size <= n_bytes <= path.stat().st_size


LINES = write_lines(ROWS[:3])
SOUND = b'{"conversations": ["a", "b"]}\n'
FAULTS: list[tuple[str, bytes, str]] = [
    ("a.jsonl", LINES + b'{"messages": []}\n', "line 4: an empty chat"),
    ("a.jsonl", LINES + b"\n" + SOUND, "line 5: LIMA conversations where OpenAI messages was"),
    ("a.jsonl", LINES + b"{]\n", "row 4 (at byte"),
    ("a.jsonl", LINES + b'{"messages": 1}{}\n', "row 4 (at byte"),
    ("a.jsonl", LINES + b"[1]\n", "line 4: a list instead of an object where"),
    ("a.jsonl", SOUND + b'{"conversations": ["\\ud800", "b"]}', "line 2: message 1 holds half a"),
    ("a.jsonl", SOUND + b'{"conversations": ["\xff", "b"]}', "not UTF-8"),
    (
        "a.jsonl",
        b'{"text": "a"}\n',
        'line 1 is not a chat of a known form: a row with the keys "text"',
    ),
    ("a.jsonl", b"5\n", "line 1 is not a chat of a known form: a number instead of an object"),
    ("a.jsonl", b"", "holds no chat"),
    ("a.jsonl", b"\n\n", "holds no chat"),
    ("a.json", b"[]", "holds no chat"),
    ("a.json", json.dumps([*ROWS[:3], ""]).encode(), "row 4: a text instead of an object"),
    ("a.json", json.dumps([*ROWS[:3], {"messages": 1}]).encode(), 'row 4: "messages" is a number'),
    ("a.json", json.dumps(ROWS[:3]).encode()[:-1], "cut off"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cut off"),
    ("a.jsonl.gz", LINES, "no gzip data"),
    ("a.parquet", write_parquet([{"text": "a"}]), 'no column of a chat; its columns: "text"'),
    ("a.parquet", write_parquet([{"prompt": "a"}]), "row 1 is not a chat of a known form"),
    ("a.parquet", write_parquet(ROWS)[:-1], "cut off"),
    ("a.parquet", write_parquet([]), "no column of a chat"),
    ("a.txt", b"", "not a file of chats by its name"),
    ("a.parquet.gz", b"", "not a file of chats by its name"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_faults(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in str(fail(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz"])
def test_missing_and_no_file(tmp_path: Path, name: str) -> None:
    fail(tmp_path / name)
    (tmp_path / name).mkdir()
    fail(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_all_faults_are_counted(tmp_path: Path, name: str) -> None:
    """By their own numbers, across row groups, the first three; no more than five lines."""
    bad: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"} for _ in range(1000)]
    for number in (7, 301, 302, 650, 999):
        bad[number]["completion"] = ""
    (tmp_path / name).write_bytes(KINDS[name](bad))
    unit = "line" if name == "a.jsonl" else "row"
    assert fail(tmp_path / name).lines == [
        f"{tmp_path / name}: {unit} 8: message 2 is an empty answer; a text was expected",
        f"{unit} 302: message 2 is an empty answer; a text was expected",
        f"{unit} 303: message 2 is an empty answer; a text was expected",
        "5 of 1,000 rows cannot be used; correct them, or leave them out",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_long_row(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chat above the limit is refused by its number, wherever its bytes are."""
    for module in ("sources.rows", "chats.reading"):
        monkeypatch.setattr(f"preflight.corpus.{module}.MAX_ROW_BYTES", 50_000)
    long = [{"prompt": "a", "completion": "b" * n} for n in (10, 40_000, 60_000, 10)]
    (tmp_path / name).write_bytes(KINDS[name](long[:2]))
    assert len(read_all(tmp_path / name)) == 2
    (tmp_path / name).write_bytes(KINDS[name](long))
    message = str(fail(tmp_path / name))
    assert "row 3" in message
    assert "more than 48.8 KiB in one chat" in message


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    content = bytearray(write_parquet(ROWS))
    content[2000] ^= 4
    (tmp_path / "a.parquet").write_bytes(content)
    assert "damaged" in str(fail(tmp_path / "a.parquet"))


def test_parquet_that_is_no_utf8(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["a", "b"], "completion": broken})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "damaged behind row" in str(fail(tmp_path / "a.parquet"))
