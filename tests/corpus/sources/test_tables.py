"""Tables as sources of rows. The oracles: `json.loads` of each row and `csv.reader` of a file."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources import rows, tables
from preflight.corpus.sources.csv_rows import CsvSplitter, read_one_field
from preflight.corpus.sources.rows import LongRow, Row, RowSource
from preflight.settings import DataSettings

TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ['a "b" \\ c', "line\nbreak\r\n", "\U0001f600 é", '\\"', "{[,]}", "", "x" * 300]
)
CELL = st.none() | st.integers() | st.floats(allow_nan=False) | st.booleans() | TEXT
VALUE = st.recursive(CELL, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
OBJECT = st.fixed_dictionaries(
    {"text": TEXT},
    optional={"score": CELL, "other": VALUE, "deep": st.fixed_dictionaries({"t": TEXT})},
)
PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def sizes(monkeypatch):
    """Sets the bytes of a batch and of a long row."""

    def set_sizes(batch: int, long: int = 2**24) -> None:
        monkeypatch.setattr(rows, "BATCH_BYTES", batch)
        monkeypatch.setattr(rows, "MAX_ROW_BYTES", long)

    return set_sizes


def open_table(path: Path, *filters: str, column: str | None = None) -> RowSource:
    found = tables.find(str(path), DataSettings(text_column=column, filter=filters))
    assert found is not None
    (source,) = found
    source.scan(None)
    return source


def read_items(source: RowSource, after: Any = None) -> Iterator[tuple[Any, list[tuple[int, Row]]]]:
    """`after` and the numbered rows of each batch; a long row has its text alone."""
    parse = pickle.loads(pickle.dumps(source.parse))
    for item in source.batches(after):
        if isinstance(item, LongRow):
            text = b"".join(item.document).decode()
            assert item.n_bytes() >= 0
            yield item.after, [(item.row, Row(text))]
        else:
            payload = pickle.loads(pickle.dumps(item.payload))
            found = list(parse(payload, item.first_row))
            yield item.after, list(enumerate(found, item.first_row))


def read_rows(source: RowSource, after: Any = None) -> list[Row]:
    """All rows; their numbers are checked."""
    numbered = [row for _, found in read_items(source, after) for row in found]
    if numbered and after is None:
        assert [number for number, _ in numbered] == list(range(len(numbered)))
    return [row for _, row in numbered]


def check_continuing(source: RowSource) -> None:
    """Continuing behind each batch gives the rows that were left."""
    items = list(read_items(source))
    for i, (after, _) in enumerate(items):
        rest = [row for _, found in items[i + 1 :] for row in found]
        got = [
            row for _, found in read_items(source, json.loads(json.dumps(after))) for row in found
        ]
        assert got == rest


def catch(path: Path, *filters: str, column: str | None = None) -> list[str]:
    """The lines of the error of reading the table."""
    with pytest.raises(PreflightError) as caught:
        read_rows(open_table(path, *filters, column=column))
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    return caught.value.lines


def build_expected(value: Any, columns: tuple[str, ...] = ("score",)) -> Row:
    text = value.get("text") if isinstance(value, dict) else None
    cells = {name: value.get(name) for name in columns} if isinstance(value, dict) else {}
    missing = (None, float("inf"), float("-inf"))  # numbers that are not finite count as missing
    there = {name: cell for name, cell in cells.items() if cell not in missing}
    return Row(text if isinstance(text, str) else None, there)


# ---- JSON Lines ---------------------------------------------------------------------------------


@PROPERTY
@given(
    values=st.lists(OBJECT | st.none(), min_size=1, max_size=12),
    is_ascii=st.booleans(),
    ends=st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    has_end=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    batch=st.sampled_from([7, 50, 10**6]),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_lines_equal_json_loads(
    tmp_path, sizes, values, is_ascii, ends, has_end, mark, batch, suffix
):
    values = [{"text": "first"}, *values]
    text = mark + ends.join(json.dumps(value, ensure_ascii=is_ascii) for value in values)
    text += ends * has_end
    data = text.encode()
    path = tmp_path / f"t.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    sizes(batch)
    source = open_table(path, "score>=0.5")
    lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    expected = [build_expected(json.loads(x)) if x.strip() else Row("") for x in lines]
    assert read_rows(source) == expected
    check_continuing(source)


@PROPERTY
@given(
    values=st.lists(OBJECT, min_size=1, max_size=8),
    is_ascii=st.booleans(),
    batch=st.sampled_from([7, 50, 200]),
    long=st.sampled_from([20, 60, 200]),
    keys=st.sampled_from(["text", "deep.t"]),
)
def test_long_rows_are_the_same_text(tmp_path, sizes, values, is_ascii, batch, long, keys):
    values = [{"text": "first", "deep": {"t": "x"}}, *values]
    lines = [json.dumps(value, ensure_ascii=is_ascii) for value in values]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines), newline="")
    sizes(batch, long)
    source = open_table(path, column=keys)
    expected = [
        value["text"] if keys == "text" else value.get("deep", {}).get("t") for value in values
    ]
    assert [row.text or "" for row in read_rows(source)] == [text or "" for text in expected]
    ends = "\n" * (len(lines) - 1)  # a row is long by its own bytes alone
    is_long = [
        len((line + end).encode()) > long for line, end in zip(lines, [*ends, ""], strict=True)
    ]
    found = {item.row for item in source.batches() if isinstance(item, LongRow)}
    assert found == {row for row, its in enumerate(is_long) if its}
    check_continuing(source)


def test_a_long_row_that_is_not_read_is_passed(tmp_path, sizes):
    path = tmp_path / "t.jsonl"
    texts = ["a", "b" * 500, "c", "d" * 300]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes(40, 100)
    source = open_table(path)
    items = list(source.batches())
    assert [item.row for item in items if isinstance(item, LongRow)] == [1, 3]
    kept = [row for i in items if not isinstance(i, LongRow) for row in source.parse(i.payload, 0)]
    assert [row.text for row in kept] == ["a", "c"]


def test_values_that_are_no_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"text": "a", "s": NaN, "n": 3}\n'
        '{"text": null, "s": Infinity, "n": null}\n'
        '{"text": NaN, "s": 1e999}\n'
        '{"text": ["x"], "s": 0.5}\n'
        "\n"
        '{"text": "a", "text": "last"}\n'
        '{"other": 1}\n7\n"x"\n[1]\n'
    )
    assert read_rows(open_table(path, "s>=1", "n<4", "min_tokens=5")) == [
        Row("a", {"n": 3}),
        Row(None),
        Row(None),
        Row(None, {"s": 0.5}),
        Row(""),
        Row("last"),
        *[Row(None)] * 4,
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', ["row 3", "byte 32", "no JSON"]),
        (b'{"text": "a"} x', ["row 3", "byte 32", "more after the value"]),
        (b'{"text": "\\ud800x"}', ["row 3", "byte 32", "\\ud800"]),
        (b'{"text": "\xff"}', ["row 3", "byte 32", "not UTF-8", "0xff at 42"]),
        (b'{"text": "a", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", ["row 3", "too deeply"]),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", ["row 3", "no JSON"]),
        (b"{'text': 'a'}", ["row 3", "no JSON"]),
    ],
)
def test_what_is_no_row_is_told_with_its_place(tmp_path, line, words, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 2 + line + b'\n{"text": "two"}\n')
    lines = catch(path)
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b'{"text": "' + b"a" * 200, "without an end"),
        (b'{"text": "' + b"a" * 200 + b'\\ud800 "}', "half a surrogate"),
        (b'{"text": "' + b"a" * 200 + b'\\udc00 "}', "half a surrogate"),
        (b'{"text": "' + b"a" * 200 + b'\\x"}', "invalid escape"),
        (b'{"text": "' + b"a" * 200 + b'\xff"}', "not UTF-8"),
        (b'{"text": "' + b"a" * 200 + b'\xc3"}', "not UTF-8"),
        (b'{"text": "' + b"a" * 200 + b'\t"}', "control character"),
        (b'{"text": "' + b"a" * 200 + b'"} x', "more after"),
        (b'{"text": "' + b"a" * 200 + b'", "text": "b"}', "second time"),
        (b'{"text": "' + b"a" * 200 + b'", "n": nul}', "no JSON value"),
        (b'{"text": "' + b"a" * 200 + b'" "n": 1}', "expected }"),
        (b'{"n": [' + b"1," * 200, "without an end"),
    ],
)
def test_a_damaged_long_row_is_told(tmp_path, sizes, line, word):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    sizes(30, 100)
    lines = catch(path)  # the scan looks at the first batch, which is sound
    assert "row 2 (at byte 16)" in lines[0]
    assert word in lines[0]


# ---- the column ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column", "text"),
    [
        ({"id": "1", "Text": "a"}, None, "a"),
        ({"content": "c", "text": "a"}, None, "a"),
        ({"text": 5, "content": "c"}, None, "c"),
        ({"id": 7, "prompt": "p"}, None, "p"),
        ({"article_body": {"html": "h", "wikitext": "w"}}, "article_body.html", "h"),
        ({"a.b": "dotted", "a": {"b": "nested"}}, "a.b", "dotted"),
    ],
)
def test_the_column(tmp_path, row, column, text):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row))
    (source,) = tables.find(str(path), DataSettings(text_column=column)) or []
    facts = source.scan(None)
    assert [found.text for found in read_rows(source)] == [text]
    assert any("guessed" in note for note in facts.notes) == (column is None)


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"title": "x", "words": "y"}\n')
    assert 'no column "text"' in catch(path, column="text")[0]
    assert '"title", "words"' in catch(path, column="text")[1]
    lines = catch(path)
    assert '"title", "words"' in lines[1]
    assert "--text-column" in lines[2]
    path.write_text("\n\n")
    assert "no row with a text" in catch(path)[0]
    path.write_text("")
    assert "no row with a text" in catch(path)[0]


def test_the_columns_of_a_long_first_row(tmp_path, sizes):
    path = tmp_path / "t.jsonl"
    row = {"id": [1, {"a": 2}], "deep": {"t": "a" * 200}, "n": None, "content": "b" * 200}
    path.write_text(json.dumps(row) + "\n")
    sizes(30, 100)
    assert [found.text for found in read_rows(open_table(path))] == ["b" * 200]
    assert [found.text for found in read_rows(open_table(path, column="deep.t"))] == ["a" * 200]
    assert '"id", "deep", "deep.t", "n", "content"' in catch(path, column="x")[1]


def test_utf_16_is_refused_with_the_command(tmp_path):
    for name in ("t.jsonl", "t.csv", "t.json"):
        path = tmp_path / name
        path.write_bytes('[{"text": "abc"}]\n'.encode("utf-16"))
        assert "iconv -f UTF-16" in catch(path)[1]
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert f"gzip -dc {packed} | iconv -f UTF-16" in catch(packed)[1]


# ---- JSON lists ---------------------------------------------------------------------------------


@PROPERTY
@given(
    values=st.lists(OBJECT | st.none() | VALUE, max_size=8),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
    wrap=st.sampled_from(["{}", " {} \n", "\ufeff{}", '{{"v": 1, "data": {}, "t": ["x]"]}}']),
    batch=st.sampled_from([1, 7, 50, 10**6]),
    long=st.sampled_from([60, 10**6]),
)
@example([5], None, True, "{}", 1, 10**6)
@example([{"text": '"}, {"'}], None, True, "{}", 1, 10**6)
def test_lists_equal_json_loads(tmp_path, sizes, values, indent, is_ascii, wrap, batch, long):
    values = [{"text": "first"}, *values]
    text = wrap.format(json.dumps(values, indent=indent, ensure_ascii=is_ascii))
    path = tmp_path / "t.json"
    path.write_text(text, newline="")
    sizes(batch, long)
    source = open_table(path, "score>=0.5")
    got, expected = read_rows(source), [build_expected(value) for value in values]
    if long == 60:  # a long row has its text alone
        assert [row.text or "" for row in got] == [row.text or "" for row in expected]
    else:
        assert got == expected
    check_continuing(source)


def test_a_list_of_strings_and_lines_in_json(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(["a", "b,]", None, {"x": 1}, ""]))
    assert [row.text for row in read_rows(open_table(path))] == ["a", "b,]", None, None, ""]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row.text for row in read_rows(open_table(path))] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"}, {"text": "b"', ["cut off"]),
        ('[{"text": "a"}, ', ["cut off"]),
        ('[{"text": "a"}] x', ["more behind the end"]),
        ('[{"text": "a"}]]', ["more behind the end"]),
        ('[{"text": "a"},, {"text": "b"}]', ["row 2 (at byte 15)", "no JSON"]),
        ('[{"text": "é"}, {"text": b}]', ["row 2 (at byte 17)", "no JSON"]),
        ('[{"text": "a"} {"text": "b"}]', ["row 1 (at byte 1)", "no JSON"]),
        ('[{"text": "a"}, {"text": "\\ud800"}]', ["row 2", "half a surrogate"]),
        ('[{"text": "a"}, ' + "[" * 10**5 + "]" * 10**5 + "]", ["row 2", "too deeply"]),
        ("7", ["a list of rows was expected", "'7'"]),
        ("", ["a list of rows was expected", "nothing"]),
        ("[]", ["no row with a text"]),
        ("{}", ["an empty object"]),
        ('{"a": 1, "b": [1], "c": "x"}', ["an object with one list"]),
        ('{"a": [{"text": "x"}], "b": [{"text": "y"}]}', ["an object with one list"]),
        ('{"a": 1', ["no JSON"]),
    ],
)
def test_what_is_no_list_of_rows(tmp_path, text, words):
    path = tmp_path / "t.json"
    path.write_text(text)
    lines = catch(path)
    assert all(word in lines[0] for word in words), lines
    if '"c"' in text:
        assert '"a" (a number or word), "b" (a list), "c" (a string)' in lines[1]


# ---- CSV ----------------------------------------------------------------------------------------

FIELD = st.text(st.sampled_from("ab\"',;\n\té "), max_size=8)


@PROPERTY
@given(
    table=st.lists(st.lists(FIELD, min_size=2, max_size=3), max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    batch=st.sampled_from([1, 5, 40, 10**6]),
    long=st.sampled_from([12, 10**6]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_csv_equals_csv_reader(tmp_path, sizes, table, delimiter, quoting, end, batch, long, mark):
    file = io.StringIO(newline="")
    file.write(mark)
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(["score", "text", "c"])
    for fields in table:
        writer.writerow(fields)
    path = tmp_path / "t.csv"
    path.write_bytes(file.getvalue().encode())
    sizes(batch, max(long, 40))  # so that the header is none
    source = open_table(path)
    sizes(batch, long)
    got = [row.text for row in read_rows(source)]
    oracle = csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter)
    assert got == [fields[1] if fields else "" for fields in list(oracle)[1:]]
    check_continuing(source)


@PROPERTY
@given(
    text=st.text(st.sampled_from('ab",\n'), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    column=st.integers(0, 2),
)
@example('a"b\n"c', [], 0)
@example('"a""\nb",c\n', [], 1)
def test_odd_quotes_are_read_as_csv_reader_reads_them(text, cuts, column):
    """Marks within a field, behind one, doubled or not, in chunks that end anywhere."""
    data = text.encode()
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    chunks = [data[a:b] for a, b in itertools.pairwise(places)]
    expected = list(csv.reader(io.StringIO(text, newline="\n")))
    splitter, ends, base = CsvSplitter(","), [], 0
    for chunk in chunks:
        for size in range(len(chunk)):  # byte by byte: each end is seen
            first, last, n_rows = splitter.find_ends(chunk[size : size + 1])
            assert (first, last) == (n_rows, n_rows)
            ends += [base + size + 1] * n_rows
        base += len(chunk)
    whole = CsvSplitter(",").find_ends(data)
    assert whole == ((ends[0], ends[-1], len(ends)) if ends else (0, 0, 0))
    parted, seen, base = CsvSplitter(","), 0, 0
    for chunk in chunks:
        seen += parted.find_ends(chunk)[2]
    assert seen == len(ends)
    begins = [0, *ends]
    pieces = [data[a:b] for a, b in zip(begins, [*ends, len(data)], strict=True)]
    pieces = pieces if pieces[-1] else pieces[:-1]
    assert len(pieces) == len(expected)
    for piece, fields in zip(pieces, expected, strict=True):
        try:
            halves = iter([piece[: len(piece) // 2], piece[len(piece) // 2 :]])
            got = b"".join(read_one_field(halves, ",", column)).decode()
        except ValueError:
            with pytest.raises(ValueError, match="no end"):
                CsvSplitter.check_end(splitter)
            continue
        assert got == (fields[column] if column < len(fields) else "")


def test_csv_columns_and_odd_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id;"the, text";score;x\n1;a;0.5;q\n2;"b;\nb";nan;\n\n3\n4;c;1;2;3\n')
    source = open_table(path, "score>=1", "x==1", "gone<5", column="the, text")
    assert read_rows(source) == [
        Row("a", {"score": 0.5, "x": "q"}),
        Row("b;\nb"),
        Row(""),
        Row(None),
        Row(None, {"score": 1.0, "x": 2.0}),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'text\na\n"b', ["row 2 (at byte 7)", "no end"]),
        (b"text\na\nb\n\xff\n", ["row 3", "0xff at 9"]),
        (b"text\na\rb\n", ["row 1", "no CSV"]),
        (b"", ["empty"]),
        (b"id,words\n1,a\n", ["no column has a usual name"]),
        (b"\xffid,text\n1,a\n", ["header"]),
    ],
)
def test_what_is_no_csv(tmp_path, data, words):
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    lines = catch(path)
    assert all(word in lines[0] for word in words), lines


def test_a_field_above_the_limit_of_the_module(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("a,b\ttext\n1\t" + "y" * 300_000 + "\n")
    assert [len(row.text) for row in read_rows(open_table(path))] == [300_000]


# ---- the file -----------------------------------------------------------------------------------


def test_what_find_takes(tmp_path):
    names = ["a.jsonl", "a.ndjson", "a.JSON", "a.csv", "a.tsv", "a.jsonl.zst", "a.csv.xz"]
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}')
        (source,) = tables.find(str(tmp_path / name), DataSettings()) or []
        assert source.name == name
        assert not source.is_skippable
    for name in ("a.txt", "a.gz", "gone.jsonl", "a.json.txt"):
        assert tables.find(str(tmp_path / name), DataSettings()) is None
    (tmp_path / "folder.csv").mkdir()
    assert tables.find(str(tmp_path / "folder.csv"), DataSettings()) is None
    assert tables.find(None, DataSettings()) is None


def test_a_change_is_noticed_at_the_beginning_and_at_the_end(tmp_path, sizes):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    sizes(30)
    source = open_table(path)
    batches = source.batches()
    next(batches)
    with open(path, "a") as file:
        file.write('{"text": "b"}\n')
    with pytest.raises(PreflightError, match="changed"):
        list(batches)
    with pytest.raises(PreflightError, match="changed"):
        next(source.batches())


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_every_truncation_of_a_compressed_table_is_told(tmp_path, sizes, name):
    values = [{"text": f"text {random.Random(i).random()}", "n": i} for i in range(100)]
    lines = [json.dumps(value) for value in values]
    plain = {
        "t.jsonl": "\n".join(lines),
        "t.json": json.dumps(values),
        "t.csv": "\n".join(["text,n", *(f"{value['text']},{value['n']}" for value in values)]),
    }[name]
    data = gzip.compress(plain.encode())
    path = tmp_path / f"{name}.gz"
    sizes(200)
    path.write_bytes(data)
    assert [row.text for row in read_rows(open_table(path))] == [v["text"] for v in values]
    for size in range(0, len(data), 29):
        path.write_bytes(data[:size])
        line = catch(path)[0]
        assert "cut off" in line or "empty" in line


def test_the_stored_bytes_of_the_batches_add_up(tmp_path, sizes):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "abcdef"}\n' * 3000))
    sizes(1000)
    source = open_table(path)
    assert sum(item.n_bytes for item in source.batches()) == path.stat().st_size


ROOT = Path(tables.__file__).parents[3]
_MEASURE = """
import re, sys
from pathlib import Path
from preflight.corpus.sources import tables
from preflight.corpus.sources.rows import LongRow
from preflight.settings import DataSettings

def read_peak():  # getrusage would count the parent's memory, from before the exec
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = read_peak()
(source,) = tables.find(sys.argv[1], DataSettings())
source.scan(None)
for item in source.batches():
    if isinstance(item, LongRow):
        print(sum(map(len, item.document)), read_peak() - before)
"""


def test_a_line_of_64_mb_is_read_in_bounded_memory(tmp_path):
    """The peak of a process of its own, above what it had after its imports."""
    path = tmp_path / "t.jsonl"
    piece = "plain words, and \\u00e9\\n" * 1000
    n_pieces = 64 * 10**6 // len(piece)
    with open(path, "w") as file:
        file.write('{"text": "a"}\n{"text": "')
        for _ in range(n_pieces):
            file.write(piece)
        file.write('"}\n')
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    n_bytes, above = map(int, done.stdout.split())
    assert n_bytes == n_pieces * len(json.loads(f'"{piece}"').encode())
    assert above < 48 * 2**20
