"""MediaWiki dumps: every page is a row however the dump is stored, cut and continued."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wiki import (
    BULGARIAN,
    SLICE,
    count_common,
    get_dumps,
    measure_shares,
    read_articles,
    run_wikiextractor,
)
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources import wiki_dump, wiki_pages
from preflight.corpus.sources.rows import Batch, Row
from preflight.corpus.sources.wiki_dump import WikiDump
from preflight.settings import DataSettings

NAMES = {"-2": "Media", "0": "", "1": "Talk", "6": "Soubor", "14": "Odd Category"}


def build_head(names: dict[str, str] = NAMES) -> str:
    rows = "".join(f'<namespace key="{k}" case="x">{v}</namespace>\n' for k, v in names.items())
    return f'<mediawiki xmlns="x" xml:lang="en">\n<siteinfo>\n{rows}</siteinfo>\n'


def build_page(title: str, *texts: str, ns: str = "<ns>0</ns>", more: str = "") -> str:
    revisions = "".join(
        "<revision>\n<id>1</id><model>wikitext</model>"
        f'<text xml:space="preserve" bytes="1">{escape(text)}</text>\n</revision>\n'
        for text in texts
    )
    return f"  <page>\n<title>{escape(title)}</title>\n{ns}<id>7</id>{more}{revisions}</page>\n"


def build_dump(pages: list[str]) -> str:
    return build_head() + "".join(pages) + "</mediawiki>\n"


def open_dump(path: Path, **flags: Any) -> WikiDump:
    found = wiki_dump.find(str(path), DataSettings(**flags))
    assert found is not None
    (source,) = found
    source.scan(None)
    return source


def read_rows(source: WikiDump, batches: list[Batch] | None = None) -> list[Row]:
    parse = pickle.loads(pickle.dumps(source.parse))
    rows: list[Row] = []
    for batch in list(source.batches()) if batches is None else batches:
        assert batches is not None or batch.first_row == len(rows)
        rows += parse(batch.payload, batch.first_row)
    return rows


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# In UTF-16 its bytes hold those of the tag, beside the bounds of the characters.
SHIFTED = "\u0100" + "".join(chr(ord(letter) << 8) for letter in "</page>") + "\u0100"
PAGES = [
    build_page(
        "Úvod & <co>", "The ''first''\n[[Soubor:x.png|thumb|no]]&amp; [[Odd category:y]]last"
    ),
    build_page("Talk:Úvod", "talk", ns="<ns>1</ns>"),
    build_page("Moved", "#PŘESMĚRUJ [[Úvod]]", more='<redirect title="Úvod" />'),
    build_page("Moved before 2012", "#redirect [[Úvod]]"),
    build_page("History", "oldest", "older", f"newest 漢字 {SHIFTED}"),
    build_page("Nothing", ""),
    build_page("No revision"),
    build_page("Only a picture", "[[Image:x.png]]"),
    build_page("Old dump", "has no ns", ns=""),
    build_page("Talk:Old dump", "has no ns", ns=""),
    build_page("Script", "x = 1").replace("wikitext", "javascript"),
    build_page("Deleted", "x").replace('xml:space="preserve" bytes="1">x</text>', 'deleted="x" />'),
    build_page("Last", "page"),
]
TEXTS = [
    *(
        "Úvod & <co>\n\nThe first\n& last",
        "",
        "",
        "",
        f"History\n\nnewest 漢字 {SHIFTED}",
        "",
        "",
        "",
    ),
    *("Old dump\n\nhas no ns", "", "", "", "Last\n\npage"),
]


def pack_streams(data: bytes) -> bytes:
    """As a multistream dump: many streams, one behind the other."""
    return b"".join(bz2.compress(data[i : i + 900]) for i in range(0, len(data), 900))


def unpack_beginning(data: bytes) -> bytes:
    plain = b""
    while data:
        stream = bz2.BZ2Decompressor()
        plain += stream.decompress(data)
        data = stream.unused_data
    return plain


STORED: dict[str, Callable[[bytes], bytes]] = {
    "a.xml": bytes,
    "a.xml.gz": gzip.compress,
    "enwiki-latest-pages-articles1.xml-p1p41242.bz2": bz2.compress,
    "a-multistream.xml.bz2": pack_streams,
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-16"])
def test_every_page_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    path = tmp_path / name
    path.write_bytes(STORED[name](build_dump(PAGES).encode(encoding)))
    source = open_dump(path)
    assert [row.text for row in read_rows(source)] == TEXTS
    assert [row.columns["title"] for row in read_rows(source)][:2] == ["Úvod & <co>", "Talk:Úvod"]
    assert sum(batch.n_bytes for batch in source.batches()) == path.stat().st_size
    # Cut anywhere, and continued behind any batch, the rows are the same.
    monkeypatch.setattr(wiki_pages, "_READ_BYTES", 37)
    for n_bytes in (1, 500):
        monkeypatch.setattr(wiki_dump, "BATCH_BYTES", n_bytes)
        batches = list(source.batches())
        assert len(batches) > 2
        assert [row.text for row in read_rows(source)] == TEXTS
        for i, batch in enumerate(batches):
            after = json.loads(json.dumps(batch.after))
            rest = list(source.batches(after))
            assert [b.payload for b in rest] == [b.payload for b in batches[i + 1 :]]
            assert [b.first_row for b in rest] == [b.first_row for b in batches[i + 1 :]]


TITLES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=5)


@given(
    pages=st.lists(st.tuples(TITLES, TITLES), max_size=8),
    encoding=st.sampled_from(["utf-8", "utf-16-le", "utf-16-be"]),
    n_bytes=st.integers(1, 2000),
)
def test_pages_of_any_characters(
    tmp_path_factory: pytest.TempPathFactory,
    pages: list[tuple[str, str]],
    encoding: str,
    n_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("dumps") / "a.xml"
    write(path, build_dump([build_page(f"t{a}", f"{b}!") for a, b in pages]), encoding)
    source = open_dump(path, clean="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiki_dump, "BATCH_BYTES", n_bytes)
        texts = [row.text for row in read_rows(source)]
    assert texts == [f"{f't{a}'.strip()}\n\n{b}!" for a, b in pages]


def test_markup_stays_for_another_cleaner(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xml", build_dump([build_page("T", "''x'' &amp; {{y}}")]))
    assert open_dump(path).is_cleaned
    assert read_rows(open_dump(path, clean="wiki"))[0].text == "T\n\nx &"
    for clean in ("none", "unicode", "html"):
        source = open_dump(path, clean=clean)
        assert not source.is_cleaned
        assert read_rows(source)[0].text == "T\n\n''x'' &amp; {{y}}"


def test_what_is_no_dump_is_for_others(tmp_path: Path) -> None:
    dump = build_dump(PAGES)
    for name in ("a.txt", "a.xml.txt", "xml", "a.jsonl"):
        assert wiki_dump.find(str(write(tmp_path / name, dump)), DataSettings()) is None
    other = write(tmp_path / "b.xml", "<?xml version='1.0'?><feed><page></page></feed>")
    for given_name in (str(other), str(tmp_path / "no.xml"), str(tmp_path), None):
        assert wiki_dump.find(given_name, DataSettings()) is None
    assert wiki_dump.find(str(write(tmp_path / "empty.xml", "")), DataSettings()) is None


# ---- damage -------------------------------------------------------------------------------------


def catch(source: WikiDump) -> str:
    with pytest.raises(PreflightError) as caught:
        read_rows(source)
    assert caught.value.code == ExitCode.TEXT
    assert len(caught.value.lines) <= 5
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_dump_that_is_cut_off(tmp_path: Path, encoding: str) -> None:
    text = build_dump([build_page(f"Page {i}", "some text " * i) for i in range(1, 6)])
    for cut in range(len(build_head()) + 5, text.index("</mediawiki>") + 11, 23):
        message = catch(open_dump(write(tmp_path / "a.xml", text[:cut], encoding)))
        n_whole = text[:cut].count("</page>")
        assert f"the {n_whole:,} pages before that are whole" in message
        begun = re.findall(r"<title>(Page \d)</title>", text[:cut])
        if text[:cut].rfind("<page>") > text[:cut].rfind("</page>"):
            title = f", '{begun[n_whole]}'," if len(begun) > n_whole else ""
            assert f"cut off in page {n_whole + 1}{title}: it has no </mediawiki>" in message
        else:
            assert f"cut off behind page {n_whole}: it has no" in message


def test_a_page_without_an_end(tmp_path: Path) -> None:
    text = build_dump([*PAGES, build_page("Open", "text").replace("</page>", "")])
    message = catch(open_dump(write(tmp_path / "a.xml", text)))
    assert "page 14, 'Open', has no </page>" in message
    assert "the 13 pages before that are whole" in message


def test_a_compressed_dump_that_is_cut_off(tmp_path: Path) -> None:
    text = build_dump([build_page(f"Page {i}", f"some {i**i} text " * 50) for i in range(90)])
    data = pack_streams(text.encode())
    for share in (0.3, 0.9):
        path = tmp_path / "a.xml.bz2"
        path.write_bytes(data[: int(len(data) * share)])
        n_whole = unpack_beginning(path.read_bytes()).count(b"</page>")
        message = catch(open_dump(path))
        assert "cut off at its end" in message
        assert f"\n{n_whole} pages before that are whole" in message


@pytest.mark.parametrize(
    ("good", "bad", "what"),
    [
        ("<id>7</id>", "<id>7</ix>", "no well-formed XML: mismatched tag"),
        ("some", "so\x0bme", "no well-formed XML: not well-formed"),
        ("some", "so&nbsp;me", "no well-formed XML: undefined entity"),
        ("<page>", "<paje>", "it has no beginning"),
    ],
)
def test_a_damaged_page_is_named(tmp_path: Path, good: str, bad: str, what: str) -> None:
    pages = [build_page(f"Page {i}", "some text") for i in range(1, 5)]
    pages[2] = pages[2].replace(good, bad)
    message = catch(open_dump(write(tmp_path / "a.xml", build_dump(pages))))
    assert "a.xml: page 3, 'Page 3', is damaged: " in message
    assert what in message


def test_a_page_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    data = build_dump([build_page(f"Page {i}", f"text{i}") for i in range(1, 5)]).encode()
    (tmp_path / "a.xml").write_bytes(data.replace(b"text3", b"tex\xfft"))
    message = catch(open_dump(tmp_path / "a.xml"))
    assert "page 3, 'Page 3', is damaged: not UTF-8: byte 0xff" in message


def test_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiki_dump, "BATCH_BYTES", 1)
    monkeypatch.setattr(wiki_pages, "_READ_BYTES", 300)
    path = write(tmp_path / "a.xml", build_dump(PAGES))
    source = open_dump(path)
    batches = source.batches()
    next(batches)
    os.utime(path, ns=(1, 1))
    with pytest.raises(PreflightError, match="changed while it was being read"):
        list(batches)
    with pytest.raises(PreflightError, match="changed while it was being read"):
        next(source.batches())


def test_the_scan_stops(tmp_path: Path) -> None:
    source = open_dump(write(tmp_path / "a.xml", build_dump(PAGES)))
    assert source.scan(None).sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    stop = StopFlag()
    stop.received = 15
    with pytest.raises(PreflightError) as caught:
        source.scan(stop)
    assert caught.value.code == ExitCode.SIGTERM


# ---- long pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("read_bytes", [1000, 77])
def test_a_long_history_leaves_its_newest_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, read_bytes: int
) -> None:
    monkeypatch.setattr(wiki_pages, "MAX_ROW_BYTES", 4000)
    monkeypatch.setattr(wiki_pages, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(wiki_dump, "BATCH_BYTES", 1500)
    history = build_page("Old", *(f"revision {i} of many" for i in range(300)))
    pages = [*PAGES, history, *PAGES, build_page("Vast", "no " * 5000), *PAGES]
    source = open_dump(write(tmp_path / "a.xml", build_dump(pages), encoding))
    expected = [*TEXTS, "Old\n\nrevision 299 of many", *TEXTS, "", *TEXTS]
    batches = list(source.batches())
    assert [row.text for row in read_rows(source)] == expected
    assert max(len(batch.payload) for batch in batches) < 10_000
    for i, batch in enumerate(batches):
        rest = [row.text for row in read_rows(source, list(source.batches(batch.after)))]
        first = batches[i + 1].first_row if i + 1 < len(batches) else len(expected)
        assert rest == expected[first:]


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiki_pages, "MAX_ROW_BYTES", 2**20)
    history = build_page("Old", *(f"{i} " + "many words " * 1000 for i in range(3000)))
    vast = build_page("Vast", "no " * 7_000_000)
    path = write(tmp_path / "a.xml", build_dump([history, vast, *PAGES]))
    source = open_dump(path)
    assert path.stat().st_size > 50e6
    tracemalloc.start()
    rows = [row for batch in source.batches() for row in source.parse(batch.payload, 0)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [bool(row.text) for row in rows[:3]] == [True, False, True]
    assert peak < 12e6


# ---- the real thing -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real dumps, out of a package that has them as test data."""
    folder = tmp_path_factory.mktemp("gensim")
    get_dumps(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_pages", "n_articles"), [(SLICE, 206, 106), (BULGARIAN, 3, 1)])
def test_the_markup_of_a_real_dump_is_iterparses(
    real_dumps: Path, name: str, n_pages: int, n_articles: int
) -> None:
    expected = []
    with bz2.open(real_dumps / name) as file:
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "page":
                find = lambda name, of=element: of.find(f".//{{*}}{name}")  # noqa: E731
                is_article = find("ns").text == "0" and find("redirect") is None
                text = f"{find('title').text}\n\n{find('text').text}" if is_article else ""
                expected.append(text)
                element.clear()
    rows = read_rows(open_dump(real_dumps / name, clean="none"))
    assert [row.text for row in rows] == expected
    assert len(rows) == n_pages
    cleaned = read_rows(open_dump(real_dumps / name))
    assert sum(bool(row.text) for row in cleaned) == n_articles


def test_common_words_are_counted() -> None:
    assert count_common("a b c d".split(), "b x d a".split()) == 2
    assert count_common([], ["a"]) == count_common(["a"], []) == 0
    assert count_common("a a b a".split(), "a b a a".split()) == 3


@pytest.mark.slow
def test_the_text_is_wikiextractors(real_dumps: Path, tmp_path: Path) -> None:
    """wikiextractor (AGPL) runs in an environment of its own; only its output is read."""
    theirs, _ = run_wikiextractor(real_dumps / SLICE, tmp_path)
    ours = read_articles(real_dumps / SLICE, "wiki")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 106
    shares = measure_shares(ours, theirs).values()
    assert min(shares) >= 0.97
    assert sum(shares) / len(shares) >= 0.998
    for mark in ("[[File", "thumb|", "Category:", "<ref", "{{", "[[", "''", "]]"):
        assert mark not in "\n".join(ours.values())
