"""The rules of FineWeb's own: Penedo et al. 2024, arXiv:2406.17557, section 3.6."""

from __future__ import annotations

from preflight.corpus.filtering.protocol import Verdict
from preflight.corpus.filtering.words import SENTENCE_ENDS, count_copies, measure_words


def judge_lines(
    text: str,
    *,
    min_punctuated_lines: float = 0.12,  # "fraction of lines ending with punctuation <= 0.12"
    max_duplicate_line_characters: float = 0.1,  # "characters in duplicated lines >= 0.1"
    max_short_lines: float = 0.67,  # "fraction of lines shorter than 30 characters >= 0.67"
    short_line_characters: int = 30,
    max_newlines_per_word: float = 0.3,  # in the authors' code (datatrove), not in the paper
) -> Verdict:
    """Drop lists, menus and pages of repeated lines.

    Empty lines do not count. As the paper has it, a share at a limit drops the page. The authors'
    code has 0.01 in place of 0.1: ``fineweb.max_duplicate_line_characters=0.01``.
    """
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    n_ended = sum(line.endswith(SENTENCE_ENDS) for line in lines)
    n_short = sum(len(line) <= short_line_characters for line in lines)
    n_newlines = text.count("\n")
    reason = ""
    if not lines:
        reason = "no text"
    elif n_ended <= min_punctuated_lines * len(lines):
        reason = "lines that end with punctuation"
    elif n_short >= max_short_lines * len(lines):
        reason = "short lines"
    elif count_copies(lines)[1] >= max_duplicate_line_characters * (len(text) - n_newlines):
        reason = "characters in duplicate lines"
    elif n_newlines > max_newlines_per_word * len(measure_words(text)):
        reason = "newlines per word"
    return Verdict(text, reason)
