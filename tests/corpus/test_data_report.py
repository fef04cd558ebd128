"""The report of a data folder: its numbers, its page, and texts that try to break the page."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.page_parts import format_share
from preflight.corpus import data_report, pictures
from preflight.corpus.data_report import (
    REPORT_NAMES,
    MixReport,
    ReportFacts,
    SourceReport,
    describe,
    draw_pictures,
    write_report,
)
from preflight.corpus.report_content import build_content
from preflight.corpus.report_page import render_page
from preflight.corpus.tally import Tally, count_utf8

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</div></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' style='position:fixed'",
    "$body ${body} $$",
    "&lt;script&gt; &amp; &#60;script&#62;",
    "\u202eedoc\u202c \u2066x\u2069 \u200f",
    "\x00\x01\x1b[31m\x07\x7f\x9b",
    "a\u0301" * 200,
    "\ud800 half \udfff",
    "<!-- --> <![CDATA[ ]]> <style>body{display:none}</style>",
    "javascript:alert(1) http://example.com/x.png",
    "\U000e0041\U000e0042 \ufeff \ufffe \ue000",
    "line one\nline two\r\nline three\u2028four",
    "שלום עולם",
]
WORDS = "the of and energy river Größe Maß naïve history model water Moscow 1914 list city".split()
REASONS = (
    "gopher_quality: mean word length",
    "gopher_quality: fewer than 50 words",
    "gopher_repetition: duplicate lines",
    "fineweb: short lines",
    "min_tokens",
    "language_score",
    "duplicate: exact",
)


class Page(HTMLParser):
    """What a page holds: tags, attributes, text, cells of tables; whether it is well nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.by_class: dict[str, list[str]] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        class_ = dict(attrs).get("class") or tag
        if tag not in VOID:
            self._open.append((tag, class_))
            self.by_class.setdefault(class_, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1] == "code":  # a character that cannot be seen
            assert data.startswith("U+")
            data = chr(int(data[2:], 16))
        for tag, class_ in self._open:
            self.by_class[class_][-1] += data
            if tag in ("td", "th"):
                self.rows[-1][-1] += data


