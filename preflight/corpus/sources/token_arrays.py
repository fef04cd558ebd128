"""Files that hold token ids already: one-dimensional ``.npy``, nanoGPT's and llm.c's ``.bin``.

nanoGPT's ``prepare.py`` writes uint16 without a header. llm.c's ``data_common.py`` writes 256 int32
(magic, version, number of tokens, zeros) and then uint16 for GPT-2, uint32 for Llama 3. Both are
little endian.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from preflight.core.signals import StopFlag
from preflight.corpus.sources.protocol import Document, Source, SourceFacts, text_error
from preflight.corpus.sources.rows import build_row_facts
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

BLOCK_TOKENS = 2**20  # of one array that `TokenArray.read` yields
_READ_BYTES = 2**20
_ENDINGS = (".npy", ".bin")
_ID_KINDS = ("u2", "u4", "i4", "i8")
_NPY_MAGIC = b"\x93NUMPY"
_HEADER_WORDS = 256  # of llm.c, int32
# llm.c's magic number -> its version, the type of its ids, whose ids they are.
_LLMC = {20240520: (1, "<u2", "GPT-2"), 20240801: (7, "<u4", "Llama 3")}
_HEAD_BYTES = 4096
_LEAST_TEXT_BYTES = 64  # of a file that is taken for text; a few ids may look like it
_LLMC_OTHERS = {
    20240326: "weights",
    20240327: "debug state",
    20240328: "a tokenizer",
    20240522: "an evaluation",
}
# What else is called .bin.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as PyTorch saves weights"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x7fELF", "an ELF program"),
    (b"GGUF", "a GGUF model"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
)
_RAW_NOTE = "taken as nanoGPT's uint16 tokens: the file has no header that would say so"
_NPY_ADVICE = "save the ids with numpy.save as a one-dimensional array of uint16 or uint32"


@dataclass(frozen=True)
class _Layout:
    """Where the ids of a file are, and of what type."""

    offset: int
    dtype: np.dtype
    n_tokens: int
    notes: tuple[str, ...] = ()


def find(given: str | None, settings: DataSettings) -> list[TokenArray] | None:
    """The file of tokens called `given`; None for what is no file called .npy or .bin.

    Raises:
        PreflightError: code TEXT for such a file that holds no token ids, with the reason.
    """
    if given is None or not given.lower().endswith(_ENDINGS):
        return None
    try:
        if not stat.S_ISREG(os.stat(given).st_mode):
            return None
    except OSError:
        return None  # text files say what is wrong with the name
    return [TokenArray(Path(given))]


class TokenArray(Source):
    """One file of token ids.

    Attributes:
        is_tokens: there is nothing to encode.
        n_tokens: ids in the file.
    """

    is_tokens = True

    def __init__(self, path: Path, name: str | None = None) -> None:
        """PreflightError (TEXT) when the file's head says that it holds no token ids."""
        self.path = path
        self.name, self.label = name or path.name, str(path)
        self._signature: tuple[int, ...] = ()
        with self._open() as file:
            self._layout = _read_layout(path, file)
        self._signature = ()  # what changes before the scan is seen by the scan

    @property
    def n_tokens(self) -> int:
        """Ids in the file."""
        return self._layout.n_tokens

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Size and SHA-256 of the file. Ids are checked when they are read: see `check_ids`.

        Raises:
            PreflightError: code TEXT when it holds no token ids, or changes meanwhile; SIGINT or
                SIGTERM when `stop` says so.
        """
        self._signature = ()
        digest, size = hashlib.sha256(), 0
        with self._open() as file:
            self._layout = _read_layout(self.path, file)
            file.seek(0)
            while block := file.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
                if stop is not None:
                    stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        return build_row_facts(size, digest.hexdigest(), *self._layout.notes)

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        """There is no text."""
        raise NotImplementedError(f"{self.label} is read by tokens")

    def read(self, start: int = 0) -> Iterator[np.ndarray]:
        """The ids from token `start` on, in one-dimensional blocks of at most `BLOCK_TOKENS`.

        Blocks have the file's type of integers in the machine's byte order.

        Raises:
            PreflightError: code TEXT, when the file cannot be read or is not that of the scan.
        """
        layout = self._layout
        with self._open() as file:
            file.seek(layout.offset + start * layout.dtype.itemsize)
            for first in range(start, layout.n_tokens, BLOCK_TOKENS):
                n_tokens = min(BLOCK_TOKENS, layout.n_tokens - first)
                content = file.read(n_tokens * layout.dtype.itemsize)
                if len(content) < n_tokens * layout.dtype.itemsize:
                    raise self.changed_error()
                ids = np.frombuffer(content, layout.dtype)
                yield ids.astype(layout.dtype.newbyteorder("="), copy=False)

    def check_ids(self, ids: np.ndarray, vocab_size: int, at: int) -> None:
        """Check that the ids of a block are those of a vocabulary.

        Args:
            ids: a block of `read`.
            vocab_size: ids in the vocabulary.
            at: the index in the file of the first of them.

        Raises:
            PreflightError: code TEXT, with the index of the first id that is none.
        """
        if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            return
        first = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise text_error(
            self.path,
            f"token {at + first:,} (counted from 0) is {int(ids[first])}, but the vocabulary has "
            f"{vocab_size:,} ids",
            "name the tokenizer that made the file with --tokenizer",
        )

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """The file, which must be the same at the end, and the same as before."""
        try:
            with open(self.path, "rb") as file:
                self._signature = self._signature or _read_signature(file)
                if _read_signature(file) != self._signature:
                    raise self.changed_error()
                yield file
                if _read_signature(file) != self._signature:
                    raise self.changed_error()
        except OSError as error:
            raise text_error(self.path, error.strerror or str(error)) from None


def _read_signature(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


# ---- heads --------------------------------------------------------------------------------------


def _read_layout(path: Path, file: IO[bytes]) -> _Layout:
    """What the head of a file says, compared with its size; PreflightError (TEXT)."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD_BYTES)
    if head.startswith(_NPY_MAGIC):
        file.seek(0)
        layout = _read_npy_layout(path, file)
    elif path.suffix.lower() == ".npy":
        what = "not a .npy file: its first bytes are another's" if size else "empty"
        raise text_error(path, what, _NPY_ADVICE)
    else:
        layout = _read_llmc_layout(path, head) or _build_raw_layout(path, head, size)
    if layout.n_tokens == 0:
        raise text_error(path, "holds no tokens", "give a file with tokens in it")
    _check_size(path, layout, size)
    return layout


