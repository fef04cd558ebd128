"""The pages of a MediaWiki dump: where they end, and what is in them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from preflight.core.errors import PreflightError
from preflight.core.log import log
from preflight.corpus.cleaning.wiki import check_library, clean_wiki
from preflight.corpus.sources.compressed import PlainReader
from preflight.corpus.sources.protocol import text_error
from preflight.corpus.sources.rows import MAX_ROW_BYTES, Row

_READ_BYTES = 2**18
_TITLE = re.compile(r"<title>([^<]*)</title>")
_REDIRECT = re.compile(r"\s*#REDIRECT\b", re.IGNORECASE)
_PAGE = re.compile(r"<page\b")


# ---- cutting ------------------------------------------------------------------------------------


class PageCutter:
    """Cuts the bytes of a dump behind each ``</page>``. It parses no XML, and decodes nothing.

    In UTF-16, too, it looks for the bytes of the tag, so that positions are exact.

    Attributes:
        offset: of the plain byte behind the last page that was given.
        row: the number of the page there, from 0.
    """

    def __init__(self, reader: PlainReader, encoding: str, row: int) -> None:
        self.offset, self.row = reader.plain_offset, row
        self._reader, self._encoding = reader, encoding
        self._unit = 1 if encoding == "utf-8" else 2  # bytes: a tag begins at a multiple of it
        self._end = "</page>".encode(encoding)
        self._data = bytearray()  # from `offset` on, without what was left out of a long page
        self._searched = 0  # no page ends before this place in the data
        self._ready = self._n_ready = 0  # the end of the last whole page, and how many there are
        self._n_left_out = 0  # bytes of the first page in the data
        self._long_head: bytes | None = None  # of the first page, when only its head is kept

    def cut(self, n_bytes: int) -> Iterator[bytes]:
        """Whole pages, at least `n_bytes` at once but for the last and before a long one.

        Raises:
            PreflightError: code TEXT; see `WikiDump.batches`.
        """
        while self._read():
            self._find_ends()
            is_long = len(self._data) - self._ready > MAX_ROW_BYTES
            if self._ready >= n_bytes or (is_long and self._ready):
                yield self._give()
            if is_long:
                self._shorten()
        self._check_end()
        if self._ready:
            yield self._give()

    def _read(self) -> bool:
        try:
            data = self._reader.read(_READ_BYTES)
        except PreflightError as error:
            more = f"{self.row + self._n_ready:,} pages before that are whole"
            raise PreflightError(error.code, *error.lines, more) from None
        self._data += data
        return bool(data)

    def _find_ends(self) -> None:
        while (found := self._find(self._end, self._searched)) >= 0:
            if self._long_head is not None:
                self._n_left_out += found - len(self._long_head)
                self._data[:found] = self._long_head
                found, self._long_head = len(self._long_head), None
            self._searched = self._ready = found + len(self._end)
            self._n_ready += 1
        self._searched = max(self._searched, len(self._data) - len(self._end))

    def _find(self, mark: bytes, at: int, *, last: bool = False) -> int:
        """The first place of `mark` from `at` on, or the last one before `at`; -1: none."""
        while True:
            found = self._data.rfind(mark, 0, at) if last else self._data.find(mark, at)
            if found < 0 or found % self._unit == 0:
                return found
            at = found + len(mark) - 1 if last else found + 1

    def _give(self) -> bytes:
        pages = bytes(self._data[: self._ready])
        del self._data[: self._ready]
        self.offset += self._ready + self._n_left_out
        self.row += self._n_ready
        self._searched -= self._ready
        self._ready = self._n_ready = self._n_left_out = 0
        return pages

    def _shorten(self) -> None:
        """Leave old revisions out of a page above `MAX_ROW_BYTES`, or all but its title.

        MediaWiki stores no revision above 2 MiB; a page is longer in a dump with its whole history.
        """
        first = max(self._find("<revision>".encode(self._encoding), 0), 0)
        end = self._find("</revision>".encode(self._encoding), len(self._data), last=True)
        newest = self._find("<revision>".encode(self._encoding), max(end, 0), last=True)
        size = len(self._data)
        if newest >= first and size - newest < MAX_ROW_BYTES // 2 and self._long_head is None:
            del self._data[first:newest]
        else:
            if self._long_head is None:
                self._long_head = bytes(self._data[:first])
                title = _find_title(self._long_head.decode(self._encoding, "replace"))
                log.warning(
                    f"{self._reader.path}: page {self.row + 1:,}{title} is left out: it has a "
                    f"revision above {MAX_ROW_BYTES // 2**21} MiB"
                )
            tail = self._searched - self._searched % self._unit
            del self._data[:tail]
        self._n_left_out += size - len(self._data)
        self._searched = max(self._searched - (size - len(self._data)), 0)

    def _check_end(self) -> None:
        """PreflightError (TEXT) unless the dump's own end is behind the last page."""
        rest = bytes(self._data[self._ready :]).decode(self._encoding, "replace")
        n_pages = self.row + self._n_ready
        is_open = self._long_head is not None or _PAGE.search(rest) is not None
        has_end = "</mediawiki>" in rest
        if has_end and not is_open:
            return
        head = (self._long_head or b"").decode(self._encoding, "replace")
        page = f"page {n_pages + 1:,}{_find_title(head + rest)}"
        if has_end:
            what = f"{page} has no </page>"
        elif is_open:
            what = f"the dump is cut off in {page}: it has no </mediawiki>"
        else:
            what = f"the dump is cut off behind page {n_pages:,}: it has no </mediawiki>"
        sound = f"the {n_pages:,} pages before that are whole"
        raise text_error(self._reader.path, what, sound, "get the file again")


