"""Files as streams of plain bytes: as they are, or out of gzip, bzip2, xz and zstd.

All members of a file are read, one after the other, in bounded memory and without a copy on the
disk. The places where members begin are kept, so that a reading can continue at the last of them.
"""

from __future__ import annotations

import bz2
import lzma
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from preflight.core.errors import PreflightError
from preflight.core.libraries import import_library
from preflight.core.units import format_bytes
from preflight.corpus.sources.protocol import text_error

BOMB_AFTER_BYTES = 64 * 2**20  # of plain text, before its ratio is looked at
MAX_RATIO = 1000  # plain to stored bytes
MAX_WINDOW_BYTES = 2**28  # that zstd and xz may ask for; ``zstd --long`` asks for half of it

_STORED_BYTES = 2**16  # read from the file at once, and how exactly a damage is located
_PLAIN_BYTES = 2**20  # given at once at most
_MIN_DISTANCE = 2**16  # plain bytes between two starts that are kept
_N_STARTS = 4096  # so that at least the last 256 MiB can be continued from a near start


@dataclass(frozen=True)
class _Format:
    """How one kind of compressed data is read.

    Attributes:
        name: the tool's name.
        is_start: whether bytes can begin a member; fewer bytes than it needs: whether they may.
        build: (path) -> an object like `bz2.BZ2Decompressor`, for one member.
        errors: what that object raises for damaged data.
        padding: NUL bytes may stand between members in multiples of this; 0: never.
    """

    name: str
    is_start: Callable[[bytes], bool]
    build: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    padding: int = 0


