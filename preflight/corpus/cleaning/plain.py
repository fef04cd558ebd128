"""Cleaners that know no markup."""

from __future__ import annotations

import re
import unicodedata

_LINE_ENDS = re.compile("\r\n|[\r\f\v\x85\u2028\u2029]")
# Control characters but tab and line feed; then what is invisible: soft hyphen, zero-width space,
# word joiner and their like, byte order mark, marks of direction. The zero-width joiner and
# non-joiner (U+200C, U+200D) stay: Persian, Hindi and emoji are spelled with them. U+FFFD stays
# too: it stands for a letter that was lost, and without it two halves would look like a word.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
_LINE_TAILS = re.compile(r"(?<![^\S\n])[^\S\n]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")


def keep(text: str) -> str:
    """The text as it is."""
    return text


def clean_unicode(text: str) -> str:
    """The same words in NFC, without invisible characters; empty where nothing can be seen.

    Line ends become line feeds, spaces at the end of a line go, and of empty lines in a row one
    stays. Cleaning twice is cleaning once.
    """
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text)
    text = _BLANK_LINES.sub("\n\n", _LINE_TAILS.sub("", text))
    return text if text and not text.isspace() else ""
