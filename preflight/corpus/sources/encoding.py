"""Whether the beginning of a file is UTF-8 text, and what it is otherwise."""

from __future__ import annotations

import shlex
from pathlib import Path

from preflight.corpus.sources.compressed import PlainReader, strip_suffix
from preflight.corpus.sources.protocol import text_error

_HEAD_BYTES = 2**16
_UNPACK = {"gz": "gzip -dc", "bz2": "bzip2 -dc", "xz": "xz -dc", "zst": "zstd -dc"}
_SUFFIXES = {
    "gzip data": ".gz",
    "bzip2 data": ".bz2",
    "xz data": ".xz",
    "zstd data": ".zst",
}
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


def read_head(reader: PlainReader) -> bytes:
    """The first 64 KiB of a file's plain bytes.

    Raises:
        PreflightError: code TEXT, when they are clearly no UTF-8 text.
    """
    head = b""
    while len(head) < _HEAD_BYTES and (data := reader.read(_HEAD_BYTES - len(head))):
        head += data
    refuse_binary(reader.path, head)
    if head.count(0) * 10 > len(head):
        raise text_error(reader.path, "binary data (many NUL bytes), not text")
    return head


def refuse_binary(path: Path, head: bytes) -> None:
    """Refuse what is clearly not UTF-8 text.

    Args:
        path: the file, compressed or not.
        head: its first plain bytes.

    Raises:
        PreflightError: code TEXT; it names what the file is.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            suffix = _SUFFIXES.get(kind)
            advice = f"if it is compressed text, let its name end in {suffix}" if suffix else ""
            raise text_error(path, f"{kind}, not text", advice or "give a plain text file in UTF-8")
    if head[257:262] == b"ustar":
        raise text_error(path, "a tar archive, not text", "unpack it, and give the folder")
    encoding = _guess_wide_encoding(head)
    if encoding is not None:
        place, packed = shlex.quote(str(path)), strip_suffix(path)[1]
        convert = f"iconv -f {encoding} -t UTF-8"
        raise text_error(
            path,
            f"{encoding} text, not UTF-8; convert it:",
            f"{_UNPACK[packed]} {place} | {convert} > utf8.txt"
            if packed
            else f"{convert} {place} > utf8.txt",
        )


def _guess_wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by a mark or by where NUL bytes are; None otherwise."""
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    sample = head[: min(len(head), 4096) // 4 * 4]
    if encoding is None and len(sample) >= 8 and sample.count(0) * 4 > len(sample):
        shape = "".join(str(int(sample[i::4].count(0) * 5 > len(sample))) for i in range(4))
        encoding = _NUL_SHAPES.get(shape)
    return encoding
