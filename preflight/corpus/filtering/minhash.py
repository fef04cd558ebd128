"""Signatures of documents: equal for exact copies, alike for near copies.

MinHash (Broder 1997): under a random order of all shingles, the first shingle of two documents is
the same with the probability of their Jaccard similarity. A signature has the first of each of
`N_PERMUTATIONS` orders; the share of equal places estimates the similarity, with a standard
deviation of at most 0.5 / sqrt(128) = 0.044.

A shingle is 5 consecutive words in lower case, without punctuation and spaces. In scripts that do
not space words (Chinese, Japanese, Thai ...) each character is a word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache

import numpy as np

from preflight.corpus.filtering.characters import (
    UNSPACED,
    WORD,
    extend_n_grams,
    hash_spans,
    load_kinds,
    read_windows,
)

KINDS = ("exact", "near")
SHINGLE_WORDS = 5
N_BANDS, BAND_ROWS = 16, 8
N_PERMUTATIONS = N_BANDS * BAND_ROWS
SIGNATURE_BYTES = {"exact": 16, "near": 4 * N_PERMUTATIONS}
MIN_SIMILARITY = 0.8
MIN_EQUAL = math.ceil(MIN_SIMILARITY * N_PERMUTATIONS)
_BLOCK = 512  # shingles: a block of 512 x 128 numbers stays in the cache
_SEED = 17


def sign(text: str, kind: str) -> bytes:
    """The signature of a document, by which `DuplicateIndex` finds its copies.

    Args:
        text: white space around it does not count.
        kind: "exact": BLAKE2b of its UTF-8, in 16 bytes. "near": 128 numbers of uint32, in the
            order of little endian.
    """
    text = text.strip()
    if kind == "near":
        minima = [compute_minima(shingles) for shingles in iterate_shingles(text)]
        return np.minimum.reduce(minima).astype("<u4").tobytes()
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def iterate_shingles(text: str) -> Iterator[np.ndarray]:
    """Hashes of a text's shingles, uint32, in order and with repeats, a window of text at a time.

    A text of fewer than 5 words has one shingle, of all its words. A text without words has one of
    its characters.
    """
    waiting = np.zeros(0, np.uint64)  # the last words, whose shingles are not whole
    is_short = True
    for codes in read_windows(text.lower()):
        hashes = np.concatenate((waiting, _hash_words(codes)))
        if len(hashes) >= SHINGLE_WORDS:
            yield _join(hashes, SHINGLE_WORDS)
            is_short, hashes = False, hashes[1 - SHINGLE_WORDS :]
        waiting = hashes
    if is_short and len(waiting):
        yield _join(waiting, len(waiting))
    elif is_short:
        whole = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield _join(np.frombuffer(whole, "<u8").astype(np.uint64), 1)


def hash_shingles(text: str) -> np.ndarray:
    """All that `iterate_shingles` yields: uint32 (shingles,)."""
    return np.concatenate(list(iterate_shingles(text)))


def _join(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of each `n` consecutive words: uint64 (words,) -> uint32 (words - n + 1,)."""
    grams = hashes
    for _ in range(n - 1):
        grams = extend_n_grams(grams, hashes)
    return (mix(grams) >> np.uint64(32)).astype(np.uint32)


def _hash_words(codes: np.ndarray) -> np.ndarray:
    """Hashes of the words of a window of code points: uint64."""
    kinds = load_kinds().take(codes)
    is_word = np.zeros(len(codes) + 2, bool)
    np.not_equal(kinds & WORD, 0, out=is_word[1:-1])
    is_single = np.zeros(len(codes) + 2, bool)
    np.not_equal(kinds & UNSPACED, 0, out=is_single[1:-1])
    starts = is_word[1:-1] & (~is_word[:-2] | is_single[:-2] | is_single[1:-1])
    ends = is_word[1:-1] & (~is_word[2:] | is_single[2:] | is_single[1:-1])
    return hash_spans(codes, np.flatnonzero(starts), np.flatnonzero(ends) + 1)


def mix(values: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers that spreads each bit to all (SplitMix64's, Steele 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _load_permutations() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and summands, two of uint32 (128, 1): x -> a x + b is one to one modulo 2**32.

    Linear permutations are nearly min-wise independent on hashed values (Bohman, Cooper and Frieze
    2000). The numbers are a function of the seed alone.
    """
    words = mix(np.arange(1, 2 * N_PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(_SEED))
    factors, summands = (words >> np.uint64(32)).astype(np.uint32).reshape(2, -1, 1)
    return factors | np.uint32(1), summands


def compute_minima(shingles: np.ndarray) -> np.ndarray:
    """The smallest value of each permutation over the shingles: uint32 (128,)."""
    factors, summands = _load_permutations()
    minima = np.full(N_PERMUTATIONS, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        values = factors * shingles[None, start : start + _BLOCK]
        values += summands
        np.minimum(minima, values.min(axis=1), out=minima)
    return minima


def compute_bands(signatures: np.ndarray) -> np.ndarray:
    """A key of each band of near signatures: uint32 (documents, 128) -> uint64 (documents, 16)."""
    rows = signatures.reshape(len(signatures), N_BANDS, BAND_ROWS).astype(np.uint64)
    keys = np.tile(np.arange(N_BANDS, dtype=np.uint64), (len(rows), 1))  # bands share no keys
    for i in range(0, BAND_ROWS, 2):
        keys = mix(keys ^ (rows[:, :, i] << np.uint64(32) | rows[:, :, i + 1]))
    return keys


def estimate_band_recall(similarity: float) -> float:
    """How probable it is that a band of two documents is equal: 1 - (1 - s**8)**16.

    (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.) The curve is steep
    about (1 / 16)**(1 / 8) = 0.71.
    """
    return 1 - (1 - similarity**BAND_ROWS) ** N_BANDS


def estimate_recall(similarity: float) -> float:
    """How probable it is that a near copy is found: a band is equal, and 0.8 of all places are.

    Exact for independent places: the number k of equal places is binomial; no band is equal in
    sum_j (-1)**j C(16, j) C(128 - 8 j, k - 8 j) of their C(128, k) arrangements.
    """
    total = 0.0
    for k in range(MIN_EQUAL, N_PERMUTATIONS + 1):
        n_missed = sum(
            (-1) ** j
            * math.comb(N_BANDS, j)
            * math.comb(N_PERMUTATIONS - BAND_ROWS * j, k - BAND_ROWS * j)
            for j in range(min(N_BANDS, k // BAND_ROWS) + 1)
        )
        found = 1 - n_missed / math.comb(N_PERMUTATIONS, k)
        odds = math.comb(N_PERMUTATIONS, k) * similarity**k
        total += found * odds * (1 - similarity) ** (N_PERMUTATIONS - k)
    return total