def build_tally(seed: int, n_rows: int = 400, *, drops: bool = True) -> Tally:
    """The counts of made-up documents."""
    rng, tally = random.Random(seed), Tally(3)
    for row in range(n_rows):
        if rng.random() < 0.01:
            tally.count_bad(row)
            continue
        text = " ".join(rng.choices(WORDS, k=int(rng.lognormvariate(4, 1.2)) + 1))
        text += "\ufffd\u200b" if rng.random() < 0.02 else ""
        n_bytes = count_utf8(text)
        tally.count_found(n_bytes)
        fate = rng.random()
        if fate < 0.01:
            tally.count_empty()
            continue
        if drops and fate < 0.3:
            reason = REASONS[min(int(rng.expovariate(0.6)), len(REASONS) - 1)]
            tally.count_dropped(row, reason, text, n_bytes)
            continue
        tally.sample(row, text)
        split = "val" if rng.random() < 0.05 else "train"
        tally.count_kept(row, split, text, n_bytes, n_bytes // 4 + 1)
    return tally


@cache
def build_facts(*, drops: bool = True) -> ReportFacts:
    """A report of three sources."""
    names = ("enwiki-latest-pages-articles1.xml.bz2", "fineweb sample-10BT", "code.jsonl.zst")
    sources = tuple(
        SourceReport(
            name=name,
            kind=kind,
            n_bytes=10**9 * (number + 1) + 7,
            sha256=f"{number + 10:x}" * 64,
            tally=build_tally(number, 500 + 100 * number, drops=drops),
            license=license,
        )
        for number, (name, kind, license) in enumerate(
            zip(names, ("wiki", "hub", "table"), ("CC BY-SA 4.0", "ODC-By 1.0", None), strict=True)
        )
    )
    return ReportFacts(
        tokenizer="gpt2",
        vocab_size=50257,
        sources=sources,
        settings={
            "clean": "wiki",
            "filter": ["gopher_quality", "fineweb", "min_tokens=100"] if drops else [],
            "deduplicate": "exact" if drops else "none",
            "val_split": 0.05,
            "mix": ["wiki=0.6", "web=0.3", "code=0.1"],
        },
        command="python main.py --prepare --text-file enwiki.xml.bz2 code.jsonl.zst --source "
        "hf:HuggingFaceFW/fineweb --config sample-10BT --filter gopher_quality fineweb "
        "min_tokens=100 --deduplicate exact --mix wiki=0.6 web=0.3 code=0.1 --data-dir data",
        mix=MixReport(
            {"wiki": 0.6, "web": 0.3, "code": 0.1},
            1000,
            (
                {"wiki": 604, "web": 297, "code": 99},
                {"wiki": 596, "web": 303, "code": 101},
                {"wiki": 200, "web": 100},
            ),
        ),
        would_drop={} if drops else {"c4: no end punctuation": (120, 1000), "fineweb": (7, 1000)},
        warnings=("code.jsonl.zst: no licence was given",),
    )


def build_hostile_facts() -> ReportFacts:
    """A report in which every text is one that tries to break the page."""
    tally = Tally(100)
    for row, text in enumerate(HOSTILE):
        tally.count_found(count_utf8(text))
        tally.sample(row, text)
        tally.count_kept(row, "train", text, count_utf8(text), 5)
    for row, text in enumerate(HOSTILE, len(HOSTILE)):
        tally.count_found(count_utf8(text))
        tally.count_dropped(row, text.encode("ascii", "backslashreplace").decode(), text, 5)
        tally.count_dropped(row, text[:40], text, 5)
    sources = tuple(SourceReport(text, text, 1, "a" * 64, tally, text) for text in HOSTILE)
    return ReportFacts(
        tokenizer=HOSTILE[0],
        vocab_size=5,
        sources=sources,
        settings={text: [text, text] for text in HOSTILE},
        command=" ".join(HOSTILE),
        mix=MixReport(dict.fromkeys(HOSTILE, 0.1), 10, ({HOSTILE[0]: 20},)),
        would_drop=dict.fromkeys(HOSTILE, (1, 2)),
        warnings=tuple(HOSTILE),
    )


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("drops", [True, False])
def test_the_numbers_of_the_page_are_those_of_the_json(tmp_path: Path, drops: bool) -> None:
    write_report(tmp_path, build_facts(drops=drops))
    content = json.loads((tmp_path / "data_report.json").read_text())
    page = Page((tmp_path / "data_report.html").read_text(encoding="utf-8"))
    expected = [["rule", "documents", "share", "text", ""]] if drops else []
    for entry in content["dropped"]:
        expected.append([entry["reason"], f"{entry['n_documents']:,}"])
    for entry in content["would_drop"]:
        expected.append([entry["reason"], f"{entry['n_documents']:,}", f"{entry['n_looked_at']:,}"])
    for entry in content["lengths"]:
        span = f"{entry['from_tokens']:,} to {entry['to_tokens']:,}"
        expected.append(["1" if entry["to_tokens"] == 1 else span, f"{entry['n_documents']:,}"])
    for entry in content["scripts"]:
        if entry["name"] != "Common":
            expected.append([entry["name"], f"{entry['n_characters']:,}"])
    for entry in content["mix"]["sources"]:
        keys = ("asked", "share", "least", "most")
        expected.append([entry["name"], *(f"{100 * entry[key]:.1f} %" for key in keys)])
    rows = {tuple(row[:n]) for row in page.rows for n in range(1, len(row) + 1)}
    assert [row for row in expected if tuple(row) not in rows] == []
    by_name = {row[0]: row for row in page.rows}
    for source in content["sources"]:
        row = by_name[source["name"]]
        counts = (source["counts"]["n_rows"], source["n_kept"], source["n_kept_tokens"])
        assert row[4:7] == [f"{count:,}" for count in counts]
        assert row[2] == (source["license"] or "not given")
        assert source["sha256"].startswith(row[8])
    odd = [row for row in page.rows if row[0].startswith("replacement characters")]
    [n_replaced] = [e["n_characters"] for e in content["odd"] if "replacement" in e["name"]]
    assert [row[1] for row in odd] == [f"{n_replaced:,}"]
    totals = content["totals"]
    lead = page.by_class["lead"][0]
    assert re.findall(r"[\d,]*\d", lead)[:2] == [
        f"{totals['n_kept']:,}",
        f"{totals['n_kept_tokens']:,}",
    ]
    assert page.by_class["legend"] == [
        f"{totals['n_kept']:,} kept{totals['n_dropped']:,} dropped"
        f"{totals['n_bad_rows'] + totals['n_empty']:,} without text ({totals['n_bad_rows']:,} hold "
        f"none, {totals['n_empty']:,} are empty)"
    ]
    assert page.by_class["text"] == [
        example["text"]
        for example in (
            *(example for entry in content["dropped"] for example in entry["examples"]),
            *content["examples"],
        )
    ]


def test_the_numbers_of_the_json_are_those_of_the_tallies() -> None:
    facts = build_facts()
    content, tallies = build_content(facts), [source.tally for source in facts.sources]
    totals = content["totals"]
    for name in ("n_rows", "n_bad_rows", "n_empty", "n_raw_bytes"):
        assert totals[name] == sum(getattr(tally, name) for tally in tallies)
    n_tokens = sum(tally.n_tokens["train"] + tally.n_tokens["val"] for tally in tallies)
    n_bytes = sum(tally.n_bytes["train"] + tally.n_bytes["val"] for tally in tallies)
    assert totals["n_kept_tokens"] == n_tokens
    assert totals["bytes_per_token"] == n_bytes / n_tokens
    n_with_text = totals["n_rows"] - totals["n_bad_rows"]
    assert n_with_text == totals["n_empty"] + totals["n_dropped"] + totals["n_kept"]
    counts = {reason: sum(t.dropped.get(reason, [0])[0] for t in tallies) for reason in REASONS}
    assert {entry["reason"]: entry["n_documents"] for entry in content["dropped"]} == counts
    shown = [entry["n_documents"] for entry in content["dropped"]]
    assert shown == sorted(shown, reverse=True)
    for entry in content["dropped"]:
        assert entry["share"] == entry["n_documents"] / n_with_text
        assert sum(part["n_documents"] for part in entry["by_source"]) == entry["n_documents"]
    assert content["duplicates"]["n_documents"] == counts["duplicate: exact"]
    assert sum(entry["n_documents"] for entry in content["lengths"]) == totals["n_kept"]
    ends = [(entry["from_tokens"], entry["to_tokens"]) for entry in content["lengths"]]
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))
    assert sum(entry["share"] or 0 for entry in content["scripts"]) == pytest.approx(1)
    assert sum(source["token_share"] for source in content["sources"]) == pytest.approx(1)


