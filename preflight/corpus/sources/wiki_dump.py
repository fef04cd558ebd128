"""MediaWiki's XML dumps, compressed or not: each page is a row, each article has text.

The parent only looks for the ends of pages. A worker process parses the XML of a batch of whole
pages and turns the newest revision of each into text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.core.signals import StopFlag
from preflight.corpus.sources.compressed import open_stream, strip_suffix
from preflight.corpus.sources.protocol import SourceFacts
from preflight.corpus.sources.rows import BATCH_BYTES, Batch, RowSource, build_row_facts
from preflight.corpus.sources.stored import StoredFile, hash_stored_file
from preflight.corpus.sources.wiki_pages import PageCutter, WikiParser
from preflight.settings import DataSettings

# Wikimedia's names end in .xml, or in the range of page ids behind it: .xml-p1p41242
_DUMP_NAME = re.compile(r"\.xml(?:-[^.]*)?$", re.IGNORECASE)
_HEAD_BYTES = 2**14  # <mediawiki stands before this
_SITEINFO_BYTES = 2**18  # and the names of the namespaces before this
_NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>')
_MEDIA, _FILE, _CATEGORY = "-2", "6", "14"
_MARKS = (
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)


def find(given: str | None, settings: DataSettings) -> list[WikiDump] | None:
    """The dump called `given`; None for any other file, also for XML of another kind.

    Raises:
        PreflightError: code TEXT, when a file with such a name cannot be read or unpacked; FLAGS
            for a missing library.
    """
    if given is None or not _DUMP_NAME.search(strip_suffix(Path(given))[0].name):
        return None
    path = Path(given)
    head = read_dump_head(path) if path.is_file() else None
    if head is None:
        return None
    return [WikiDump(path, head, clean=settings.clean in (None, "wiki"))]


@dataclass(frozen=True)
class DumpHead:
    """What stands before the first page.

    Attributes:
        encoding: "utf-8", "utf-16-le" or "utf-16-be".
        dropped: the wiki's names of the namespaces whose links show nothing, in lower case.
        others: the names of all namespaces but that of the articles, in lower case.
    """

    encoding: str
    dropped: frozenset[str]
    others: frozenset[str]


def read_dump_head(path: Path) -> DumpHead | None:
    """The head of a dump; None when the file is none.

    Raises:
        PreflightError: code TEXT, when the file cannot be read or is damaged there.
    """
    with open_stream(path) as reader:
        head = reader.read(_HEAD_BYTES)
        while len(head) < _HEAD_BYTES and (data := reader.read(_HEAD_BYTES)):
            head += data
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
        if "<mediawiki" not in head.decode(encoding, "ignore"):
            return None
        end = "<page>".encode(encoding)
        while end not in head and len(head) < _SITEINFO_BYTES and (data := reader.read(2**14)):
            head += data
    text = head.decode(encoding, "ignore").partition("<page>")[0]
    names = [(key, name.strip().lower()) for key, name in _NAMESPACE.findall(text)]
    return DumpHead(
        encoding,
        frozenset(name for key, name in names if key in (_MEDIA, _FILE, _CATEGORY)),
        frozenset(name for key, name in names if key != "0"),
    )


class WikiDump(RowSource):
    """One dump. A row is a page; all but the articles have an empty text.

    Attributes:
        is_cleaned: whether `parse` gives clean text, so that no other cleaner may follow.
    """

    parse: WikiParser

    def __init__(self, path: Path, head: DumpHead, *, clean: bool = True) -> None:
        self.path, self.name, self.label = path, path.name, str(path)
        self.is_cleaned = clean
        self.parse = WikiParser(str(path), head.encoding, head.dropped, head.others, clean)
        self._stored: StoredFile | None = None

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Hash the file as it is stored, and try what `parse` needs.

        Raises:
            PreflightError: code TEXT when it cannot be read; FLAGS when mwparserfromhell is
                missing; SIGINT or SIGTERM when `stop` says so.
        """
        self.parse.check_library()
        self._stored = hash_stored_file(self.path, stop)
        return build_row_facts(self._stored.size, self._stored.sha256)

    def batches(self, after: Any = None) -> Iterator[Batch]:
        """Whole pages as they are stored, about `BATCH_BYTES` of them.

        Raises:
            PreflightError: code TEXT, when the file is damaged or was changed, or when the dump
                ends before its end; it says in which page, and how many before it are sound.
        """
        after = after or {"position": None, "row": 0, "n_read": 0}
        with open_stream(self.path, after["position"]) as reader:
            if self._stored is not None:
                self._stored.check_unchanged(reader)
            cutter = PageCutter(reader, self.parse.encoding, after["row"])
            for pages in cutter.cut(BATCH_BYTES):
                behind = {
                    "position": reader.position_at(cutter.offset),
                    "row": cutter.row,
                    "n_read": max(reader.stored_offset, after["n_read"]),
                }
                yield Batch(pages, after["row"], behind, behind["n_read"] - after["n_read"])
                after = behind
            if self._stored is not None:
                self._stored.check_unchanged(reader)
