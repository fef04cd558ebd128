"""What each character is, as one table for numpy, and hashes of the words of a text.

A text is read in windows of code points, so that the arrays stay small whatever its size.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

SPACE, LETTER, DIGIT, MARK, UNSPACED = 1, 2, 4, 8, 16  # bits of a character's kind
WORD = LETTER | DIGIT | MARK
WINDOW = 2**17  # characters
# No letters above here, but for planes 2 and 3: Han.
_LAST_LISTED, _LAST_HAN = 0x1FFFF, 0x323AF
# Scripts that do not put spaces between words: first and last code point.
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, _LAST_HAN),
)
# A word of code points c is hashed to the sum of c[i] * BASE**i modulo 2**64. The base is odd, so
# that its powers have inverses: the hash of any span is a difference of two running sums.
_BASE = 0x9E3779B97F4A7C15
_GRAM_BASE = 0xC2B2AE3D27D4EB4F
_MODULUS = 2**64


@cache
def load_kinds() -> np.ndarray:
    """The kind of each code point: uint8 of shape (0x110000,)."""
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(_LAST_LISTED + 1):
        character = chr(code)
        if character.isalpha():
            kinds[code] = LETTER
        elif character.isalnum():
            kinds[code] = DIGIT
        elif character.isspace():
            kinds[code] = SPACE
        elif unicodedata.category(character)[0] == "M":
            kinds[code] = MARK
    kinds[0x20000 : _LAST_HAN + 1] = LETTER
    for first, last in _UNSPACED_RANGES:
        span = kinds[first : last + 1]
        span[(span & WORD) > 0] |= UNSPACED
    return kinds


def read_windows(text: str) -> Iterator[np.ndarray]:
    """The code points of a text, uint32, in windows that end after a space or a line.

    A word of more than a window is cut.
    """
    start = 0
    while start < len(text):
        end = min(start + WINDOW, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space + 1 if space >= start else end
        part = text if end - start == len(text) else text[start:end]
        yield np.frombuffer(part.encode("utf-32-le", "surrogatepass"), np.uint32)
        start = end


@cache
def _load_powers(base: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``base**i`` and ``base**-i`` modulo 2**64 for i up to `n`: two of uint64 (n + 1,)."""
    powers = []
    for factor in (base, pow(base, -1, _MODULUS)):
        row = np.full(n + 1, factor, np.uint64)
        row[0] = 1
        powers.append(np.multiply.accumulate(row))
    return powers[0], powers[1]


def hash_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A hash of each ``values[start:end]``: uint64 (spans,). No more than a window of values."""
    powers, inverses = _load_powers(_BASE, WINDOW)
    sums = np.empty(len(values) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return (sums.take(ends) - sums.take(starts)) * inverses.take(starts)


def extend_n_grams(grams: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The hashes of n-grams from those of (n - 1)-grams; one fewer, or none.

    By Horner's scheme: equal for equal words, wherever they stand.

    Args:
        grams: uint64 (words - n + 2,); for n = 2 the hashes of the words.
        hashes: uint64 (words,).
    """
    longer = grams[:-1] * np.uint64(_GRAM_BASE)
    longer += hashes[len(hashes) - len(longer) :]
    return longer