def test_the_mix_is_judged_by_its_full_stretches() -> None:
    mix = build_content(build_facts())["mix"]
    wiki = mix["sources"][0]
    assert mix["n_stretches"] == 2
    assert (wiki["least"], wiki["most"]) == (0.596, 0.604)
    assert wiki["share"] == 1400 / 2300
    assert mix["largest_difference"] == pytest.approx(0.004)
    short = replace(build_facts(), mix=MixReport({"a": 0.5, "b": 0.5}, 1000, ({"a": 3, "b": 1},)))
    mix = build_content(short)["mix"]
    assert (mix["n_stretches"], mix["largest_difference"]) == (0, 0.25)


def test_the_documentation_names_the_keys() -> None:
    documentation = build_content.__doc__ or ""
    names = re.findall(r"^    ([a-z]\w+(?:, [a-z]\w+)*)  ", documentation, re.MULTILINE)
    content = build_content(build_facts())
    assert [name for entry in names for name in entry.split(", ")] == list(content)
    for key in ("totals", "mix", "duplicates"):
        assert set(content[key]) <= set(re.findall(r"\w+", documentation))


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0, "0.0 %"), (0.0004, "< 0.1 %"), (0.0006, "0.1 %"), (0.5, "50.0 %")],
)
def test_shares_in_words(share: float | None, text: str) -> None:
    assert format_share(share) == text


