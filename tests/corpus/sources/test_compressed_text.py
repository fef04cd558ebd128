"""Compressed text files as sources of rows. The oracle: `bytes.split` of the plain text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources import rows, text
from preflight.corpus.sources.compressed_text import CompressedText
from preflight.corpus.sources.rows import LongRow
from preflight.corpus.sources.text import TextFile
from preflight.settings import DataSettings


def open_text(path: Path, separator: str | None = None) -> CompressedText:
    (source,) = text.find(str(path), DataSettings(document_separator=separator))
    assert isinstance(source, CompressedText)
    source.scan(None)
    return source


def read_texts(source: CompressedText, after: Any = None) -> list[tuple[int, str, Any]]:
    """Number and text of each document, and `after` of its batch."""
    found = []
    for item in source.batches(after):
        if isinstance(item, LongRow):
            found.append((item.row, b"".join(item.document).decode(), item.after))
        else:
            texts = [row.text or "" for row in source.parse(item.payload, item.first_row)]
            found += [(i, its, item.after) for i, its in enumerate(texts, item.first_row)]
    return found


def catch(path: Path, separator: str | None = None) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        read_texts(open_text(path, separator))
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    return caught.value.lines


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.text(st.sampled_from("<>aé\n"), max_size=12), min_size=1, max_size=8),
    separator=st.sampled_from([None, "<>", "<<>", "\n", "é"]),
    batch=st.sampled_from([1, 3, 20, 10**6]),
    long=st.sampled_from([4, 15, 10**6]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_documents_equal_split(tmp_path, monkeypatch, parts, separator, batch, long, mark):
    monkeypatch.setattr(rows, "BATCH_BYTES", batch)
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", long)
    plain = (separator or "").join(parts)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress((mark + plain).encode()))
    source = open_text(path, separator)
    expected = plain.split(separator) if separator else [plain]
    expected = expected if expected[-1] else expected[:-1]
    found = read_texts(source)
    assert [(number, its) for number, its, _ in found] == list(enumerate(expected))
    for i, (_, _, after) in enumerate(found):
        if i + 1 == len(found) or found[i + 1][2] != after:
            rest = read_texts(source, json.loads(json.dumps(after)))
            assert [its[:2] for its in rest] == [its[:2] for its in found[i + 1 :]]


def test_a_long_document_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**16)
    plain = "".join(random.Random(0).choices("abcé\U0001f600 \n", k=100_000))
    for name, pack in (("a.txt.bz2", bz2.compress), ("b.md.xz", lzma.compress)):
        path = tmp_path / name
        path.write_bytes(pack(plain.encode()))
        items = open_text(path).batches()
        item = next(items)
        assert isinstance(item, LongRow)
        chunks = list(item.document)
        is_equal = b"".join(chunks) == plain.encode()  # pytest would compare for minutes
        assert is_equal
        assert next(items, None) is None
        assert max(map(len, chunks)) < 2**16 + 100
        assert item.n_bytes() == path.stat().st_size


@pytest.mark.parametrize("long", [2**24, 50])
@pytest.mark.parametrize("separator", [None, "|"])
def test_what_is_no_utf_8_is_told_by_the_plain_offset(tmp_path, monkeypatch, long, separator):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("é|".encode() * 100 + b"a\xffb|c"))
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", long)
    line = catch(path, separator)[0]
    assert "byte 0xff at offset 301 of its plain text" in line
    assert f"row {101 if separator else 1} " in line
    path.write_bytes(gzip.compress("é|".encode() * 100 + b"abc\xc3"))
    assert "byte 0xc3 at offset 303" in catch(path, separator)[0]


def test_what_is_no_text(tmp_path):
    path = tmp_path / "a.txt.gz"
    for data, word in (
        ("abc".encode("utf-16"), "UTF-16"),
        (b"\x7fELF" + bytes(100), "ELF"),
        (bytes(257) + b"ustar\0" + bytes(250), "tar archive"),
        (b"a\0\1\2" * 100, "NUL"),
        (gzip.compress(b"twice"), "gzip data"),
    ):
        path.write_bytes(gzip.compress(data))
        assert word in catch(path)[0]


def test_truncation_and_change(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(bytes(random.Random(0).choices(b"abc def", k=3000)))
    for size in range(1, len(data), 41):
        path.write_bytes(data[:size])
        assert "cut off" in catch(path)[0]
    path.write_bytes(data)
    source = open_text(path)
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(PreflightError, match="changed"):
        read_texts(source)


def test_which_files_are_compressed_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"abc"))
    (tmp_path / "b.txt").write_text("abc")
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"abc"))
    found = text.find(str(tmp_path), DataSettings())
    assert [type(source) for source in found] == [CompressedText, TextFile, TextFile]
    assert all(source.is_skippable for source in found)
    assert found[0].name == f"{tmp_path.name}/a.txt.gz"
    with pytest.raises(PreflightError) as caught:
        found[2].scan(None)
    assert "gzip data, not text" in caught.value.lines[0]
    assert "let its name end in .gz" in caught.value.lines[1]
