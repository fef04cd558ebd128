"""Compressed text files are texts: the documents, the splits and the faults of the plain ones."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.build import prepare_data
from preflight.corpus.sources import text
from preflight.corpus.sources.text import TextFile
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


def open_text(path: Path, separator: str | None = None) -> TextFile:
    (source,) = text.find(str(path), DataSettings(document_separator=separator))
    source.scan(None)
    return source


def catch(path: Path, separator: str | None = None) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        open_text(path, separator)
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    return caught.value.lines


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.text(st.sampled_from("<>aé\n"), max_size=12), min_size=1, max_size=8),
    separator=st.sampled_from([None, "<>", "\n", "é"]),
    kind=st.sampled_from(sorted(PACKERS)),
    mark=st.sampled_from(["", "\ufeff"]),
    data=st.data(),
)
def test_documents_are_those_of_the_plain_file(
    tmp_path: Path,
    parts: list[str],
    separator: str | None,
    kind: str,
    mark: str,
    data: st.DataObject,
) -> None:
    plain = (mark + "x" + (separator or "").join(parts)).encode()
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / f"a.txt.{kind}").write_bytes(PACKERS[kind](plain))
    sources = [open_text(tmp_path / name, separator) for name in ("a.txt", f"a.txt.{kind}")]
    whole = [[b"".join(document) for document in source.documents()] for source in sources]
    assert whole[0] == whole[1]
    start = data.draw(st.integers(0, len(whole[0]) - 1))
    offset = data.draw(st.integers(0, len(whole[0][start])))
    rest = [b"".join(document) for document in sources[1].documents(start, offset)]
    assert rest == [whole[0][start][offset:], *whole[0][start + 1 :]]


def test_documents_may_be_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one|two|three"))
    documents = open_text(path, "|").documents()
    next(documents)
    next(documents)
    assert b"".join(next(documents)) == b"three"


@pytest.mark.parametrize("kind", PACKERS)
def test_one_compressed_file_is_shared_out_as_the_plain_one(tmp_path: Path, kind: str) -> None:
    plain = "".join(f"line {i} of it\n" for i in range(3000)).encode()
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / f"b.txt.{kind}").write_bytes(PACKERS[kind](plain))
    found = [
        prepare_data(
            DataSettings(text_file=(str(tmp_path / name),), data_dir=str(tmp_path / f"d-{name}")),
            load_tokenizer("gpt2"),
            n_workers=0,
            block_bytes=5000,
        )
        for name in ("a.txt", f"b.txt.{kind}")
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].val.n_bytes == found[1].val.n_bytes > 1000


def test_what_is_no_utf_8_is_told_by_the_plain_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("é\n".encode() * 100 + b"a\xffb"))
    assert "byte 0xff at offset 301 (line 101)" in catch(path)[0]


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    for data, word in (
        ("abc".encode("utf-16"), "UTF-16"),
        (b"\x7fELF" + bytes(100), "ELF"),
        (b"a\0\1\2" * 100, "NUL"),
        (gzip.compress(b"twice"), "gzip data"),
        (b"", "empty"),
    ):
        path.write_bytes(gzip.compress(data))
        assert word in catch(path)[0]


def test_truncation_and_change(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(bytes(random.Random(0).choices(b"abc def", k=3000)))
    for size in range(1, len(data), 41):
        path.write_bytes(data[:size])
        assert "cut off" in catch(path)[0]
    path.write_bytes(data)
    source = open_text(path)
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(PreflightError, match="changed"):
        next(source.documents())


def test_the_name_says_that_it_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"abc"))
    lines = catch(tmp_path / "c.txt")
    assert "gzip data, not text" in lines[0]
    assert "let its name end in .gz" in lines[1]
