"""Words, lines and copies of lines: what several published rules count.

A word is what whitespace separates. That suits English and its like. Chinese, Japanese, Thai, Lao,
Khmer and Burmese do not separate words, so that rules about words mean little there: such a text
has few and long words, and the reasons name the counts of words that it fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from preflight.corpus.filtering.characters import SPACE, hash_spans, load_kinds, read_windows

# Marks that end a sentence in living scripts (Unicode: Sentence_Terminal).
SENTENCE_ENDS = tuple(".!?‼⁇⁈⁉‽。．！？｡؟۔।॥։።፧၊။។៕᠃᠉")  # noqa: RUF001


@dataclass(frozen=True)
class Words:
    """The words of a text, in order.

    Attributes:
        hashes: uint64; equal for equal words, and for others only by a chance of 2**-64.
        lengths: int32, in characters.
        kinds: uint8, the bits of all its characters' kinds: see `characters.py`.
    """

    hashes: np.ndarray
    lengths: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)


@lru_cache(maxsize=1)  # several rules judge one text in turn
def measure_words(text: str) -> Words:
    """The words of the text, as ``str.split`` finds them."""
    found = [_measure_window(codes) for codes in read_windows(text)]
    if len(found) == 1:
        return Words(*found[0])
    if not found:
        return Words(*(np.zeros(0, kind) for kind in (np.uint64, np.int32, np.uint8)))
    return Words(*(np.concatenate(rows) for rows in zip(*found, strict=True)))


def _measure_window(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, lengths and kinds of the words of a window."""
    kinds = load_kinds().take(codes)
    is_word = np.zeros(len(codes) + 2, np.int8)
    is_word[1:-1] = kinds != SPACE
    bounds = np.flatnonzero(is_word[1:] != is_word[:-1])  # start, end, start, end ...
    starts, ends = bounds[::2], bounds[1::2]
    if not len(starts):
        return np.zeros(0, np.uint64), starts.astype(np.int32), kinds[:0]
    return (
        hash_spans(codes, starts, ends),
        (ends - starts).astype(np.int32),
        np.bitwise_or.reduceat(kinds, starts),  # with the space behind it, whose bit is none else's
    )


def hash_word(word: str) -> int:
    """The hash that `measure_words` gives this word."""
    return int(measure_words(word).hashes[0])


def count_copies(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts were there before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    n_copies = n_characters = 0
    for part in parts:
        if part in seen:
            n_copies += 1
            n_characters += len(part)
        else:
            seen.add(part)
    return n_copies, n_characters
