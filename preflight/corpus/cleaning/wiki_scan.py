"""What is no sentence leaves MediaWiki's markup: references, templates, tables, pictures.

Both passes are linear in the length of the markup, whatever it holds: each token is looked at
once, a stack takes the place of recursion, and what is nested is joined to a small depth only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from preflight.corpus.cleaning.wiki_names import (
    DROPPED_NAMESPACES,
    LANGUAGES,
    OPAQUE_TAGS,
)
from preflight.corpus.cleaning.wiki_templates import expand_template

_MAX_DEPTH = 16  # of links, and of templates that are shown; articles have three

# ---- comments and tags whose content goes -------------------------------------------------------

_OPAQUE = re.compile(rf"<!--|<(nowiki|{'|'.join(OPAQUE_TAGS)})\b([^<>]*)>", re.IGNORECASE)
_CLOSING = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in ("nowiki", *OPAQUE_TAGS)}
_MARKUP = re.compile(r"[][{}|'<>=*#:;_~]|(?<=\n) |\n")


def drop_opaque(markup: str) -> str:
    """Take out comments and the tags whose content is no text; `<nowiki>` becomes entities.

    A comment without an end goes to the end of the page, a tag without an end goes alone: both as
    MediaWiki has it.
    """
    out, at = [], 0
    unclosed: set[str] = set()  # tags of which no end is left, so that none is looked for again
    while match := _OPAQUE.search(markup, at):
        out.append(markup[at : match.start()])
        at = match.end()
        if match[1] is None:
            end = markup.find("-->", at)
            at = len(markup) if end < 0 else end + 3
            continue
        name = match[1].lower()
        if match[2].rstrip().endswith("/") or name in unclosed:
            continue
        closing = _CLOSING[name].search(markup, at)
        if closing is None:
            unclosed.add(name)
            continue
        if name == "nowiki":
            out.append(_MARKUP.sub(lambda m: f"&#{ord(m[0])};", markup[at : closing.start()]))
        at = closing.end()
    out.append(markup[at:])
    return "".join(out)


# ---- templates, tables, links -------------------------------------------------------------------

_LINK, _TEMPLATE, _TABLE, _HTML_TABLE = range(4)
# Each branch begins with one character, so that the search skips text quickly.
_TOKEN = re.compile(
    r"\{\{+|\}\}+|\[\[|\]\]|\||\n[ \t:*#;]*+(?:\{\||\|\}(?!\}))|</?table\b[^<>]*>", re.IGNORECASE
)


@dataclass(slots=True)
class _Frame:
    """Something that was opened: its kind, and where in the output it and its pipes are."""

    kind: int
    begin: int
    pipes: list[int] = field(default_factory=list)
    links_outside: int = 0  # of a table: how many links were open around it


def drop_nested(markup: str, dropped: frozenset[str] = frozenset()) -> str:
    """Take out templates, tables, pictures and categories; of other links keep what they show.

    Args:
        markup: without comments and opaque tags.
        dropped: more names of namespaces, in lower case, whose links show nothing.
    """
    return _Nesting(DROPPED_NAMESPACES | dropped).run("\n" + markup)


class _Nesting:
    """The state of the one pass: pieces of output, and what is open.

    A closing token closes the nearest that it fits; what was opened within and never closed is
    text. Only a table keeps the links around it from being closed within it.
    """

    def __init__(self, dropped: frozenset[str]) -> None:
        self._dropped = dropped
        self._out: list[str] = []
        self._stack: list[_Frame] = []
        self._n_open = [0, 0, 0, 0]  # frames in the stack, by kind

    def run(self, markup: str) -> str:
        """The text of the whole page."""
        at = 0
        for match in _TOKEN.finditer(markup):
            if at < match.start():
                self._out.append(markup[at : match.start()])
            at = match.end()
            self._take(match[0])
        self._out.append(markup[at:])
        while self._stack:
            self._forget()
        return "".join(self._out)

    def _take(self, token: str) -> None:
        first = token[0]
        if first == "|":
            if self._stack:
                self._stack[-1].pipes.append(len(self._out))
            self._out.append("|")
        elif first == "{":
            for _ in range(len(token) // 2):
                self._open(_TEMPLATE)
        elif first == "}":
            for _ in range(min(len(token) // 2, self._n_open[_TEMPLATE])):
                self._close(_TEMPLATE)
        elif token == "[[":
            if self._n_open[_LINK] < _MAX_DEPTH:
                self._open(_LINK)
        elif token == "]]":
            self._close(_LINK)
        elif first == "\n":
            if token[-1] == "|":
                self._open(_TABLE)
            else:
                self._close(_TABLE)
                self._out.append("\n")
        elif token[1] == "/":
            self._close(_HTML_TABLE)
        else:
            self._open(_HTML_TABLE)

    def _open(self, kind: int) -> None:
        frame = _Frame(kind, len(self._out))
        if kind >= _TABLE:
            frame.links_outside, self._n_open[_LINK] = self._n_open[_LINK], 0
        if kind == _TABLE:
            self._out.append("\n|")
        self._n_open[kind] += 1
        self._stack.append(frame)

    def _pop(self) -> _Frame:
        frame = self._stack.pop()
        self._n_open[frame.kind] -= 1
        if frame.kind >= _TABLE:
            self._n_open[_LINK] = frame.links_outside
        return frame

    def _close(self, kind: int) -> None:
        if not self._n_open[kind]:
            return
        while self._stack[-1].kind != kind:
            self._forget()
        frame = self._pop()
        if kind == _LINK:
            self._show_link(frame)
            return
        shown = ""
        if kind == _TEMPLATE and self._n_open[_TEMPLATE] < _MAX_DEPTH:
            shown = self._show_template(frame)
        del self._out[frame.begin :]
        if shown:
            self._out.append(shown)

    def _forget(self) -> None:
        """What was opened last has no end: it is text, but for the line of a picture."""
        frame = self._pop()
        if frame.kind == _TABLE:
            return  # a lost "|}" must not cost the article; lines that begin with "|" go later
        if (
            frame.kind == _LINK
            and frame.pipes
            and self._is_dropped("".join(self._out[frame.begin : frame.pipes[0]]))
        ):
            self._blank_line(frame.begin)

    def _blank_line(self, at: int) -> None:
        for i in range(at, len(self._out)):
            _, end, rest = self._out[i].partition("\n")
            self._out[i] = end + rest
            if end:
                break

    def _show_template(self, frame: _Frame) -> str:
        end = frame.pipes[0] if frame.pipes else len(self._out)
        name = "".join(self._out[frame.begin : end])
        bounds = [*frame.pipes, len(self._out)]
        return expand_template(
            name,
            lambda: ["".join(self._out[a + 1 : b]) for a, b in pairwise(bounds)],
        )

    def _show_link(self, frame: _Frame) -> None:
        out, begin = self._out, frame.begin
        end = frame.pipes[0] if frame.pipes else len(out)
        target = "".join(out[begin:end])
        if self._is_dropped(target):
            del out[begin:]
        elif "\n" in target:  # no link: a pair of brackets around paragraphs
            return
        elif frame.pipes and "".join(out[frame.pipes[-1] + 1 :]).strip():
            for i in range(begin, frame.pipes[-1] + 1):
                out[i] = ""
        else:
            del out[begin:]
            out.append(_show_target(target, has_pipe=bool(frame.pipes)))

    def _is_dropped(self, target: str) -> bool:
        prefix, colon, _ = target.partition(":")
        prefix = prefix.strip().replace("_", " ")
        return bool(colon) and (prefix.lower() in self._dropped or prefix in LANGUAGES)


def _show_target(target: str, *, has_pipe: bool) -> str:
    """What a link without a label shows: its target; with a bare pipe its short form."""
    shown = target.strip().lstrip(":").lstrip("#")
    prefix, colon, name = shown.partition(":")
    if colon and (has_pipe or prefix.strip().lower() in DROPPED_NAMESPACES):
        shown = name
    if has_pipe and shown.endswith(")"):
        shown = shown[: shown.rfind("(")].rstrip() or shown
    return shown
