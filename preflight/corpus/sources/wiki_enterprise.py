"""Wikipedia Enterprise's JSON Lines: an article a row, as HTML and as wikitext."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from preflight.core.log import log
from preflight.corpus.cleaning import html, wiki
from preflight.corpus.sources.columns import collect_columns, look_up, read_wanted
from preflight.corpus.sources.compressed import open_stream, strip_suffix
from preflight.corpus.sources.cutting import Payload, RowFile, RowForm, row_error
from preflight.corpus.sources.json_rows import JsonParser, LineSplitter
from preflight.corpus.sources.json_stream import JsonFault, JsonStream
from preflight.corpus.sources.protocol import Document
from preflight.corpus.sources.rows import MAX_ROW_BYTES, Row
from preflight.settings import DataSettings

_NAMES = (".jsonl", ".ndjson", ".json")
_BODY = "article_body"
# The forms of a body, the first that is there is taken: by --clean.
_FORMS = {"wiki": ("wikitext", "html")}
_PREFERRED = ("html", "wikitext")
_CLEANERS: dict[str, Callable[[str], str]] = {
    "html": html.clean_html,
    "wikitext": wiki.clean_wiki,
}


def find(given: str | None, settings: DataSettings) -> list[EnterpriseFile] | None:
    """The file called `given`, when its first row has an `article_body`; None for any other.

    With ``--text-column`` it is a table as any other.

    Raises:
        PreflightError: code TEXT, when a file with such a name cannot be read or unpacked.
    """
    if given is None or settings.text_column is not None or not os.path.isfile(given):
        return None
    path = Path(given)
    if strip_suffix(path)[0].suffix.lower() not in _NAMES or not has_article_body(path):
        return None
    return [EnterpriseFile(path, settings)]


def has_article_body(path: Path) -> bool:
    """Whether a file begins with a JSON object that has an object `article_body`.

    Raises:
        PreflightError: code TEXT, when it cannot be read or unpacked.
    """
    with open_stream(path) as reader:
        stream = JsonStream(iter(partial(reader.read, 2**18), b""))
        try:
            if stream.peek() == b"{":
                for key in stream.read_keys():
                    if key == _BODY:
                        return stream.peek() == b"{"
                    stream.skip_value()
        except JsonFault:
            pass
    return False


class EnterpriseFile(RowFile):
    """One file of articles.

    Attributes:
        is_cleaned: whether `parse` gives clean text, so that no other cleaner may follow.
    """

    def __init__(self, path: Path, settings: DataSettings) -> None:
        super().__init__(path)
        self.is_cleaned = settings.clean in (None, "wiki", "html")
        forms = _FORMS.get(settings.clean or "", _PREFERRED)
        columns = read_wanted(settings).columns
        self._parser = EnterpriseParser(str(path), forms, columns, self.is_cleaned)

    def examine(self) -> RowForm:
        """As of `RowFile`.

        Raises:
            PreflightError: code FLAGS for a missing library.
        """
        if self.is_cleaned:
            html.check_library()
            wiki.check_library()
        return RowForm(0, LineSplitter, self._parser, partial(_leave_out, self.path))


@dataclass(frozen=True)
class EnterpriseParser:
    """Turns lines into articles. It can be pickled.

    Attributes:
        path: of the file, for messages.
        forms: which form of a body is taken, the first that is there.
        columns: the other columns that filters need.
        clean: whether the text is clean; otherwise it is markup.
    """

    path: str
    forms: tuple[str, ...] = _PREFERRED
    columns: tuple[str, ...] = ()
    clean: bool = True

    def __call__(self, payload: Payload, first_row: int) -> Iterator[Row]:
        """A row for each line: the article's name, an empty line, its text.

        Of other namespaces than the articles' the text is empty, and None without any body.

        Raises:
            PreflightError: code TEXT, for what is no JSON, and for half a surrogate pair.
        """
        for row, at, value in JsonParser(self.path, ()).read_lines(*payload, first_row):
            yield Row(self._read_text(value, row, at), collect_columns(value, self.columns))

    def _read_text(self, value: Any, row: int, at: int) -> str | None:
        if value == "":  # an empty line
            return ""
        if look_up(value, ("namespace", "identifier")) not in (None, 0):
            return ""
        bodies = {form: look_up(value, (_BODY, form)) for form in self.forms}
        form = next((f for f in self.forms if isinstance(bodies[f], str) and bodies[f]), None)
        if form is None:
            return None
        text = _CLEANERS[form](bodies[form]) if self.clean else bodies[form]
        name = look_up(value, ("name",))
        text = f"{name.strip()}\n\n{text}" if isinstance(name, str) and text else text
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])[1:-1]
            what = f"half a surrogate pair ({half}) in the text: no UTF-8"
            raise row_error(self.path, row, at, what) from None
        return text


def _leave_out(path: Path, chunks: Iterator[bytes], row: int, offset: int) -> Document:
    """No text, and a warning: markup cannot be cleaned in pieces."""
    log.warning(
        f"{path}: row {row + 1:,} (at byte {offset:,}) is left out: it has more than "
        f"{MAX_ROW_BYTES // 2**20} MiB"
    )
    yield from ()
