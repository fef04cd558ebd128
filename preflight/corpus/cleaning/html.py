"""HTML to text: headings, paragraphs and list items of a page, each on its own lines."""

from __future__ import annotations

import functools
import html as entities
import re
from typing import Any

from preflight.core.libraries import import_library
from preflight.corpus.cleaning.plain import clean_unicode

# What is no sentence of the page. The classes are MediaWiki's, as its parser writes them.
_DROPPED = ", ".join(
    (
        *("head", "script", "style", "noscript", "template", "iframe", "object", "svg", "canvas"),
        *("audio", "video", "form", "button", "select", "textarea", "table", "math", "figure"),
        *("nav", "footer", "aside", "[role=navigation]", "[hidden]", ".infobox", ".navbox"),
        *(".vertical-navbox", ".sidebar", ".reflist", ".references", ".mw-references-wrap"),
        *(".reference", ".mw-ref", ".mw-cite-backlink", ".mw-editsection", ".hatnote", ".toc"),
        *(".metadata", ".noprint", ".gallery", ".thumb", ".tright", ".ambox", ".sistersitebox"),
        *(".portalbox", ".shortdescription", ".mwe-math-element", ".catlinks", ".mw-jump-link"),
    )
)
_BREAKS = (
    ("h1,h2,h3,h4,h5,h6,p,div,section,article,main,blockquote,ul,ol,dl,pre,hr,address", "\n\n"),
    ("li,dt,dd,br,summary,option,legend", "\n"),
)
_PREFORMATTED = re.compile(r"<pre\b.*?(?:</pre|\Z)", re.DOTALL | re.IGNORECASE)
_SPACES = re.compile(r"[ \t\r\f\v\xa0]+")
_AROUND_BREAKS = re.compile(r" ?\n ?")
_SPACE_BEFORE = re.compile(r" +(?=[,.;:](?:\s|$))")

# The parser takes quadratic time on elements within elements within elements; a page has 50.
_MAX_DEPTH, _MANY_TAGS = 1000, 1000
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_UNNESTED = frozenset(
    ("br", "img", "hr", "input", "meta", "link", "wbr", "col", "area", "source", "p", "li")
) | frozenset(("td", "th", "tr", "dt", "dd", "option", "tbody"))
_ANY_TAG = re.compile(r"<(?:script|style)\b[^<]*(?:</)?|</?[a-zA-Z][^<>]*>?", re.IGNORECASE)


@functools.cache
def _load_parser() -> Any:
    return import_library("selectolax.lexbor", "selectolax", "--clean html").LexborHTMLParser


def check_library() -> None:
    """PreflightError (FLAGS) when selectolax, which `clean_html` needs, is missing."""
    _load_parser()


def clean_html(html: str) -> str:
    """The text of a page, or of a part of one. It takes any text, however broken its HTML is.

    Tables, figures, formulas, references, infoboxes, navigation and scripts go.

    Raises:
        PreflightError: code FLAGS, when selectolax is not installed.
    """
    parser = _load_parser()
    html = html.encode("utf-8", "replace").decode().replace("\0", "")
    if _is_too_deep(html):
        return clean_unicode(_tidy(entities.unescape(_ANY_TAG.sub("\n", html))))
    if "<pre" in html or "<PRE" in html:  # elsewhere a line feed is but a space
        html = _PREFORMATTED.sub(lambda match: match[0].replace("\n", "<br>"), html)
    tree = parser(html.replace("\n", " "))
    for node in reversed(tree.css(_DROPPED)):  # what is within first: its parent takes it along
        node.decompose()
    return clean_unicode(_tidy(_read_text(tree)))


def _read_text(tree: Any) -> str:
    """All text of the tree, with line breaks put around the elements that are lines."""
    for selector, line_break in _BREAKS:
        for node in tree.css(selector):
            node.insert_before(line_break)
            if node.tag != "br":
                node.insert_after(line_break)
    root = tree.root
    return "" if root is None else root.text()


def _tidy(text: str) -> str:
    text = _AROUND_BREAKS.sub("\n", _SPACES.sub(" ", text))
    return _SPACE_BEFORE.sub("", text).strip()


def _is_too_deep(html: str) -> bool:
    if html.count("<") < _MANY_TAGS:
        return False
    depth = 0
    for slash, name in _TAG.findall(html):
        if name.lower() not in _UNNESTED:
            depth = depth + 1 if not slash else max(depth - 1, 0)
            if depth > _MAX_DEPTH:
                return True
    return False