# ---- files --------------------------------------------------------------------------------------


def test_equal_facts_make_equal_files(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        assert write_report(folder, build_facts()) == [folder / name for name in REPORT_NAMES]
        assert sorted(path.name for path in folder.iterdir()) == sorted(REPORT_NAMES)
    for name in REPORT_NAMES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_report_replaces_one_but_no_file_of_others(tmp_path: Path) -> None:
    write_report(tmp_path, build_facts(drops=False))
    write_report(tmp_path, build_facts())
    assert json.loads((tmp_path / "data_report.json").read_text())["is_filtered"]
    (tmp_path / "data_report.json").write_text('{"mine": 1}')
    with pytest.raises(PreflightError) as caught:
        write_report(tmp_path, build_facts())
    assert caught.value.code == ExitCode.STORAGE
    assert (tmp_path / "data_report.json").read_text() == '{"mine": 1}'


def test_an_empty_report_can_be_written(tmp_path: Path) -> None:
    nothing = ReportFacts("gpt2", 50257, (), {}, "")
    source = SourceReport("empty.txt", "text", 0, "0" * 64, Tally())
    write_report(tmp_path, nothing)
    for facts in (nothing, replace(nothing, sources=(source,))):
        page = Page(render_page(build_content(facts)))
        assert "0 documents with 0 tokens" in page.by_class["lead"][0]
        assert (
            describe(build_content(facts))[-1] == "nothing was dropped, since no rule was asked for"
        )


def test_counts_that_do_not_add_up_are_reported_all_the_same(tmp_path: Path) -> None:
    tally = Tally()
    tally.count_dropped(0, "c4", "text", 4)  # without having been found
    tally.count_bad(1)
    facts = ReportFacts("gpt2", 5, (SourceReport("a", "text", 1, "0" * 64, tally),), {}, "")
    write_report(tmp_path, facts)
    assert "dropped: 1 documents (-)" in describe(build_content(facts))


def test_pictures_show_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda *given: (drawn.append(given[0]), save(*given)))
    content = build_content(build_facts())
    draw_pictures(tmp_path, content)
    lengths, dropped = drawn
    heights = [bar.get_height() for bar in lengths.patches]
    assert heights == [entry["n_documents"] for entry in content["lengths"]]
    first = lengths.get_xticklabels()[0].get_text()
    assert first == str(content["lengths"][0]["from_tokens"])
    widths = [bar.get_width() for bar in dropped.patches]
    assert widths == pytest.approx([100 * entry["share"] for entry in content["dropped"]])
    names = [text.get_text() for text in dropped.get_yticklabels()]
    assert names == [entry["reason"] for entry in content["dropped"]]
    for name in ("document_lengths.png", "dropped.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ---- hostile texts ------------------------------------------------------------------------------


def check_harmless(page: str) -> Page:
    """The page, which holds only the elements, attributes and characters of this program."""
    page.encode()  # no half characters
    parsed = Page(page)
    assert set(parsed.tags) <= set(
        "html head meta title style body main h1 h2 p dl div dt dd ul li span table thead tbody "
        "tr th td details summary figure figcaption pre".split()
    )
    assert parsed.tags.count("style") == 1
    names = {"lang", "charset", "name", "content", "http-equiv", "class", "dir", "data-label"}
    styles = [value or "" for name, value in parsed.attributes if name == "style"]
    assert {name for name, _ in parsed.attributes} <= names | {"style"}
    assert all(re.fullmatch(r"width:\d+\.\d\d%", style) for style in styles)
    assert "default-src 'none'" in page
    for character in page:
        if not character.isascii():
            assert unicodedata.category(character) not in ("Cc", "Cs", "Co", "Zl", "Zp")
            assert unicodedata.bidirectional(character) not in BIDI_CONTROLS
        else:
            assert character.isprintable() or character in "\n\t"
    return parsed


BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_hostile_texts_are_shown_harmlessly(tmp_path: Path) -> None:
    write_report(tmp_path, build_hostile_facts())
    parsed = check_harmless((tmp_path / "data_report.html").read_text(encoding="utf-8"))
    shown = set(parsed.by_class["text"])
    for text in HOSTILE:
        whole = text.replace("\r\n", "\n")[:300]
        assert whole in shown or re.sub("[\ud800-\udfff]", "\ufffd", whole) in shown
    assert "<script>alert(1)</script>" in parsed.by_class["warnings"][0]


@settings(max_examples=60)
@given(st.text(st.characters(codec=None), max_size=50))
def test_any_text_comes_through_the_page(text: str) -> None:
    tally = Tally()
    tally.count_found(1)
    tally.count_kept(0, "train", text, 1, 1)
    text = tally.kept_examples[0].text  # without half characters
    source = SourceReport("a", "text", 1, "0" * 64, tally, text)
    content = build_content(ReportFacts("gpt2", 5, (source,), {}, text, warnings=(text,)))
    parsed = check_harmless(render_page(json.loads(json.dumps(content))))
    for shown in (*parsed.by_class["text"], *parsed.by_class["li"][:1], *parsed.by_class["pre"]):
        assert shown == text.replace("\r\n", "\n")


# ---- the summary --------------------------------------------------------------------------------


def test_the_summary_has_at_most_fifteen_lines() -> None:
    for facts in (build_facts(), build_facts(drops=False), build_hostile_facts()):
        for warnings in ((), ("one\n\x1b[31m\u202e",), ("one", "two"), tuple(map(str, range(50)))):
            lines = describe(build_content(replace(facts, warnings=warnings)))
            assert len(lines) <= 15
            assert all("\n" not in line and line.isprintable() for line in lines)
            told = [line for line in lines if line.startswith("warning: ")]
            assert bool(told) == bool(warnings)
            if len(told) < len(warnings):
                hidden = len(warnings) - len(told) + 1
                assert told[-1] == f"warning: {hidden} more in data_report.html"


def test_the_summary_has_the_numbers() -> None:
    facts = build_facts()
    totals, lines = build_content(facts)["totals"], describe(build_content(facts))
    assert f"{totals['n_kept']:,} documents with {totals['n_kept_tokens']:,} tokens" in lines[0]
    dropped = build_content(facts)["dropped"][0]
    assert any(
        line.startswith(f"  {dropped['reason']}: {dropped['n_documents']}") for line in lines
    )
    assert not any("nothing was dropped" in line for line in lines)
    spared = replace(build_facts(drops=False), settings={"filter": ["c4"]}, would_drop={})
    assert "nothing was dropped" in describe(build_content(spared))


def test_many_sources_make_no_endless_page() -> None:
    one = build_facts().sources[0]
    sources = tuple(replace(one, name=f"file {number}") for number in range(300))
    content = build_content(replace(build_facts(), sources=sources))
    assert len(content["sources"]) == 300
    assert [example["source"] for example in content["examples"]] == [
        f"file {number}" for number in range(20)
    ]
    page = render_page(content)
    assert len(page) < 200_000
    assert page.count("295 more sources)") == len(content["dropped"])
    assert "200 more sources are listed" in page
    assert len(describe(content)) <= 15
    assert data_report.JSON_NAME in page