def _find_title(page: str) -> str:
    """``, 'TITLE'``, as far as the beginning of a page shows it."""
    title = _TITLE.search(page)
    return f", {html.unescape(title[1])!r}," if title else ""


# ---- parsing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WikiParser:
    """Turns whole pages into rows. It can be pickled.

    Attributes:
        label: of the dump.
        encoding: of the pages.
        dropped, others: see `DumpHead`.
        clean: whether the text is clean; otherwise it is markup.
    """

    label: str
    encoding: str
    dropped: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    clean: bool = True

    def __call__(self, payload: bytes, first_row: int) -> Iterator[Row]:
        """A row for each page: of an article its title, an empty line, its text; else empty.

        Of a page with a history, the newest revision counts, which is the last. Redirects, pages
        of other namespaces, deleted texts and what is no wikitext have an empty text.

        Raises:
            PreflightError: code TEXT, for XML that is not well-formed; it names the page.
        """
        for i, page in enumerate(self._decode(payload, first_row)):
            yield self._read_page(page, first_row + i)

    def check_library(self) -> None:
        """PreflightError (FLAGS) when a library that the cleaner needs is missing."""
        if self.clean:
            check_library()

    def _decode(self, payload: bytes, first_row: int) -> list[str]:
        try:
            return payload.decode(self.encoding).split("</page>")[:-1]
        except UnicodeDecodeError as error:
            before = payload[: error.start].decode(self.encoding)
            n_pages = before.count("</page>")
            what = f"not {self.encoding.upper()}: byte 0x{payload[error.start]:02x}"
            raise self._page_error(before.split("</page>")[-1], first_row + n_pages, what) from None

    def _page_error(self, page: str, row: int, what: str) -> PreflightError:
        return text_error(
            self.label,
            f"page {row + 1:,}{_find_title(page)} is damaged: {what}",
            "get the file again, or take the page out of it",
        )

    def _read_page(self, page: str, row: int) -> Row:
        begin = _PAGE.search(page)
        try:
            if begin is None:
                raise ElementTree.ParseError("it has no beginning")
            tree = ElementTree.fromstring(f"{page[begin.start() :]}</page>")
        except ElementTree.ParseError as error:
            raise self._page_error(page, row, f"no well-formed XML: {error}") from None
        title = (tree.findtext("title") or "").strip()
        markup = _find_markup(tree)
        if not self._is_article(tree, title) or _REDIRECT.match(markup):
            return Row("", {"title": title})
        text = clean_wiki(markup, self.dropped) if self.clean else markup
        return Row(f"{title}\n\n{text}" if text else "", {"title": title})

    def _is_article(self, tree: ElementTree.Element, title: str) -> bool:
        namespace = tree.findtext("ns")
        if namespace is None:  # dumps from before 2012: only the title tells
            prefix, colon, _ = title.partition(":")
            namespace = "1" if colon and prefix.strip().lower() in self.others else "0"
        return namespace.strip() == "0" and tree.find("redirect") is None


def _find_markup(tree: ElementTree.Element) -> str:
    """The markup of the newest revision; empty when it is deleted or no wikitext."""
    revisions = tree.findall("revision")
    if not revisions or revisions[-1].findtext("model", "wikitext").strip() != "wikitext":
        return ""
    return revisions[-1].findtext("text") or ""
