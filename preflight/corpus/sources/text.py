"""Text files: those of a folder or a name, whether they are text, and the documents in them.

A file is read once in full (size, SHA-256, UTF-8, documents) before anything is built from it, and
later once more; both readings are checked to be of the same file.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import shlex
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import hash_file
from preflight.corpus.sources.compressed import PlainReader, open_stream, strip_suffix
from preflight.corpus.sources.encoding import refuse_binary
from preflight.corpus.sources.protocol import Document, Source, SourceFacts, text_error
from preflight.corpus.sources.stored import hash_stored_file
from preflight.settings import DataSettings

END_OF_TEXT = b"<|endoftext|>"
_MARK_NOTE = "a byte order mark at the beginning is left out"
_SPECIAL_NOTE = (
    "'<|endoftext|>' is taken as plain text; --document-separator '<|endoftext|>' would split "
    "documents there"
)
_READ_BYTES = 2**18  # what is read stays in the cache until it is judged


# ---- finding ------------------------------------------------------------------------------------


def find(given: str | None, settings: DataSettings) -> list[TextFile]:
    """The file called `given`.

    Raises:
        PreflightError: code TEXT for what is missing or no file, FLAGS for a terminal; before
            anything is read.
    """
    path, separator = Path(given or ""), settings.document_separator
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise text_error(path, error.strerror or str(error), "check --text-file") from None
    if stat.S_ISCHR(mode) and _is_terminal(path):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--text-file {path}: a terminal, not a text file",
            "give a file, a folder or a pipe",
        )
    if not stat.S_ISREG(mode):
        raise text_error(path, "a device or socket, not a text file")
    return [TextFile(path, separator)]


def walk_folder(folder: Path, own: tuple[str, ...]) -> list[Path]:
    """Every file below `folder`, in a fixed order. What is left out is told, with the first name.

    Left out are hidden files and folders, caches, the folders of a run (`own`), folders that are
    links, since they may lead anywhere, and folders that cannot be read.

    Raises:
        PreflightError: code TEXT, when no file is left.
    """
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}

    def leave_out(kind: str, path: str) -> None:
        left_out.setdefault(kind, []).append(path)

    def note_unreadable(error: OSError) -> None:
        leave_out(f"folders that cannot be read ({error.strerror})", str(error.filename))

    own_places = {os.path.realpath(place) for place in own}
    for place, folders, names in os.walk(folder, onerror=note_unreadable):
        for name in sorted(folders):
            path = os.path.join(place, name)
            if os.path.islink(path):
                leave_out("linked folders", path)
            elif os.path.realpath(path) in own_places:
                leave_out("folders that this program writes", path)
            elif name.startswith((".", "__pycache__")):
                leave_out("hidden folders and caches", path)
            else:
                continue
            folders.remove(name)
        for name in names:
            if name.startswith("."):
                leave_out("hidden files", os.path.join(place, name))
            else:
                files.append(Path(place, name))
    for kind, paths in left_out.items():
        log.info(f"{folder}: {kind} are left out ({len(paths):,}, the first: {min(paths)})")
    if not files:
        raise text_error(folder, "the folder holds no files")
    return sorted(files)


def _is_terminal(path: Path) -> bool:
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    with (
        contextlib.suppress(OSError),
        open(path, "rb", 0, opener=lambda name, mode: os.open(name, mode | flags)) as file,
    ):
        return file.isatty()
    return False


# ---- reading ------------------------------------------------------------------------------------


class TextFile(Source):
    """One file of UTF-8; a separator splits it into documents.

    A compressed one is unpacked as it is read, each time, and never to the disk.
    """

    def __init__(self, path: Path, separator: str | None, name: str | None = None) -> None:
        self.path, self._separator = path, separator
        self.name, self.label = name or path.name, str(path)
        self._is_packed = bool(strip_suffix(path)[1])
        self._signature: tuple[int, ...] = ()
        self._spans = array("q")  # begin, end, begin, end ... of the documents

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Read the file to its end, whatever its size claims to be, and check that it is text.

        Raises:
            PreflightError: code TEXT when it is unreadable, damaged, binary, UTF-16 or -32, not
                UTF-8, or empty; SIGINT or SIGTERM when `stop` says so.
        """
        scanner = _Scanner(self.path, self._separator)
        with open_stream(self.path) as reader:
            self._signature = reader.read_signature()
            while block := reader.read(_READ_BYTES):
                scanner.feed(block)
                if stop is not None:
                    stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        self._spans = scanner.finish()
        size, sha256 = scanner.size, scanner.digest.hexdigest()
        if self._is_packed:
            stored = hash_stored_file(self.path, stop)
            size, sha256 = stored.size, stored.sha256
        sizes = array("q", (self._spans[i + 1] - self._spans[i] for i in self._list_begins()))
        return SourceFacts(size, sha256, sizes, tuple(scanner.notes))

    def _list_begins(self) -> range:
        return range(0, len(self._spans), 2)

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        """The documents from `start` on, the first from its byte `offset` on."""
        begins = self._list_begins()[start:]
        if not begins:
            return
        first = self._spans[begins[0]] + offset
        with self._open([0, 0, first] if self._is_packed else [first] * 3) as reader:
            for i in begins:
                yield self._read(reader, self._spans[i] + offset, self._spans[i + 1])
                offset = 0

    def _read(self, reader: PlainReader, begin: int, end: int) -> Document:
        if not self._is_packed:
            reader.start([begin] * 3)
        while reader.plain_offset < begin:  # a separator, or a document that was not read
            if not reader.read(min(_READ_BYTES, begin - reader.plain_offset)):
                raise self.changed_error()
        while begin < end:
            chunk = reader.read(min(_READ_BYTES, end - begin))
            if not chunk:
                raise self.changed_error()
            yield chunk
            begin += len(chunk)

    def _open(self, position: list[int] | None = None) -> PlainReader:
        reader = open_stream(self.path, position)
        if reader.read_signature() != self._signature:
            reader.close()
            raise self.changed_error()
        return reader

    def check_unchanged(self, facts: SourceFacts) -> None:
        """PreflightError (TEXT) unless the file's bytes are those of the scan."""
        with self._open() as reader:
            same = hash_file(self.path) == facts.sha256
            if not same or reader.read_signature() != self._signature:
                raise self.changed_error()


