"""Text inputs: which files are meant, whether they are text, and the documents in them.

Every source is read once in full (size, SHA-256, UTF-8, documents) before anything is built from
it, and again later; `open_source` and `check_unchanged` see to it that both readings are the same.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import glob
import hashlib
import inspect
import json
import os
import platform
import re
import select
import shlex
import stat
import sysconfig
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import hash_file, publish_file
from preflight.settings import DataSettings

SAMPLE_BYTES = 2_300_000
SAMPLE_NAME = "sample.txt"
_SAMPLE_SEPARATOR = "\x1e"
_READ_BYTES = 2**18  # what is read stays in the cache until it is judged
_MAGIC = (
    (b"\x7fELF", "an ELF program"),
    (b"\x1f\x8b", "gzip data"),
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive (or docx, xlsx, epub)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"BZh91AY", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x93NUMPY", "a numpy array"),
)
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Without a mark: which bytes of each four are mostly NUL, in Latin text and in any UTF-32.
_NUL_SHAPES = {
    "0101": "UTF-16LE",
    "1010": "UTF-16BE",
    "0111": "UTF-32LE",
    "1110": "UTF-32BE",
    "0011": "UTF-32LE",
    "1100": "UTF-32BE",
}


@dataclass(frozen=True)
class Input:
    """A file that `--text-file` means, before it is read; ``name`` goes into metadata.json."""

    name: str
    path: Path
    from_folder: bool = False
    is_pipe: bool = False


@dataclass(frozen=True)
class Source:
    """One text file after the first pass; ``spans`` are begin and end of each document in it."""

    name: str
    path: Path
    size: int
    sha256: str
    signature: tuple[int, ...]
    spans: array  # of 'q': begin, end, begin, end ...


@dataclass(frozen=True)
class Document:
    """The bytes of a source from ``begin`` to ``end``."""

    source: Source
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.end - self.begin


def text_error(path: Path | str, what: str, *more: str) -> PreflightError:
    """The error to raise for a fault in the text at `path`."""
    return PreflightError(ExitCode.TEXT, f"{path}: {what}", *more)


# ---- finding ------------------------------------------------------------------------------------


def find_inputs(settings: DataSettings) -> list[Input]:
    """The files that `--text-file` means, sorted within folders and globs, each once.

    Raises:
        PreflightError: code TEXT for what is missing or no file, FLAGS for a terminal; before
            anything is read.
    """
    inputs: dict[str, Input] = {}
    for given in settings.text_file:
        found = [Path("/dev/stdin" if given == "-" else given)]
        if given != "-" and not os.path.lexists(given) and glob.has_magic(given):
            found = [Path(name) for name in sorted(glob.glob(given, recursive=True))]
            if not found:
                raise text_error(given, "no file matches")
        for path in found:
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                raise text_error(path, error.strerror or str(error), "check --text-file") from None
            if stat.S_ISDIR(mode):
                inside = _walk(path, Path(settings.data_dir))
                if not inside:
                    raise text_error(path, "the folder holds no files")
                for file in inside:
                    name = (Path(path.resolve().name) / file.relative_to(path)).as_posix()
                    inputs.setdefault(os.path.abspath(file), Input(name, file, from_folder=True))
            elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
                item = Input(path.name, path, is_pipe=stat.S_ISFIFO(mode))
                inputs.setdefault(os.path.abspath(path), item)
            elif stat.S_ISCHR(mode) and _is_terminal(path):
                raise PreflightError(
                    ExitCode.FLAGS,
                    f"--text-file {path}: a terminal, not a text file",
                    "give a file, a folder or a pipe",
                )
            else:
                raise text_error(path, "a device or socket, not a text file")
    return list(inputs.values())


def _walk(folder: Path, data_dir: Path) -> list[Path]:
    """Every file below `folder`, in a fixed order; neither hidden ones nor our data nor caches."""
    files: list[Path] = []
    own = os.path.realpath(data_dir)
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__"))
            and os.path.realpath(os.path.join(place, name)) != own
        ]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _is_terminal(path: Path) -> bool:
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    with (
        contextlib.suppress(OSError),
        open(path, "rb", 0, opener=lambda name, mode: os.open(name, mode | flags)) as file,
    ):
        return file.isatty()
    return False


# ---- the first pass: reading and judging --------------------------------------------------------


def scan_inputs(inputs: list[Input], separator: str | None, stop: StopFlag | None) -> list[Source]:
    """The first pass over all sources. Files of a folder that are no text are skipped, and said.

    Raises:
        PreflightError: code TEXT when a file is not UTF-8 text, or there is no text at all;
            SIGINT or SIGTERM when `stop` says so.
    """
    sources: list[Source] = []
    skipped: list[PreflightError] = []
    for item in inputs:
        if stop is not None:
            stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        try:
            sources.append(_scan_file(item, separator))
        except PreflightError as error:
            if not item.from_folder:
                raise
            skipped.append(error)
    if skipped:
        log.info(f"skipped {len(skipped)} of {len(inputs)} files, the first: {skipped[0].lines[0]}")
    if not any(source.spans for source in sources):
        raise (
            skipped[0]
            if skipped
            else text_error(inputs[0].path, "the text is empty", "give a file with text in it")
        )
    return sources


def _scan_file(item: Input, separator: str | None) -> Source:
    """Read one file to its end, whatever its size claims to be, and judge it as text.

    Raises:
        PreflightError: code TEXT when it is unreadable, binary, UTF-16 or -32, not UTF-8, or empty.
    """
    path, digest, decoder = item.path, hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    finder = _SeparatorFinder(separator.encode() if separator else None)
    size = nuls = specials = 0
    tail, blank = b"", True
    try:
        if not path.is_file():  # asked before opening: a pipe within a folder would block
            raise text_error(path, "not a regular file")
        with open(path, "rb", buffering=0) as file:
            signature = _read_signature(file)
            while True:
                block = file.read(_READ_BYTES)
                if not size:
                    _refuse_binary(path, block)
                    if block.startswith(codecs.BOM_UTF8):
                        finder.begin = len(codecs.BOM_UTF8)
                        log.info(f"{path}: a byte order mark at its beginning is left out")
                digest.update(block)  # in a thread of its own the waiting took longer
                nuls += block.count(0) if b"\0" in block else 0  # to look is faster than to count
                if nuls * 10 > size + len(block):
                    raise text_error(path, "binary data (many NUL bytes), not text")
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _explain_not_utf8(path, error, size - waiting) from None
                if not block:
                    break
                blank = blank and not text.strip("\ufeff \t\r\n\v\f\0")
                specials += (tail + block).count(b"<|endoftext|>")
                tail = (tail + block)[-12:]
                finder.feed(block)
                size += len(block)
    except OSError as error:
        raise text_error(path, error.strerror or str(error)) from None
    if blank:
        raise text_error(
            path, "empty" if not size else "holds only whitespace", "give a file with text in it"
        )
    if specials and separator != "<|endoftext|>":
        log.info(
            f"{path}: '<|endoftext|>' stands {specials:,} times in it and is taken as plain text; "
            "--document-separator '<|endoftext|>' would split documents there"
        )
    return Source(item.name, path, size, digest.hexdigest(), signature, finder.finish(size))


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


def _refuse_binary(path: Path, head: bytes) -> None:
    """PreflightError (TEXT) that names what a file is, when it is clearly not UTF-8 text."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            raise text_error(path, f"{kind}, not text", "give a plain text file in UTF-8")
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    sample = head[: min(len(head), 4096) // 4 * 4]
    if encoding is None and len(sample) >= 8 and sample.count(0) * 4 > len(sample):
        shape = "".join(str(int(sample[i::4].count(0) * 5 > len(sample))) for i in range(4))
        encoding = _NUL_SHAPES.get(shape)
    if encoding is not None:
        raise text_error(
            path,
            f"{encoding} text, not UTF-8; convert it:",
            f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt",
        )


def _explain_not_utf8(path: Path, error: UnicodeDecodeError, base: int) -> PreflightError:
    offset, line = base + error.start, 1
    with open(path, "rb") as file:  # counted here alone: it would cost every scan a quarter
        for begin in range(0, offset, _READ_BYTES):
            line += file.read(min(_READ_BYTES, offset - begin)).count(b"\n")
    return text_error(
        path,
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,} (line {line:,})",
        f"if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(path))} > utf8.txt",
    )


