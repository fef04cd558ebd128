"""Cleaners: what they take out, what they leave, and that no input makes them slow."""

from __future__ import annotations

import gc
import re
import time
import unicodedata
from collections.abc import Callable

import mwparserfromhell
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.cleaning import html, wiki
from preflight.corpus.cleaning.html import clean_html
from preflight.corpus.cleaning.plain import clean_unicode, keep
from preflight.corpus.cleaning.wiki import clean_wiki
from preflight.settings.kinds import CLEANERS

# ---- plain --------------------------------------------------------------------------------------

ODD = (
    "a e\u0301\u030a\n\r\t \v\f\x00\x07\x85\xa0\xad\u1100\u1161\u200b\u200d\u200e\u2028\ufeff\ufffd"
)


@given(st.text(st.sampled_from(ODD), max_size=40) | st.text(max_size=40))
def test_cleaning_unicode_twice_is_cleaning_once(text: str) -> None:
    once = clean_unicode(text)
    assert clean_unicode(once) == once
    assert once == unicodedata.normalize("NFC", once)
    assert not re.search(r"[^\S\n]\n|\n{3}|[^\S\n]\Z|\r", once)
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in once)
    letters = [c for c in unicodedata.normalize("NFC", text) if c.isalnum()]
    if "\u0301" not in text and "\u030a" not in text and text.isascii():
        assert [c for c in once if c.isalnum()] == letters


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc\x85d\u2028e", "a\nb\nc\nd\ne"),
        ("e\u0301 \u1100\u1161", "\u00e9 \uac00"),
        ("so\u00adft\u200b \u200eleft\u202e \ufeffmark", "soft left mark"),
        ("\u0645\u06cc\u200c\u062e \u200d", "\u0645\u06cc\u200c\u062e \u200d"),
        ("lost \ufffd letter", "lost \ufffd letter"),
        ("a \t\n \n\n\n  b\t", "a\n\n  b"),
        ("tab\tstays\x1b[0m", "tab\tstays[0m"),
        (" \n\u200b\t", ""),
    ],
)
def test_cleaning_unicode(text: str, clean: str) -> None:
    assert clean_unicode(text) == clean
    assert keep(text) == text


# ---- MediaWiki ----------------------------------------------------------------------------------

MARKUP = {
    "a '''bold''' and ''it''alic [[word]]s": "a bold and italic words",
    "'''n'''th d''e'' '' x": "nth de x",
    "[[Target (x)|label]] [[Target#part]] [[:Category:Shown]]": "label Target#part Shown",
    "[[Rome (city)|]] [[Help:Page|]]": "Rome Page",
    "x [[File:A.png|thumb|with a [[link|nested]] {{tpl|a|b}} text]] y": "x y",
    "[[Datei:A.png|mini|x]]a[[Файл:b|мини]]b[[ファイル:c]]c[[Image:d|[[e]]]]d": "abcd",
    "a\n[[Category:B]]\n[[Kategorie:C|x]]\n[[fr:Titre]]\n[[zh-min-nan:T]]": "a",
    "[[Star Trek: First]] [[Iso:9]] [[de:Wort|x]]": "Star Trek: First Iso:9",
    "a{{cite|x={{b|{{c}}}}|y}}b {{unknown}}c": "ab c",
    "{{convert|5|km}}, {{convert|5|to|10|km|mi}}, {{Cvt|1,200|ft|m|abbr=on}}": (
        "5 km, 5 to 10 km, 1,200 ft"
    ),
    "{{lang|fr|nom}} {{nowrap|no [[wrap]]}} {{lang-de|die}}{{ndash}}x": "nom no wrap die \u2013 x",
    "{{abbr|St|Saint}} {{as of|2010|5}} {{frac|1|2}} {{nowrap|1=a=b}}": "St As of 5 2010 1/2 a=b",
    'a<ref>x [[y]]</ref>b<ref name=x />c<ref name="y">{{z}}</ref >d<REF>e</REF>f': "abcdf",
    "a<!-- {{ -->b<!-- no end [[File:": "ab",
    "a<math>\\frac{{a}}{b}</math>b<gallery>\nFile:x|y\n</gallery>c<pre>[[x</pre>d": "abcd",
    "<nowiki>[[x]] {{y}} ''z'' <b></nowiki> <nowiki/>e": "[[x]] {{y}} ''z'' <b> e",
    "before\n{| class=x\n! h\n|-\n| a || [[b]]\n{|\n| inner\n|}\n|}\nafter": "before\n\nafter",
    "before<table><tr><td>a<table>b</table></table> after": "before after",
    "== One ==\ntext\n=== Two ===\n==Three==\n* {{x}}\n== Four ==\nend": (
        "One\n\ntext\n\nFour\n\nend"
    ),
    "==A==\n===B===\ntext\n===C===\n": "A\n\nB\n\ntext",
    "* a\n** b\n# c\n: d\n; e\n*{{x}}\n*f": "a\nb\nc\nd\ne\nf",
    "a [http://x.org the site] b [http://x.org] [//y.org z] http://z.org": (
        "a the site b z http://z.org"
    ),
    "__NOTOC__a __init__ __NOEDITSECTION__ b __БЕЗ_ОГЛ__": "a __init__ b",
    "A &amp; B&nbsp;C &#91;D&#93; &lt;E&gt; AT&T": "A & B C [D] <E> AT&T",
    "a<br />b<div class='x'>c</div>d<b>e</b><span>f</span> 1 < 2": "a\nb\nc\ndef 1 < 2",
    "Name ({{IPA|x}}; {{lang-fa|خ}}, c. 780) ({{y}}) ( ; , ) is": "Name (x; خ, c. 780) is",
    "-{zh-hans:头发;zh-hant:頭髮}- -{A}-": "头发 A",
    "{| lost\n| row\n|-\n| row\ntext goes on\n\nand on": "text goes on\n\nand on",
    "a {{lost | b\n\nc [[File:x.png|thumb|lost too\n\nd e": "a lost | b\n\nc\n\nd e",
    "x [[File:a|b\n{|\n|c]] d\n|}\ne]] f": "x f",
    "[[a|b|c]] [[ ]] [[]] [[a\n\nb]]": "c a\n\nb",
    "}} ]] x |}\n|}\ny": "x |}\n\ny",
}