# ---- scanning -----------------------------------------------------------------------------------


class _Scanner:
    """Whether the bytes of a file that go by are text, and where its documents are."""

    def __init__(self, path: Path, separator: str | None) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._finder = _SeparatorFinder(separator.encode() if separator else None)
        self._is_blank = True
        self._n_nuls = 0
        self.notes: list[str] = []
        self._tail = b""

    def feed(self, block: bytes) -> None:
        """Look at the next block of the file; PreflightError (TEXT) when it is no text."""
        if not self.size:
            refuse_binary(self._path, block)
            if block.startswith(codecs.BOM_UTF8):
                self._finder.begin = len(codecs.BOM_UTF8)
                self.notes.append(_MARK_NOTE)
        self.digest.update(block)  # a thread for it was slower
        if b"\0" in block:  # this test is faster than counting
            self._n_nuls += block.count(0)
            if self._n_nuls * 10 > self.size + len(block):
                raise text_error(self._path, "binary data (many NUL bytes), not text")
        text = self._decode(block)
        self._is_blank = self._is_blank and not text.strip("\ufeff \t\r\n\v\f\0")
        if END_OF_TEXT in self._tail + block and self._finder.separator != END_OF_TEXT:
            self.notes += [_SPECIAL_NOTE] * (_SPECIAL_NOTE not in self.notes)
        self._tail = (self._tail + block)[1 - len(END_OF_TEXT) :]
        self._finder.feed(block)
        self.size += len(block)

    def _decode(self, block: bytes) -> str:
        waiting = len(self._decoder.getstate()[0])
        try:
            return self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _explain_not_utf8(self._path, error, self.size - waiting) from None

    def finish(self) -> array:
        """Begin and end of each document, at the end of the file; PreflightError (TEXT)."""
        self._decode(b"")
        if self._is_blank:
            raise text_error(
                self._path,
                "holds only whitespace" if self.size else "empty",
                "give a file with text in it",
            )
        return self._finder.finish(self.size)


class _SeparatorFinder:
    """Collects begin and end of each non-empty document while the bytes go by."""

    def __init__(self, separator: bytes | None) -> None:
        self.separator = separator
        self.begin = 0
        self._spans = array("q")
        self._rest = b""
        self._position = 0  # in the file, of the first byte of _rest

    def feed(self, block: bytes) -> None:
        """Look for separators in the next block of the file."""
        if self.separator is None:
            return
        data, at = self._rest + block, 0
        while (found := data.find(self.separator, at)) >= 0:
            self._add(self._position + found)
            at = found + len(self.separator)
            self.begin = self._position + at
        at = max(at, len(data) - len(self.separator) + 1)
        self._rest, self._position = data[at:], self._position + at

    def _add(self, end: int) -> None:
        if end > self.begin:
            self._spans.extend((self.begin, end))

    def finish(self, size: int) -> array:
        """The spans of a file of `size` bytes."""
        self._add(size)
        return self._spans


def _explain_not_utf8(path: Path, error: UnicodeDecodeError, base: int) -> PreflightError:
    offset, line = base + error.start, 1
    with open_stream(path) as reader:  # only now: in every scan it would cost a quarter
        while reader.plain_offset < offset:
            line += reader.read(min(_READ_BYTES, offset - reader.plain_offset)).count(b"\n")
    return text_error(
        path,
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,} (line {line:,})",
        f"if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(path))} > utf8.txt",
    )
