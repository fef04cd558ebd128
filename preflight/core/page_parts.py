"""An HTML page that needs nothing else and whose texts may be hostile, and figures in words.

The page allows neither scripts nor requests, and every text is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

_TEMPLATE_PATH = Path(__file__).parent / "assets" / "page.html"

# What would be invisible, control a terminal, turn the direction of text or have no encoding: C0
# but tab and line feed, DEL, C1, soft hyphen, zero width, bidi, line separators, byte order mark,
# half characters, private use, noncharacters, tags. Joiners within words stay.
_UNPRINTABLE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff"
)
_IN_TEXT = re.compile(f"[{_UNPRINTABLE}]")
_IN_LINE = re.compile(f"[{_UNPRINTABLE}\t\n]")


class Html(str):
    """Markup. Any other string is text, and is escaped before it comes into the page."""


def build_mark(name: str) -> bytes:
    """How a page of ours begins, so that another program's is not replaced."""
    return f"<!doctype html>\n<!-- {name} -->\n".encode()


def build_page(mark: str, title: str, parts: Iterable[Html]) -> str:
    """The whole page; `mark` is the name in its second line, see `build_mark`."""
    template = Template(_TEMPLATE_PATH.read_text(encoding="utf-8"))
    return template.substitute(mark=mark, title=escape(title), body="\n".join(parts))


def build_figures(figures: Mapping[str, str]) -> Html:
    """Boxes with one figure each, by its name."""
    boxes = [
        build_tag("div", build_tag("dt", name), build_tag("dd", text))
        for name, text in figures.items()
    ]
    return build_tag("dl", *boxes, class_="figures")


def escape(text: str) -> Html:
    """Text as markup that shows it. What cannot be seen is shown as its code point."""
    shown = html.escape(text.replace("\r\n", "\n"))
    return Html(_IN_TEXT.sub(lambda m: f'<span class="code">U+{ord(m[0]):04X}</span>', shown))


def replace_unprintable(line: str) -> str:
    """`line` with everything that would break it or control a terminal as its code point."""
    return _IN_LINE.sub(lambda m: f"<U+{ord(m[0]):04X}>", line)


def format_share(share: float | None) -> str:
    """A share of 1 in percent: ``12.3 %``, ``< 0.1 %``; ``-`` where there is none."""
    if share is None:
        return "-"
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def build_tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. A final ``_`` of an attribute's name is left out, others become ``-``."""
    marks = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(replace_unprintable(value))}"'
        for key, value in attributes.items()
    )
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{marks}>{inner}</{name}>")


def build_table(
    headers: Iterable[str], rows: Iterable[Iterable[str]], *, names: int = 1, class_: str = "plain"
) -> Html:
    """A table. The first `names` columns are text, the others numbers; `Html` cells are bars."""
    headers, body = list(headers), []
    kinds = ["name"] + ["text-cell"] * (names - 1) + ["number"] * (len(headers) - names)
    for row in rows:
        cells = [
            build_tag(
                "td", cell, class_="bar" if isinstance(cell, Html) else kind, data_label=header
            )
            for cell, kind, header in zip(row, kinds, headers, strict=True)
        ]
        body.append(build_tag("tr", *cells))
    head = [
        build_tag("th", header, class_=kind) for header, kind in zip(headers, kinds, strict=True)
    ]
    return build_tag(
        "table",
        build_tag("thead", build_tag("tr", *head)),
        build_tag("tbody", *body),
        class_=class_,
    )


def build_bar(share: float) -> Html:
    """A bar of `share` of the full width; of 0 nothing."""
    kind = "fill" if share else "fill none"
    fill = build_tag("span", class_=kind, style=f"width:{100 * min(share, 1):.2f}%")
    return build_tag("span", fill, class_="track")


def build_example(example: dict[str, Any]) -> Html:
    """The beginning of a document, with its place above."""
    place = f"{example['source']}, row {example['row']:,}"
    return build_tag(
        "figure",
        build_tag("figcaption", place),
        build_tag("div", example["text"], class_="text", dir="auto"),
        class_="example",
    )


def format_large(count: int) -> str:
    """A count in few characters: ``1.02 billion``."""
    for limit, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:,}"


def format_range(first: int, last: int) -> str:
    """``1``, ``256 to 511``."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def format_setting(value: Any) -> str:
    """A JSON value in words."""
    if value is None or value in ("", [], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