@pytest.mark.parametrize(("markup", "text"), MARKUP.items(), ids=range(len(MARKUP)))
def test_markup_becomes_text(markup: str, text: str) -> None:
    assert clean_wiki(markup) == text


def test_a_wiki_hands_over_the_names_of_its_namespaces() -> None:
    markup = "a [[Odd name:x.png|thumb|b]]c [[Category:d]]"
    assert clean_wiki(markup) == "a bc"
    assert clean_wiki(markup, frozenset({"odd name"})) == "a c"


TOKENS = [
    *(
        "{{",
        "}}",
        "[[",
        "]]",
        "|",
        "\n{|",
        "\n|}",
        "<ref>",
        "</ref>",
        "<ref name=a/>",
        "<!--",
        "-->",
    ),
    *(
        "word",
        " ",
        "\n",
        "''",
        "'''",
        "File:",
        "Category:",
        "[http://x ",
        "<b>",
        "==",
        "\n* ",
        "=x=",
    ),
    *("<nowiki>", "</nowiki>", "<table>", "</table>", "lang", "convert", "5", "&amp;", "<math>"),
]


@given(st.lists(st.sampled_from(TOKENS), max_size=60).map("".join))
def test_nothing_of_the_markup_is_left(markup: str) -> None:
    text = clean_wiki(markup)
    if "<nowiki>" not in markup:
        for mark in ("[[", "]]", "{{", "}}", "<ref", "''"):
            assert mark not in text
    assert clean_unicode(text) == text


WORD = st.sampled_from(["one", "two", "three", "naïve", "four.", "ß"])
INLINE = st.recursive(
    WORD,
    lambda inner: st.one_of(
        inner.map("''{}''".format),
        WORD.map("'''{}'''".format),
        st.tuples(WORD, inner).map("[[{0[0]}|{0[1]}]]".format),
        WORD.map("[[{}]]".format),
        WORD.map("[http://example.org {}]".format),
        WORD.map("<b>{}</b>".format),
        WORD.map("{}<!-- x -->".format),
    ),
    max_leaves=3,
)


@given(st.lists(INLINE, min_size=1, max_size=12).map(" ".join))
def test_the_words_of_simple_markup_are_mwparserfromhells(markup: str) -> None:
    expected = mwparserfromhell.parse(markup).strip_code()
    assert clean_wiki(markup).split() == expected.split()


def measure_seconds(clean: Callable[[str], str], text: str) -> float:
    gc.disable()  # it would look at what the other tests left
    began = time.process_time()
    clean(text)
    gc.enable()
    return time.process_time() - began


def check_linear(clean: Callable[[str], str], build: Callable[[int], str], n: int) -> None:
    """Four times the text takes at most nine times the time; quadratic would be sixteen.

    The best of some tries counts, since a busy machine makes any of them slow.
    """
    short = long = 1e9
    for _ in range(8):
        short = min(short, measure_seconds(clean, build(n)))
        long = min(long, measure_seconds(clean, build(4 * n)))
        if long <= 9 * short + 0.05:
            return
    raise AssertionError(f"{short} s, and {long} s for four times the text")