# ---- reading again ------------------------------------------------------------------------------


def _read_signature(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_source(source: Source) -> IO[bytes]:
    """The source to read again; PreflightError (TEXT) when it is not the file of the first pass."""
    try:
        file = open(source.path, "rb")  # noqa: SIM115
    except OSError as error:
        raise text_error(source.path, error.strerror or str(error)) from None
    if _read_signature(file) != source.signature:
        file.close()
        raise changed_error(source)
    return file


def check_unchanged(source: Source) -> None:
    """PreflightError (TEXT) unless the source's bytes are those of the first pass."""
    with open_source(source) as file:
        same = hash_file(source.path) == source.sha256
        if not same or _read_signature(file) != source.signature:
            raise changed_error(source)


def changed_error(source: Source) -> PreflightError:
    """The error to raise when a source is not what it was in the first pass."""
    return text_error(
        source.path,
        "changed while it was being read; nothing was published",
        "run the same command again when the file is at rest",
    )


def describe_sources(sources: list[Source]) -> list[dict[str, Any]]:
    """The sources as metadata.json keeps them, without their folders.

    Very many are summed up in one entry, since metadata.json has a size limit.
    """
    entries = [{"name": s.name, "size": s.size, "sha256": s.sha256} for s in sources]
    if len(entries) <= 10_000:
        return entries
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return [
        {"name": f"{len(entries)} files", "size": sum(s.size for s in sources), "sha256": digest}
    ]


# ---- pipes and the built-in sample --------------------------------------------------------------


def gather_sources(
    inputs: list[Input], folder: Path, separator: str | None, stop: StopFlag | None
) -> list[Source]:
    """Scan all inputs, pipes copied into `folder` first; without any, the built-in sample.

    Raises:
        PreflightError: as `scan_inputs`; TEXT for a pipe that nobody writes to; STORAGE.
    """
    if inputs:
        ready = [
            Input(item.name, _spool_pipe(item.path, folder / f"pipe-{number}", stop))
            if item.is_pipe
            else item
            for number, item in enumerate(inputs)
        ]
        return scan_inputs(ready, separator, stop)
    log.info(
        "no --text-file given and the data folder is empty: preparing the built-in sample, "
        "the documentation that comes with Python"
    )
    name, path = f"built-in sample (python {platform.python_version()})", folder / SAMPLE_NAME
    content = _SAMPLE_SEPARATOR.join(_build_sample()).encode()
    with publish_file(path, len(content)) as file:
        file.write(content)
    return scan_inputs([Input(name, path)], _SAMPLE_SEPARATOR, stop)


def _spool_pipe(path: Path, target: Path, stop: StopFlag | None) -> Path:
    """Copy a pipe to a file, since the text is read twice; PreflightError (TEXT) if none writes."""
    log.info(f"{path} is a pipe: it is copied first, and cannot be read again to resume")
    began, waited = time.monotonic(), False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a plain open may block for ever
    except OSError as error:
        raise text_error(path, error.strerror or str(error)) from None
    with open(descriptor, "rb", buffering=0) as pipe, publish_file(target) as file:
        while True:
            if stop is not None:
                stop.leave_if_stopping("stopped while reading a pipe; nothing was changed")
            select.select([pipe], [], [], 0.5)
            data = pipe.read(_READ_BYTES)  # None: nothing yet; empty: no writer, or no more
            if data:
                file.write(data)
            elif data is not None and file.tell():
                return target
            elif not file.tell():
                seconds = time.monotonic() - began
                if seconds > 5 and not waited:
                    waited = True
                    log.info(f"{path}: nothing has been written to this pipe yet; waiting")
                if seconds > 60:
                    raise text_error(path, "nothing was written to this pipe for a minute")
                time.sleep(0.05)


def _build_sample() -> list[str]:
    """The English prose that comes with every Python, one document per topic or module.

    Documentation topics, then docstrings of the standard library in the order of file names, up
    to `SAMPLE_BYTES`.
    """
    from pydoc_data import topics  # large, and needed here alone

    documents = [text for _, text in sorted(topics.topics.items())]
    size = sum(len(text.encode()) for text in documents)
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "__pycache__",
    }
    for path in sorted(library.rglob("*.py")):
        if size >= SAMPLE_BYTES:
            break
        if skipped & set(path.relative_to(library).parts):
            continue
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            text = "\n\n\n".join(_find_docstrings(ast.parse(path.read_bytes()), path.stem))
            if text:
                documents.append(text + "\n")
                size += len(text.encode()) + 1
    return [_flow(text.replace(_SAMPLE_SEPARATOR, " ")) for text in documents]


def _flow(text: str) -> str:
    """Paragraphs on one line each: a small model then learns words, not runs of spaces."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def _find_docstrings(tree: ast.Module, name: str) -> Iterator[str]:
    """Module, class and function docstrings in their order, each under its qualified name."""
    waiting: list[tuple[str, Any]] = [(name, tree)]
    while waiting:
        label, node = waiting.pop()
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield f"{label}\n\n{inspect.cleandoc(text)}"
        inner = [
            child
            for child in node.body
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        waiting += [(f"{label}.{child.name}", child) for child in reversed(inner)]
