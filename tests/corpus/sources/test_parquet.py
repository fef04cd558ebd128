"""Parquet files as rows; pyarrow's own table of the whole file is the oracle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources import parquet, parquet_rows
from preflight.corpus.sources.parquet_layout import choose_text_column, find_filter_columns
from preflight.corpus.sources.rows import Batch, LongRow, Row
from preflight.settings import DataSettings

ROOT = Path(parquet.__file__).parents[3]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 700)
    monkeypatch.setattr(parquet_rows, "_STEP_BYTES", 300)
    monkeypatch.setattr(parquet_rows, "MAX_ROW_BYTES", 5_000)


def make_texts(n: int = 400) -> list[str | None]:
    chance = random.Random(n)
    texts: list[str | None] = [
        chance.choice([None, "", "ä🐦", "word " * chance.randrange(60)]) for _ in range(n)
    ]
    texts[n // 3] = "long Möwe " * 2_000
    return texts


def write(path: Path, column: Any, name: str = "text", rows: int = 90, **options: Any) -> Path:
    others = {"id": range(len(column)), "score": [i / 7 for i in range(len(column))]}
    pq.write_table(pa.table({**others, name: column}), path, row_group_size=rows, **options)
    return path


def open_source(path: Path, **flags: Any) -> parquet.ParquetSource:
    (source,) = parquet.find(str(path), DataSettings(**flags)) or []
    return source


def read_item(source: parquet.ParquetSource, item: Batch | LongRow) -> list[Row]:
    if isinstance(item, LongRow):
        return [Row(b"".join(item.document).decode())]
    payload, parse = pickle.loads(pickle.dumps((item.payload, source.parse)))
    return list(parse(payload, item.first_row))


def read_texts(source: parquet.ParquetSource, after: Any = None) -> list[str | None]:
    return [row.text for item in source.batches(after) for row in read_item(source, item)]


def expect_error(path: Path, *words: str, code: int = ExitCode.TEXT, **flags: Any) -> None:
    def read() -> None:
        source = open_source(path, **flags)
        source.scan(None)
        read_texts(source)

    with pytest.raises(PreflightError) as caught:
        read()
    assert caught.value.code == code
    assert len(caught.value.lines) <= 5
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


# ---- rows ---------------------------------------------------------------------------------------

KINDS = {
    "string": lambda texts: pa.array(texts),
    "large": lambda texts: pa.array(texts, pa.large_string()),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "chunks": lambda texts: pa.chunked_array([texts[:7], texts[7:]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_rows_are_those_of_the_table(tmp_path: Path, kind: str, version: str) -> None:
    texts = make_texts()
    path = write(tmp_path / "a.parquet", KINDS[kind](texts), data_page_version=version)
    source = open_source(path)
    facts = source.scan(None)
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.size == path.stat().st_size
    assert read_texts(source) == pq.read_table(path)["text"].to_pylist() == texts
    items = list(source.batches())
    assert sum(isinstance(item, LongRow) for item in items) == 1
    assert len(items) > 15
    sizes = [item.n_bytes if isinstance(item, Batch) else item.n_bytes() for item in items]
    assert sum(sizes) == facts.size


def test_it_resumes_behind_every_batch(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.parquet", make_texts()))
    items = list(source.batches())
    texts, numbers = [], []
    for item in items:
        numbers.append(item.first_row if isinstance(item, Batch) else item.row)
        assert numbers[-1] == len(texts)
        texts += [row.text for row in read_item(source, item)]
        after = json.loads(json.dumps(item.after))
        assert read_texts(source, after) == make_texts()[len(texts) :]


def test_it_resumes_at_any_row(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.parquet", make_texts()))
    for row in (1, 2, 37, 89):
        assert read_texts(source, [2, row]) == make_texts()[180 + row :]


def test_filters_see_the_columns_that_they_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_texts())
    source = open_source(path, filter=("score>=0.65", "c4", "id<5", "absent==1", "min_tokens=3"))
    rows = [row for item in source.batches() for row in read_item(source, item)]
    short = [i for i, text in enumerate(make_texts()) if len(text or "") < 5_000]
    assert [dict(rows[i].columns) for i in short] == [{"score": i / 7, "id": i} for i in short]
    rules = ("a b>=1", "x!=2", "c4", "n=3", "x<1")
    assert find_filter_columns(rules) == ("a b", "x")


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=30), st.just("é" * 3_000)), max_size=60),
    st.integers(1, 70),
)
def test_any_rows_in_any_row_groups(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], rows: int
) -> None:
    path = tmp_path_factory.mktemp("p") / "a.parquet"
    source = open_source(write(path, pa.array(texts, pa.string()), rows=rows))
    assert read_texts(source) == texts
    assert read_texts(source, [len(texts) // rows, 0]) == texts[len(texts) // rows * rows :]


def test_a_dictionary_that_repeats_long_values_is_read_in_smaller_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 times one value: each row counts its length, while the file holds it once."""
    monkeypatch.setattr(parquet_rows, "_EXCESS_BYTES", 20_000)
    texts: list[str | None] = ["x" * 4_000 + str(i % 2) for i in range(1_000)]
    source = open_source(write(tmp_path / "a.parquet", texts, rows=1_000))
    assert source.scan(None).size < 40_000
    most = 0
    for item in source.batches():
        assert isinstance(item, Batch)
        most = max(most, len(item.payload.ends) // 8)
    assert read_texts(source) == texts
    steps = [len(t.ends) // 8 for t in read_parts(source.path)]
    assert max(steps[3:]) < 6
    assert sum(steps) == 1_000


def read_parts(path: Path) -> Iterator[parquet_rows.Texts]:
    opened = pq.ParquetFile(path)
    layout = parquet.read_layout(opened, path.stat().st_size, DataSettings(), "a")
    yield from parquet_rows.read_group(lambda: pq.ParquetFile(path), layout, 0, 0)


# ---- the column ---------------------------------------------------------------------------------


def test_the_text_column_is_guessed_told_and_refused(tmp_path: Path) -> None:
    assert choose_text_column(["Body", "text"], None, "a") == "text"
    assert choose_text_column(["id", "Body"], None, "a") == "Body"
    assert choose_text_column(["only"], None, "a") == "only"
    assert choose_text_column(["x", "text"], "x", "a") == "x"
    path = write(tmp_path / "a.parquet", ["a", "b"], name="content")
    assert "'content'" in open_source(path).scan(None).notes[0]
    assert open_source(path, text_column="content").scan(None).notes == ()
    expect_error(path, "no column 'body'", "id, score, content", text_column="body")
    expect_error(path, "'score' holds double", text_column="score")
    odd = write(tmp_path / "b.parquet", ["a", "b"], name="odd")
    expect_error(odd, "no column with a usual name", "id, score, odd", "--text-column")
    lists = write(tmp_path / "c.parquet", [["a"], ["b"]])
    expect_error(lists, "'text' holds list")


def test_what_is_no_parquet_file_is_left_to_others(tmp_path: Path) -> None:
    flags = DataSettings()
    (tmp_path / "folder.parquet").mkdir()
    for name in ("folder.parquet", "absent.parquet", "a.txt"):
        assert parquet.find(str(tmp_path / name), flags) is None
    assert parquet.find(None, flags) is None


def test_without_arrow_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    expect_error(path, "pip install pyarrow", code=ExitCode.FLAGS)


# ---- damage -------------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    for long, row in ((b"", 130), (b"x" * 600_000, 131)):
        column = [b"fine"] * 200
        column[row] = long + b"caf\xe9 au lait"
        array = pa.array(column, pa.binary()).cast(pa.string(), safe=False)
        array = pa.Array.from_buffers(pa.string(), 200, pa.array(column, pa.binary()).buffers())
        path = write(tmp_path / "a.parquet", array)
        place = f"row {row - 90} in row group 1 (row {row} of all)"
        expect_error(path, "byte 0xe9", f"offset {len(long) + 3:,}", place)


@pytest.mark.parametrize("kept", [0, 3, 11, 5_000, -1, -8])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "a.parquet", make_texts(), compression="none")
    path.write_bytes(path.read_bytes()[:kept])
    expect_error(path, "footer is missing" if kept > 3 or kept < 0 else "")


def test_a_damaged_row_group_is_named_and_what_is_before_it_is_sound(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet", make_texts(), write_page_checksum=True, use_dictionary=False
    )
    column = pq.ParquetFile(path).metadata.row_group(2).column(2)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 4] ^= 255
    path.write_bytes(content)
    expect_error(path, "row group 2 of 5 is damaged", "the 180 rows before it are sound")
    source, texts = open_source(path), []

    def read() -> None:
        for item in source.batches():
            texts.extend(row.text for row in read_item(source, item))

    with pytest.raises(PreflightError):
        read()
    assert texts == make_texts()[:180]