def _check_size(path: Path, layout: _Layout, size: int) -> None:
    """PreflightError (TEXT) unless the file holds what its header says."""
    expected = layout.offset + layout.n_tokens * layout.dtype.itemsize
    if size == expected:
        return
    held = max(0, size - layout.offset) // layout.dtype.itemsize
    what = f"cut off: its header says {layout.n_tokens:,} tokens, it holds {held:,}"
    if size > expected:
        what = f"{size - expected:,} bytes follow the {layout.n_tokens:,} tokens of its header"
    raise text_error(path, what, "copy or make the file again")


def _read_npy_layout(path: Path, file: IO[bytes]) -> _Layout:
    """The header of a ``.npy`` file, which is never unpickled."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # only for fields whose names are not Latin-1
            raise ValueError(f"version {version[0]}.{version[1]} of the format holds no plain ids")
    except OSError:
        raise
    except Exception as error:  # numpy lets those of Python's tokenizer and parser through
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise text_error(path, f"its .npy header cannot be read: {reason}", _NPY_ADVICE) from None
    if dtype.hasobject:
        raise text_error(path, "a pickled array of objects, which is not read", _NPY_ADVICE)
    if dtype.str[1:] not in _ID_KINDS:
        accepted = "uint16, uint32, int32 and int64"
        raise text_error(path, f"an array of {dtype}; token ids are {accepted}", _NPY_ADVICE)
    if len(shape) != 1:
        what = f"an array of shape {shape}; token ids are one-dimensional"
        raise text_error(path, what, _NPY_ADVICE)
    if shape[0] < 0:
        raise text_error(path, f"its .npy header says {shape[0]} ids", _NPY_ADVICE)
    return _Layout(file.tell(), dtype, shape[0])


def _read_llmc_layout(path: Path, head: bytes) -> _Layout | None:
    """The header of llm.c; None for a file that does not begin with one of its magic numbers."""
    words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")[:_HEADER_WORDS]
    magic = int(words[0]) if len(words) else 0
    if magic in _LLMC_OTHERS:
        raise text_error(path, f"{_LLMC_OTHERS[magic]} of llm.c, not tokens")
    if magic not in _LLMC:
        return None
    version, dtype, vocabulary = _LLMC[magic]
    kind = f"llm.c's tokens of {vocabulary}"
    if len(words) < _HEADER_WORDS:
        raise text_error(path, f"{kind}, cut off within the header", "copy or make the file again")
    if int(words[1]) != version:
        what = f"{kind} in version {words[1]}; version {version} is read"
        raise text_error(path, what, "make the file again with today's llm.c")
    if int(words[2]) < 0:
        raise text_error(path, f"{kind}; its header says {words[2]} tokens")
    return _Layout(4 * _HEADER_WORDS, np.dtype(dtype), int(words[2]), (f"taken as {kind}",))


def _build_raw_layout(path: Path, head: bytes, size: int) -> _Layout:
    """A file without a header: nanoGPT's, where nothing speaks against it."""
    advice = "a .bin is nanoGPT's uint16 tokens or llm.c's; text needs another name, such as .txt"
    for magic, kind in _FOREIGN:
        if head.startswith(magic):
            raise text_error(path, f"{kind}, not tokens", advice)
    if size % 2:
        raise text_error(path, f"{size:,} bytes, an odd number: not uint16 tokens", advice)
    if _is_like_text(head):
        raise text_error(path, "text, not tokens", advice)
    return _Layout(0, np.dtype("<u2"), size // 2, (_RAW_NOTE,))


def _is_like_text(head: bytes) -> bool:
    """Whether bytes are printable UTF-8: ids hold control characters, in common words first."""
    if len(head) < _LEAST_TEXT_BYTES:
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


# ---- sizes --------------------------------------------------------------------------------------


def count_text_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: the bytes of UTF-8 that each id stands for; 0 for special tokens and gaps.

    ``count_text_bytes(tokenizer)[ids].sum()`` is the size of a text, for bits per byte.
    """
    sizes = (len(tokenizer.token_bytes(token) or b"") for token in range(tokenizer.vocab_size))
    return np.fromiter(sizes, np.int64, tokenizer.vocab_size)
