"""WikiText's pages: where one begins, and the text that its tokens were made from.

The rules are those of lm-evaluation-harness's task ``wikitext``, so that figures can be compared:
the model reads the page with its spacing restored, while words and bytes are counted on the page
as it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from preflight.evaluation.items import Item

# A heading of the first level begins a page: " = Title = ", while sections have more signs.
_HEADING = re.compile(r" ?= (?!=).+(?<!=) = ?\n?")
# What becomes what, in this order. WikiText (Merity et al. 2016, arXiv:1609.07843) has spaces
# around punctuation, and @ around signs within a number or a word.
_NUMBERS = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PUNCTUATION = tuple((f" {sign} ", f"{sign} ") for sign in ":;.!?,")
_BRACKETS = tuple(
    (re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}"), rf"{left}\1{right}")
    for opening, closing, left, right in (
        (r"\(", r"\)", "(", ")"),
        (r"\[", r"\]", "[", "]"),
        ("{", "}", "{", "}"),
        ('"', '"', '"', '"'),
        ("'", "'", "'", "'"),
    )
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def restore_spacing(page: str) -> str:
    """The text of a page without the spaces and signs that its tokenizer put in."""
    for old, new in _NUMBERS + _PUNCTUATION:
        page = page.replace(old, new)
    for pattern, template in _BRACKETS:
        page = pattern.sub(template, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def build_page(page: str, line: int) -> Item:
    """The item of a stored page; `line` is where it stands in its file."""
    return Item(
        context="",
        continuations=(restore_spacing(page),),
        line=line,
        n_words=count_words(page),
        n_bytes=len(page.encode()),
    )


def count_words(page: str) -> int:
    """Words as the harness counts them: parts between white space, empty ones at the ends too."""
    return len(re.split(r"\s+", page))


def split_pages(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The pages of a WikiText file, each with the number of its first line, from 1."""
    first, page = 1, list[str]()
    for number, line in enumerate(lines, 1):
        if _HEADING.fullmatch(line):
            if "".join(page).strip():
                yield first, "".join(page)
            first, page = number, []
        page.append(line)
    if "".join(page).strip():
        yield first, "".join(page)
