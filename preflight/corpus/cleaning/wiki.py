"""MediaWiki's markup to text: the sentences, headings and list items of an article.

References, templates, tables, pictures, galleries, formulas and code go; of links their words
stay. What is nested or opaque is taken out first in two linear passes (`wiki_scan`), since
mwparserfromhell alone is slow on it and leaves it in the text. What is left is a line with links to
the web and quotes for bold and italics, which mwparserfromhell reads.
"""

from __future__ import annotations

import functools
import html
import re
from typing import Any

from preflight.core.libraries import import_library
from preflight.corpus.cleaning.plain import clean_unicode
from preflight.corpus.cleaning.wiki_names import BLOCK_TAGS
from preflight.corpus.cleaning.wiki_scan import drop_nested, drop_opaque

_BLOCK = re.compile(rf"</?(?:{'|'.join(BLOCK_TAGS)})\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_OPEN_TAG = re.compile(r"<(?:ref|references|gallery|math)\b[^<>\n]*", re.IGNORECASE)
# Chinese: -{zh-hans:A;zh-hant:B}- shows one of the two, -{A}- just A.
_VARIANTS = re.compile(r"-\{([^{}]{0,300})\}-")
_SWITCH = re.compile(
    r"__(?:NO|FORCE)?TOC__|__[A-Z]*(?:GALLERY|EDITSECTION|NEWSECTIONLINK|INDEX|CONTENTCONVERT"
    r"|TITLECONVERT|CC|TC|CAT|REDIRECT|DISAMBIG|STATIC)[A-Z]*__|__[^\W\da-z_]*[^\x00-\x7f]\w*?__"
)
_HEADING = re.compile(r"(={1,6})(.+?)\1\s*")
_LIST = re.compile(r"[*#:;]+\s*")
_EMPTY_BRACKETS = re.compile(r" ?\((?:[\s,;:/\u2013\u2014-]|or|and)*\)")
_OPENED_BRACKET = re.compile(r"\((?:\s*[,;:])+\s*|\(\s+")
_CLOSED_BRACKET = re.compile(r"(?:\s*[,;:])*\s*\)")
_SPACES = re.compile(r"[ \t\xa0]{2,}|[\t\xa0]")
_SPACE_BEFORE = re.compile(r" +(?=[,.;:](?:\s|$))")
_INLINE = re.compile(r"''|\[(?:[a-z]{2,12}:|//)", re.IGNORECASE)
# mwparserfromhell takes quadratic time on unclosed marks in one text. A line with more than this,
# or a longer one, holds no sentences, and its marks are just taken out.
_MAX_MARKS, _MAX_LINE = 100, 20_000
_MARKS = re.compile(r"'{2,}|\[(?:https?:|ftp:|mailto:|//)[^][\s]*|\]", re.IGNORECASE)


@functools.cache
def _load_parser() -> Any:
    return import_library("mwparserfromhell", "mwparserfromhell", "--clean wiki")


def check_library() -> None:
    """PreflightError (FLAGS) when mwparserfromhell, which `clean_wiki` needs, is missing."""
    _load_parser()


def clean_wiki(markup: str, dropped: frozenset[str] = frozenset()) -> str:
    """The text of an article: a heading, a paragraph or a list item is a line.

    Code and formulas leave no trace. A heading below which nothing is left goes too.

    Args:
        markup: of one page, its XML entities decoded.
        dropped: the wiki's own names of the namespaces whose links show nothing (files,
            categories), in lower case; those of about 50 languages are known anyway.

    Raises:
        PreflightError: code FLAGS, when mwparserfromhell is not installed.
    """
    parser = _load_parser()
    text = drop_nested(drop_opaque(markup.replace("\r", "")), dropped)
    text = _BLOCK.sub("\n", text)
    text = _OPEN_TAG.sub("", _TAG.sub("", text))
    text = _SWITCH.sub("", _VARIANTS.sub(_show_variant, text))
    lines: list[tuple[int, str]] = []  # the level of a heading or 0, and the line
    for line in text.split("\n"):
        level, line, is_item = _strip_line(line)
        if _INLINE.search(line):
            line = _read_inline(parser, line)
        line = _tidy(html.unescape(line) if "&" in line else line)
        if line or (lines and lines[-1][1] and not is_item):
            lines.append((level if line else 0, line))
    return clean_unicode("\n".join(_drop_empty_sections(lines)).strip())


def _show_variant(match: re.Match[str]) -> str:
    first = match[1].split(";")[0]
    return first.rpartition(":")[2] if re.match(r"\s*zh(-\w+)?\s*:", first) else first


def _strip_line(line: str) -> tuple[int, str, bool]:
    """The level of a heading, the line without its marks, and whether it is an item of a list."""
    line = line.strip()
    if line.startswith("="):
        heading = _HEADING.fullmatch(line)
        if heading is not None:
            return len(heading[1]), heading[2].strip(), False
    if line.startswith(("|", "----")):  # a row of a table whose begin or end is lost; a rule
        return 0, "", False
    marks = _LIST.match(line)
    return (0, line[marks.end() :], True) if marks else (0, line, False)


def _read_inline(parser: Any, line: str) -> str:
    """The line without bold, italics and the addresses of links to the web."""
    if len(line) > _MAX_LINE or len(_INLINE.findall(line)) > _MAX_MARKS:
        return _MARKS.sub("", line)
    stripped = parser.parse(line).strip_code(normalize=False, collapse=False)
    return _MARKS.sub("", str(stripped)) if _INLINE.search(stripped) else str(stripped)


def _tidy(line: str) -> str:
    """The line without the holes that a template or a formula left."""
    line = _SPACES.sub(" ", line)
    if "(" in line:
        line = _OPENED_BRACKET.sub("(", _EMPTY_BRACKETS.sub("", line))
        line = _CLOSED_BRACKET.sub(")", line)
    line = _SPACE_BEFORE.sub("", line).strip()
    return line if any(map(str.isalnum, line)) else ""


def _drop_empty_sections(lines: list[tuple[int, str]]) -> list[str]:
    """The lines without headings that only another heading of their level, or nothing, follows."""
    kept: list[str] = []
    below = 7  # the level of the heading that comes next; 0 when text comes
    for level, line in reversed(lines):
        if not line:
            kept.append("")
        elif not level:
            kept.append(line)
            below = 0
        elif below == 0 or level < below < 7:
            kept += ["", line, ""]
            below = level
        else:
            below = below if below <= level else level
    return kept[::-1]