REPEATED = [
    *("{{", "}}", "[[", "]]", "\n{|", "\n|}", "|", "<!--", "<ref", "<ref>", "<nowiki>", "<table>"),
    *("[[a|", "[[a|b ", "{{lang|fr|", "[[File:a|thumb|", "[http://a ", "''[http://a b ", "'''''a"),
    *(
        "'''a''b",
        "<",
        "-{",
        "__",
        "==a==\n",
        "(",
        "( ,",
        "\xa0",
        "{",
        "{{[[",
        "\n{|[[a|",
        "&",
        "(;",
    ),
]


@pytest.mark.parametrize("pattern", REPEATED)
def test_no_markup_takes_more_than_linear_time(pattern: str) -> None:
    check_linear(clean_wiki, lambda n: pattern * (n // len(pattern)), 20_000)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        *(("{{", "}}"), ("[[a|", "]]"), ("{{lang|fr|x ", "}}"), ("\n{|", "\n|}"), ("[[x|y ", "]]")),
        *(("\n{|\n|[[a|", "]]\n|}"), ("<table>", "</table>"), ("{{nowrap|[[a|b ", "]]}}")),
        ("{{nowrap|" + "word " * 20, "}}"),
    ],
)
def test_deep_nesting_takes_linear_time_and_no_recursion(begin: str, end: str) -> None:
    check_linear(clean_wiki, lambda n: begin * n + "z" + end * n, 4000)


def test_a_hundred_thousand_braces() -> None:
    assert clean_wiki("a" + "{{" * 100_000 + "b") == "ab"
    assert clean_wiki("a" + "{{" * 100_000 + "b" + "}}" * 100_000 + "c") == "ac"


# ---- HTML ---------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body><section>
<h1>Title</h1><div class="hatnote">For others see</div><table class="infobox"><tr><td>x</table>
<p>First <b>par</b>agraph<sup class="mw-ref reference">[1]</sup> with
a line &amp; <a href="x">link</a> , and<br>a&nbsp;break.</p>
<figure><figcaption>c</figcaption></figure>
<p>Second<math><mi>x</mi></math>.</p><nav>menu</nav>
<h2>List</h2><ul><li>one</li><li>two <i>x</i></ul>
tail<div>inner</div><span>after</span><script>var x = "<p>";</script><pre>a
b</pre><ol class="references"><li>ref</ol></section></body></html>"""
PAGE_TEXT = (
    "Title\n\nFirst paragraph with a line & link, and\na break.\n\nSecond.\n\nList\n\none\n\n"
    "two x\n\ntail\n\ninner\n\nafter\n\na\nb"
)


def test_a_page_becomes_text() -> None:
    assert clean_html(PAGE) == PAGE_TEXT
    assert clean_html("plain text") == "plain text"
    assert clean_html("<p>x &lt;b&gt; &eacute;") == "x <b> é"


BLOCKS = st.recursive(
    st.sampled_from(["w1", "w2", "<b>w3</b>", "w4<br>w5", "<i>w6</i>w7"]),
    lambda inner: st.one_of(
        inner.map("<p>{}</p>".format),
        inner.map("<div>{}</div>".format),
        inner.map("<ul><li>{0}</li><li>{0}</li></ul>".format),
        inner.map("<table><tr><td>x{}</td></tr></table>".format),
        inner.map("<figure>x{}</figure>".format),
        st.tuples(inner, inner).map(" ".join),
    ),
    max_leaves=8,
)


@given(BLOCKS)
def test_html_keeps_its_words_in_order(page: str) -> None:
    while (shorter := re.sub(r"<(table|figure)>(?:(?!<table|<figure).)*?</\1>", " ", page)) != page:
        page = shorter
    expected = re.findall(r"w\d", page)
    assert re.findall(r"w\d", clean_html(page)) == expected


@given(st.text(st.sampled_from("<>/=\"'&;! -apbtdrliusvg\ud800\0\n"), max_size=200))
def test_broken_html_never_raises(page: str) -> None:
    clean_html(page).encode()


@pytest.mark.parametrize(
    "pattern",
    ["<div>", "<p>", "<font size=1><p>", "<table>", "<a ", "<pre>", "<script>", "<!--", "&"],
)
def test_no_html_takes_more_than_linear_time(pattern: str) -> None:
    check_linear(clean_html, lambda n: pattern * n, 10_000)


# ---- libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "library"), [(wiki, "mwparserfromhell"), (html, "selectolax.lexbor")]
)
def test_a_missing_library_is_told(
    monkeypatch: pytest.MonkeyPatch, module: object, library: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    module._load_parser.cache_clear()
    with pytest.raises(PreflightError, match=f"pip install {library.split('.')[0]}") as caught:
        module.check_library()
    module._load_parser.cache_clear()
    assert caught.value.code == ExitCode.FLAGS


def test_every_cleaner_is_found_by_its_name() -> None:
    for name in CLEANERS.names():
        assert CLEANERS.load(name)("some text") == "some text"
