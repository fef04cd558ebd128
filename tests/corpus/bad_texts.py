"""Files that are no text to train on, and what the refusal says."""

from __future__ import annotations

GOOD = "plenty of words to learn from, line after line\n" * 40
BAD_TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "whitespace": (b" \r\n\t" * 50, "only whitespace"),
    "one letter": (b"a", "too short"),
    "ELF": (b"\x7fELF\x02\x01" + bytes(range(256)), "an ELF program"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(50), "gzip"),
    "PDF": (b"%PDF-1.4 plain text", "a PDF"),
    "NULs": (GOOD.encode() + bytes(5000), "many NUL bytes"),
    "UTF-16 with mark": (GOOD.encode("utf-16"), "iconv -f UTF-16 "),
    "UTF-16LE": (GOOD.encode("utf-16-le"), "iconv -f UTF-16LE "),
    "UTF-16BE": (GOOD.encode("utf-16-be"), "iconv -f UTF-16BE "),
    "UTF-32": (GOOD.encode("utf-32"), "iconv -f UTF-32 "),
    "UTF-32BE": (GOOD.encode("utf-32-be"), "iconv -f UTF-32BE "),
    "Latin-1": (b"one\ntwo caf\xe9 three", "byte 0xe9 at offset 11 (line 2)"),
    "cut character": (b"one\ntwo\n\xe6\xbc", "at offset 8 (line 3)"),
    "surrogate": (b"one\n\xed\xa0\x80", "at offset 4 (line 2)"),
    "overlong": (b"one\n\n\xc0\xaf", "at offset 5 (line 3)"),
}