class _GzipMember:
    """`zlib.decompressobj` with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)  # a gzip header, and its checksum
        self._tail = b""
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._inflate.decompress(self._tail + data if self._tail else data, max_length)
        self._tail = self._inflate.unconsumed_tail
        # Output can wait inside even when all input is taken.
        self.needs_input = not self._tail and len(plain) < max_length
        return plain

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


def _load_zstd(path: Path) -> Any:
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return import_library(module, "backports.zstd", str(path))


def _build_zstd(path: Path) -> Any:
    zstd = _load_zstd(path)
    parameter = zstd.DecompressionParameter.window_log_max
    return zstd.ZstdDecompressor(options={parameter: MAX_WINDOW_BYTES.bit_length() - 1})


def _is_zstd(head: bytes) -> bool:
    """A frame, or a skippable frame (RFC 8878, 3.1)."""
    if head[:1] and 0x50 <= head[0] <= 0x5F:
        return b"\x2a\x4d\x18".startswith(head[1:4])
    return b"\x28\xb5\x2f\xfd".startswith(head[:4])


def _is_bzip2(head: bytes) -> bool:
    """``BZh``, a level, and the mark of a block or, in an empty stream, of the end."""
    return (
        b"BZh".startswith(head[:3])
        and all(0x31 <= level <= 0x39 for level in head[3:4])
        and (b"1AY".startswith(head[4:7]) or b"\x17\x72\x45".startswith(head[4:7]))
    )


_FORMATS = {
    "gz": _Format(
        "gzip",
        lambda head: b"\x1f\x8b\x08".startswith(head[:3]),
        lambda path: _GzipMember(),
        (zlib.error,),
        padding=1,
    ),
    "bz2": _Format("bzip2", _is_bzip2, lambda path: bz2.BZ2Decompressor(), (OSError, ValueError)),
    "xz": _Format(
        "xz",
        lambda head: b"\xfd7zXZ\0".startswith(head[:6]),
        lambda path: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES + 2**24),
        (lzma.LZMAError,),
        padding=4,
    ),
    "zst": _Format("zstd", _is_zstd, _build_zstd, (Exception,)),  # ZstdError, once it is imported
}
_HEAD_BYTES = 7  # enough for each `is_start`


def strip_suffix(path: Path) -> tuple[Path, str]:
    """The name without ``.gz .bz2 .xz .zst``, and which of them it was, or ''."""
    kind = path.suffix[1:].lower()
    return (path.with_suffix(""), kind) if kind in _FORMATS else (path, "")


def open_stream(path: Path, position: list[int] | None = None) -> PlainReader:
    """Open a file to read its plain bytes; its name says whether and how it is compressed.

    Args:
        path: a regular file.
        position: of an earlier reader's `position_at`; without it, the beginning.

    Raises:
        PreflightError: code TEXT for what cannot be read, is damaged or is not of its name's kind;
            FLAGS for a missing library.
    """
    kind = strip_suffix(path)[1]
    reader = _UnpackingReader(path, _FORMATS[kind]) if kind else PlainReader(path)
    try:
        reader.start(position or [0, 0, 0])
    except BaseException:
        reader.close()
        raise
    return reader


class PlainReader:
    """The bytes of a file as they are.

    Attributes:
        path: the file.
        plain_offset: where the next `read` begins, in plain bytes from the file's beginning.
        stored_offset: how many bytes of the file were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plain_offset = self.stored_offset = 0
        try:
            if not os.path.isfile(path):  # asked before: a pipe would block
                raise text_error(
                    path, "not a regular file" if os.path.exists(path) else "no such file"
                )
            self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _explain(path, error) from None

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def start(self, position: list[int]) -> None:
        """Go to a position; `open_stream` calls it."""
        stored, plain, wanted = position
        self._file.seek(stored)
        self.stored_offset, self.plain_offset = stored, plain
        while self.plain_offset < wanted:
            if not self.read(min(_PLAIN_BYTES, wanted - self.plain_offset)):
                raise text_error(
                    self.path, f"ends at byte {self.plain_offset:,}, but byte {wanted:,} was asked"
                )

    def read(self, n_bytes: int) -> bytes:
        """Between 1 and `n_bytes` bytes; none only at the end.

        Raises:
            PreflightError: code TEXT, where the file cannot be read or is damaged.
        """
        data = self._read_stored(min(n_bytes, _PLAIN_BYTES))
        self.plain_offset += len(data)
        return data

    def _read_stored(self, n_bytes: int) -> bytes:
        try:
            data = self._file.read(n_bytes)
        except OSError as error:
            raise _explain(self.path, error) from None
        self.stored_offset += len(data)
        return data

    def position_at(self, plain_offset: int) -> list[int]:
        """A JSON value; `open_stream` with it continues exactly at that plain byte.

        That is fast for offsets within the last 256 MiB before `plain_offset`.
        """
        return [plain_offset, plain_offset, plain_offset]

    def read_signature(self) -> tuple[int, ...]:
        """What changes when somebody writes to the file: device, inode, size, time."""
        status = os.fstat(self._file.fileno())
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _explain(path: Path, error: OSError) -> PreflightError:
    return text_error(path, error.strerror or str(error))


