"""Wikipedia Enterprise's files: articles out of JSON lines, by HTML or by wikitext."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources import rows, wiki_enterprise
from preflight.corpus.sources.rows import Batch, LongRow, Row
from preflight.corpus.sources.wiki_enterprise import EnterpriseFile
from preflight.settings import DataSettings

Value = dict[str, Any]


def build_article(
    name: str, html: str | None = None, wikitext: str | None = None, namespace: int = 0, **more: Any
) -> Value:
    body = {"html": html, "wikitext": wikitext}
    return {
        "name": name,
        "identifier": 7,
        "namespace": {"identifier": namespace},
        "version": {"scores": {"damaging": {"probability": 0.5}}},
        "article_body": {key: value for key, value in body.items() if value is not None},
        **more,
    }


ARTICLES = [
    build_article("One", "<p>The <b>first</b>.</p><table><tr><td>x</table>", "The '''other'''"),
    build_article("Two", None, "{{tpl}}''Wiki''text [[Category:x]]"),
    build_article("Three", "", "empty [[html|HTML]]"),
    build_article("Talk:One", "<p>talk</p>", namespace=1),
    build_article("Nothing"),
    build_article("Blank", "<table><tr><td>x</td></tr></table>"),
    build_article("漢字 é", "<h2>漢字</h2>" + "<p>many words</p>" * 30, identifier=8),
]
LAST = "漢字 é\n\n漢字" + "\n\nmany words" * 30
TEXTS = [
    *("One\n\nThe first.", "Two\n\nWikitext", "Three\n\nempty HTML", "", None, "", LAST),
]


def write(path: Path, values: list[Value], ascii_only: bool = True) -> Path:
    data = "".join(json.dumps(v, ensure_ascii=ascii_only) + "\n" for v in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def open_file(path: Path, **flags: Any) -> EnterpriseFile:
    found = wiki_enterprise.find(str(path), DataSettings(**flags))
    assert found is not None
    (source,) = found
    source.scan(None)
    return source


def read_rows(source: EnterpriseFile, after: Any = None) -> list[Row]:
    parse = pickle.loads(pickle.dumps(source.parse))
    read: list[Row] = []
    for batch in source.batches(after):
        if isinstance(batch, LongRow):
            read.append(Row(b"".join(batch.document).decode()))
        else:
            read += parse(batch.payload, batch.first_row)
    return read


@pytest.mark.parametrize("name", ["enwiki_namespace_0_0.jsonl", "a.ndjson", "a.jsonl.gz"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_articles_become_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ascii_only: bool
) -> None:
    source = open_file(write(tmp_path / name, ARTICLES, ascii_only))
    assert [row.text for row in read_rows(source)] == TEXTS
    monkeypatch.setattr(rows, "BATCH_BYTES", 300)
    batches = [batch for batch in source.batches() if isinstance(batch, Batch)]
    assert len(batches) > 2
    for i, batch in enumerate(batches):
        after = json.loads(json.dumps(batch.after))
        first = batches[i + 1].first_row if i + 1 < len(batches) else len(TEXTS)
        assert [row.text for row in read_rows(source, after)] == TEXTS[first:]


def test_the_flag_chooses_the_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ARTICLES)
    expected = {
        None: "One\n\nThe first.",
        "html": "One\n\nThe first.",
        "wiki": "One\n\nThe other",
        "none": "One\n\n<p>The <b>first</b>.</p><table><tr><td>x</table>",
    }
    for clean, text in expected.items():
        source = open_file(path, clean=clean)
        assert read_rows(source)[0].text == text
        assert source.is_cleaned == (clean != "none")


def test_columns_for_filters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ARTICLES)
    flags = ("identifier>=8", "version.scores.damaging.probability<0.9", "gopher_quality")
    read = read_rows(open_file(path, filter=flags))
    assert [row.columns["identifier"] for row in read] == [7] * 6 + [8]
    assert read[0].columns["version.scores.damaging.probability"] == 0.5


def test_other_tables_are_for_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ARTICLES)
    assert wiki_enterprise.find(str(path), DataSettings(text_column="name")) is None
    for name, content in {
        "b.jsonl": '{"text": "x"}\n',
        "c.jsonl": '{"article_body": "text"}\n',
        "d.jsonl": '[{"article_body": {}}]\n',
        "e.jsonl": "",
        "f.jsonl": '{"a": ',
        "g.txt": path.read_text(),
    }.items():
        (tmp_path / name).write_text(content)
        assert wiki_enterprise.find(str(tmp_path / name), DataSettings()) is None
    for given in (None, str(tmp_path), str(tmp_path / "no.jsonl")):
        assert wiki_enterprise.find(given, DataSettings()) is None


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"name": "x", "article_body": {"html": "cut', "row 3 (at byte "),
        ('{"name": "x", "article_body": {"wikitext": "a \\ud800 b"}}', "half a surrogate pair"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path / "a.jsonl", ARTICLES[:2])
    with open(path, "a") as file:
        file.write(line)
    with pytest.raises(PreflightError, match=r"a\.jsonl: row 3 ") as caught:
        read_rows(open_file(path))
    assert caught.value.code == ExitCode.TEXT
    assert what in str(caught.value)


def test_a_vast_row_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 1000)
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 5000)
    vast = build_article("Vast", "<p>x</p>" * 5000)
    path = write(tmp_path / "a.jsonl", [*ARTICLES, vast, *ARTICLES])
    assert [row.text for row in read_rows(open_file(path))] == [*TEXTS, "", *TEXTS]
