"""The rules of Gopher: Rae et al. 2021, arXiv:2112.11446, appendix A.1.1.

They are made for English. Words are what whitespace separates, see `words.py`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from preflight.corpus.filtering.characters import DIGIT, LETTER, extend_n_grams
from preflight.corpus.filtering.protocol import Verdict
from preflight.corpus.filtering.words import Words, count_copies, hash_word, measure_words

# "at least two of the following English words", as they are written there.
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def judge_quality(
    text: str,
    *,
    min_words: int = 50,  # "between 50 and 100,000 words"
    max_words: int = 100_000,
    min_mean_word_length: float = 3.0,  # "outside the range of 3 to 10 characters"
    max_mean_word_length: float = 10.0,
    max_hashes_per_word: float = 0.1,  # "symbol-to-word ratio greater than 0.1"
    max_ellipses_per_word: float = 0.1,
    max_bullet_lines: float = 0.9,  # "more than 90% of lines starting with a bullet point"
    max_ellipsis_lines: float = 0.3,  # "more than 30% ending with an ellipsis"
    min_alphabetic_words: float = 0.8,  # "80% of words contain at least one alphabetic character"
    min_stop_words: int = 2,
) -> Verdict:
    """Drop what is too short, too long, or does not read like English prose.

    What has neither letter nor digit counts as a word of the ratios, but not of the document's
    length and mean: rows of dashes would pass for text there.
    """
    words = measure_words(text)
    is_real = (words.kinds & (LETTER | DIGIT)) > 0
    n_real, n_characters = np.count_nonzero(is_real), int(words.lengths[is_real].sum())
    n_alphabetic = np.count_nonzero(words.kinds & LETTER)
    reason = ""
    if n_real < min_words:
        reason = "too few words"
    elif n_real > max_words:
        reason = "too many words"
    elif n_characters < min_mean_word_length * n_real:
        reason = "mean word length too small"
    elif n_characters > max_mean_word_length * n_real:
        reason = "mean word length too large"
    elif text.count("#") > max_hashes_per_word * len(words):
        reason = "hash symbols"
    elif sum(map(text.count, _ELLIPSES)) > max_ellipses_per_word * len(words):
        reason = "ellipses"
    elif _measure_line_share(text, _BULLETS, False, max_bullet_lines) > max_bullet_lines:
        reason = "lines that start with a bullet"
    elif _measure_line_share(text, _ELLIPSES, True, max_ellipsis_lines) > max_ellipsis_lines:
        reason = "lines that end with an ellipsis"
    elif n_alphabetic < min_alphabetic_words * len(words):
        reason = "words without a letter"
    elif _count_stop_words(words) < min_stop_words:
        reason = "too few English stop words"
    return Verdict(text, reason)


def _measure_line_share(text: str, marks: tuple[str, ...], is_at_end: bool, limit: float) -> float:
    """The share of lines that start or end with one of the marks; 0 where it is below `limit`."""
    n_marks = sum(map(text.count, marks))
    if n_marks <= limit * text.count("\n"):  # cheap, and so for most texts
        return 0.0
    lines = text.splitlines()
    if is_at_end:
        return sum(line.rstrip().endswith(marks) for line in lines) / len(lines)
    return sum(line.lstrip().startswith(marks) for line in lines) / len(lines)


@cache
def _hash_stop_words() -> np.ndarray:
    return np.array([[hash_word(word)] for word in _STOP_WORDS], np.uint64)


def _count_stop_words(words: Words) -> int:
    """How many of the stop words there are; a word may come as often as it will."""
    first = words.hashes[:4096]  # bounds the comparison; prose has them all by then
    return int((_hash_stop_words() == first).any(axis=1).sum())


def judge_repetition(
    text: str,
    *,
    # Table A1
    max_duplicate_lines: float = 0.30,
    max_duplicate_paragraphs: float = 0.30,
    max_duplicate_line_characters: float = 0.20,
    max_duplicate_paragraph_characters: float = 0.20,
    max_top_2_gram: float = 0.20,
    max_top_3_gram: float = 0.18,
    max_top_4_gram: float = 0.16,
    max_duplicate_5_grams: float = 0.15,
    max_duplicate_6_grams: float = 0.14,
    max_duplicate_7_grams: float = 0.13,
    max_duplicate_8_grams: float = 0.12,
    max_duplicate_9_grams: float = 0.11,
    max_duplicate_10_grams: float = 0.10,
) -> Verdict:
    """Drop what repeats itself: lines, paragraphs, and n-grams of words.

    Limits are shares, of the lines or paragraphs, or of the text's characters. The first occurrence
    is no duplicate, and no character counts twice within one n.
    """
    for name, separator, max_share, max_characters in (
        ("paragraphs", "\n\n", max_duplicate_paragraphs, max_duplicate_paragraph_characters),
        ("lines", "\n", max_duplicate_lines, max_duplicate_line_characters),
    ):
        parts = [part for part in (part.strip("\n") for part in text.split(separator)) if part]
        n_copies, n_characters = count_copies(parts)
        if n_copies > max_share * len(parts):
            return Verdict(text, f"duplicate {name}")
        if n_characters > max_characters * len(text):
            return Verdict(text, f"characters in duplicate {name}")
    tops = (max_top_2_gram, max_top_3_gram, max_top_4_gram)
    duplicates = (
        max_duplicate_5_grams,
        max_duplicate_6_grams,
        max_duplicate_7_grams,
        max_duplicate_8_grams,
        max_duplicate_9_grams,
        max_duplicate_10_grams,
    )
    return Verdict(text, _judge_n_grams(text, tops, duplicates))


def _judge_n_grams(text: str, tops: tuple[float, ...], duplicates: tuple[float, ...]) -> str:
    """Why the n-grams drop the text, or nothing; limits of n from 2 on, and from 5 on.

    Most texts pass by bounds: a longer n-gram is never more frequent than the pair that it begins
    with, and there are never more of the repeated ones than repeated 5-grams.
    """
    words = measure_words(text)
    ends = np.concatenate(([0], np.cumsum(words.lengths)))
    limits = [limit * len(text) for limit in (*tops, *duplicates)]
    n_most = len(words)  # a bound of how often any n-gram occurs
    grams = words.hashes
    for n, limit in enumerate(limits, 2):
        grams = extend_n_grams(grams, words.hashes)
        if not len(grams):
            break
        lengths = ends[n:] - ends[:-n]
        if n < 5:
            lengths += n - 1  # the spaces between
            if n_most * lengths.max() > limit:
                n_most = _count_most_frequent(grams)
                if n_most * lengths.max() > limit and _measure_top(grams, lengths) > limit:
                    return f"top {n}-gram"
            continue
        ordered = np.sort(grams)
        n_repeats = np.count_nonzero(ordered[1:] == ordered[:-1])
        if n_repeats * (ends[10:] - ends[:-10]).max(initial=lengths.max()) <= min(limits[n - 2 :]):
            break
        if n_repeats * lengths.max() > limit and _measure_duplicates(grams, lengths, n) > limit:
            return f"duplicate {n}-grams"
    return ""


def _count_most_frequent(grams: np.ndarray) -> int:
    """How often the most frequent n-gram occurs, of at least one."""
    ordered = np.sort(grams)  # several times faster than finding its order
    bounds = np.flatnonzero(ordered[1:] != ordered[:-1])
    return int(np.diff(bounds, prepend=-1, append=len(grams) - 1).max())


def _measure_top(grams: np.ndarray, lengths: np.ndarray) -> int:
    """The characters of the most frequent n-gram in all its occurrences.

    The first one counts, where several are as frequent.

    Args:
        grams: hashes of the n-grams.
        lengths: of each, in characters.
    """
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    n_most = counts.max()
    return int(n_most * lengths[first[counts == n_most].min()])


def _measure_duplicates(grams: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters, without spaces, in n-grams that were there before.

    The text is read from the left. Behind a duplicate, reading goes on after its last word; the
    n-grams that begin within it have not been read.
    """
    values, counts = np.unique(grams, return_counts=True)
    repeated = values[counts > 1]
    places = np.flatnonzero(np.isin(grams, repeated))
    seen: set[int] = set()
    n_characters = free = 0
    for place, gram in zip(places.tolist(), grams[places].tolist(), strict=True):
        if place < free:
            continue
        if gram in seen:
            n_characters += int(lengths[place])
            free = place + n
        else:
            seen.add(gram)
    return n_characters
