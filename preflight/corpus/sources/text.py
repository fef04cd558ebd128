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
from typing import IO

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import hash_file
from preflight.corpus.sources.compressed import strip_suffix
from preflight.corpus.sources.compressed_text import CompressedText
from preflight.corpus.sources.encoding import refuse_binary
from preflight.corpus.sources.protocol import Document, Source, SourceFacts, text_error
from preflight.settings import DataSettings

END_OF_TEXT = b"<|endoftext|>"
_MARK_NOTE = "a byte order mark at the beginning is left out"
_SPECIAL_NOTE = (
    "'<|endoftext|>' is taken as plain text; --document-separator '<|endoftext|>' would split "
    "documents there"
)
_READ_BYTES = 2**18  # what is read stays in the cache until it is judged


# ---- finding ------------------------------------------------------------------------------------


def find(given: str | None, settings: DataSettings) -> list[Source]:
    """The file called `given`, or the files of that folder, in a fixed order.

    A file whose name says that it is compressed is a source of rows.

    Raises:
        PreflightError: code TEXT for what is missing or no file, FLAGS for a terminal; before
            anything is read.
    """
    path, separator = Path(given or ""), settings.document_separator
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise text_error(path, error.strerror or str(error), "check --text-file") from None
    if stat.S_ISDIR(mode):
        inside = _walk(path, settings.own_folders)
        if not inside:
            raise text_error(path, "the folder holds no files")
        root = Path(path.resolve().name)
        return [
            _choose(file)(
                file, separator, (root / file.relative_to(path)).as_posix(), is_skippable=True
            )
            for file in inside
        ]
    if stat.S_ISCHR(mode) and _is_terminal(path):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--text-file {path}: a terminal, not a text file",
            "give a file, a folder or a pipe",
        )
    if not stat.S_ISREG(mode):
        raise text_error(path, "a device or socket, not a text file")
    return [_choose(path)(path, separator)]


def _choose(path: Path) -> type[TextFile | CompressedText]:
    return CompressedText if strip_suffix(path)[1] else TextFile


def _walk(folder: Path, own: tuple[str, ...]) -> list[Path]:
    """Every file below `folder`, in a fixed order. What is left out is told, with the first name.

    Left out are hidden files and folders, caches, the folders of a run (`own`), folders that are
    links, since they may lead anywhere, and folders that cannot be read.
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
    """One file of UTF-8; a separator splits it into documents."""

    def __init__(
        self,
        path: Path,
        separator: str | None,
        name: str | None = None,
        *,
        is_skippable: bool = False,
    ) -> None:
        self.path, self._separator = path, separator
        self.name, self.label = name or path.name, str(path)
        self.is_skippable = is_skippable
        self._signature: tuple[int, ...] = ()
        self._spans = array("q")  # begin, end, begin, end ... of the documents

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Read the file to its end, whatever its size claims to be, and check that it is text.

        Raises:
            PreflightError: code TEXT when it is unreadable, binary, UTF-16 or -32, not UTF-8, or
                empty; SIGINT or SIGTERM when `stop` says so.
        """
        scanner = _Scanner(self.path, self._separator)
        try:
            if not os.path.isfile(
                self.path
            ):  # asked before opening: a pipe within a folder would block
                raise text_error(self.path, "not a regular file")
            with open(self.path, "rb", buffering=0) as file:
                self._signature = _read_signature(file)
                while block := file.read(_READ_BYTES):
                    scanner.feed(block)
                    if stop is not None:
                        stop.leave_if_stopping(
                            "stopped while reading the text; nothing was changed"
                        )
        except OSError as error:
            raise text_error(self.path, error.strerror or str(error)) from None
        self._spans = scanner.finish()
        sizes = array("q", (self._spans[i + 1] - self._spans[i] for i in self._list_begins()))
        return SourceFacts(scanner.size, scanner.digest.hexdigest(), sizes, tuple(scanner.notes))

    def _list_begins(self) -> range:
        return range(0, len(self._spans), 2)

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        """The documents from `start` on, the first from its byte `offset` on."""
        with self._open() as file:
            for i in self._list_begins()[start:]:
                yield self._read(file, self._spans[i] + offset, self._spans[i + 1])
                offset = 0

    def _read(self, file: IO[bytes], begin: int, end: int) -> Document:
        file.seek(begin)
        while begin < end:
            chunk = file.read(min(_READ_BYTES, end - begin))
            if not chunk:
                raise self.changed_error()
            yield chunk
            begin += len(chunk)

    def _open(self) -> IO[bytes]:
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise text_error(self.path, error.strerror or str(error)) from None
        if _read_signature(file) != self._signature:
            file.close()
            raise self.changed_error()
        return file

    def check_unchanged(self, facts: SourceFacts) -> None:
        """PreflightError (TEXT) unless the file's bytes are those of the scan."""
        with self._open() as file:
            same = hash_file(self.path) == facts.sha256
            if not same or _read_signature(file) != self._signature:
                raise self.changed_error()


def _read_signature(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


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
    with open(path, "rb") as file:  # only now: in every scan it would cost a quarter
        for begin in range(0, offset, _READ_BYTES):
            line += file.read(min(_READ_BYTES, offset - begin)).count(b"\n")
    return text_error(
        path,
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,} (line {line:,})",
        f"if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(path))} > utf8.txt",
    )