class _UnpackingReader(PlainReader):
    """The plain bytes of a compressed file, member after member."""

    def __init__(self, path: Path, form: _Format) -> None:
        super().__init__(path)
        self._format = form
        self._member: Any = None
        self._rest = b""  # stored bytes that no member has taken yet
        self._starts: deque[tuple[int, int]] = deque([(0, 0)], maxlen=_N_STARTS)  # stored, plain
        self._member_plain = 0  # where the current member begins

    def start(self, position: list[int]) -> None:
        """Go to the start that `position` names, and from there to its plain byte."""
        self._starts.append((position[0], position[1]))
        super().start(position)
        if not position[2]:
            self._open_member()  # so that a file of another kind is refused at once

    def position_at(self, plain_offset: int) -> list[int]:
        """As of `PlainReader`. Before the oldest start that is kept: from the beginning."""
        starts = (start for start in reversed(self._starts) if start[1] <= plain_offset)
        stored, plain = next(starts, (0, 0))
        return [stored, plain, plain_offset]

    def read(self, n_bytes: int) -> bytes:
        """As of `PlainReader`."""
        while self._member is not None or self._open_member():
            data = b""
            if self._member.needs_input:
                data, self._rest = self._rest or self._read_stored(_STORED_BYTES), b""
                if not data:
                    raise self._cut_off_error()
            try:
                plain = self._member.decompress(data, min(n_bytes, _PLAIN_BYTES))
            except self._format.errors as error:
                raise self._explain_damage(error) from None
            if self._member.eof:
                self._rest, self._member = self._member.unused_data, None
            if plain:
                self.plain_offset += len(plain)
                self._refuse_bomb()
                return plain
        return b""

    def _open_member(self) -> bool:
        """Begin the next member; False at the end of the file."""
        self._skip_padding()
        self._fill_rest(_HEAD_BYTES)
        at = self.stored_offset - len(self._rest)
        if not self._rest:
            if not at:
                raise text_error(self.path, f"empty: no {self._format.name} data")
            return False
        if not self._format.is_start(self._rest[:_HEAD_BYTES]):
            raise self._garbage_error(at)
        self._member_plain = self.plain_offset
        if self.plain_offset - self._starts[-1][1] >= _MIN_DISTANCE:
            self._starts.append((at, self.plain_offset))
        self._member = self._format.build(self.path)
        return True

    def _skip_padding(self) -> None:
        """Pass over the NUL bytes that a format allows between members."""
        step, n_nuls = self._format.padding, 0
        while step and self.stored_offset > len(self._rest):  # behind a member
            self._fill_rest(1)
            stripped = self._rest.lstrip(b"\0")
            n_nuls += len(self._rest) - len(stripped)
            if stripped or not self._rest:
                break
            self._rest = b""
        if step and n_nuls:
            self._rest = b"\0" * (n_nuls % step) + stripped  # an odd number is damage

    def _fill_rest(self, n_bytes: int) -> None:
        while len(self._rest) < n_bytes and (data := self._read_stored(_STORED_BYTES)):
            self._rest += data

    def _refuse_bomb(self) -> None:
        plain, stored = self.plain_offset, self.stored_offset
        if plain > BOMB_AFTER_BYTES and plain > MAX_RATIO * stored:
            raise text_error(
                self.path,
                f"its first {stored:,} bytes unpack to more than {plain:,}, {plain // stored:,} "
                f"for one; over {MAX_RATIO:,} are refused",
                "such a file is made to fill a disk; if yours is not, unpack it yourself",
            )

    def _cut_off_error(self) -> PreflightError:
        return text_error(
            self.path,
            f"cut off at its end, byte {self.stored_offset:,}: the {self._format.name} data is "
            "incomplete",
            f"the first {self.plain_offset:,} bytes of its plain text are sound",
            "get the file again",
        )

    def _garbage_error(self, at: int) -> PreflightError:
        name = self._format.name
        if not at:
            return text_error(
                self.path,
                f"no {name} data, although its name says so",
                "rename it by what it is",
            )
        return text_error(
            self.path,
            f"damaged at byte {at:,}: what follows there is no {name} data",
            f"the {self.plain_offset:,} bytes of plain text before it are sound",
            "get the file again",
        )

    def _explain_damage(self, error: Exception) -> PreflightError:
        name = self._format.name
        if "memory" in str(error).lower():
            return text_error(
                self.path,
                f"{name} needs more than {format_bytes(MAX_WINDOW_BYTES)} of memory to unpack it",
                "pack it anew with a smaller window, such as: zstd -dc --long=31 FILE | "
                "zstd --long=27 -o NEW.zst",
            )
        end, begin = self.stored_offset, max(self.stored_offset - _STORED_BYTES, 0)
        return text_error(
            self.path,
            f"damaged between bytes {begin:,} and {end:,} of the file: {name}: {error}",
            f"the first {self._member_plain:,} bytes of its plain text are sound (whole members); "
            f"{self.plain_offset:,} were unpacked",
            "get the file again",
        )