def test_any_flipped_byte_is_an_error_or_changes_no_more_than_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_texts(120), write_page_checksum=True)
    sound, chance, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        content = bytearray(sound)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        source = open_source(path)
        try:
            source.scan(None)
            read_texts(source)
        except PreflightError as error:
            assert error.code == ExitCode.TEXT
            refused += 1
    assert refused > 12


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_texts())
    source = open_source(path)
    source.scan(None)
    batches = source.batches()
    next(batches)
    os.utime(path, ns=(1, 1))
    with pytest.raises(PreflightError, match="changed while it was being read"):
        list(batches)
    source = open_source(path)
    source.scan(None)
    write(tmp_path / "b.parquet", make_texts()).replace(path)
    with pytest.raises(PreflightError, match="changed while it was being read"):
        next(source.batches())


def test_the_scan_stops_when_it_is_told_to(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.parquet", make_texts()))
    stop = StopFlag()
    stop.received = 2
    with pytest.raises(PreflightError) as caught:
        source.scan(stop)
    assert caught.value.code == ExitCode.SIGINT


# ---- memory -------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from preflight.corpus.sources import parquet
from preflight.settings import DataSettings
import pyarrow.parquet
(source,) = parquet.find(sys.argv[1], DataSettings())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(len(item.payload.data) for item in source.batches())
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(3_000))
    column = [f"{i} {text}" for i in range(100_000)]  # 300 MB in one row group
    path = write(tmp_path / "a.parquet", column, rows=200_000, compression="none")
    del column
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, cwd=ROOT, check=True
    )
    n_bytes, megabytes = map(int, output.stdout.split())
    assert n_bytes > 300_000_000
    assert megabytes < 120  # Arrow's defaults take more than 300
