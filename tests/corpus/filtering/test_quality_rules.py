"""Each threshold from both sides, and whole rules against plain implementations of their text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.corpus.filtering import characters, words
from preflight.corpus.filtering.c4 import count_sentences
from preflight.corpus.filtering.c4 import judge_lines as judge_c4
from preflight.corpus.filtering.characters import DIGIT, LETTER
from preflight.corpus.filtering.fineweb import judge_lines as judge_fineweb
from preflight.corpus.filtering.gopher import judge_quality, judge_repetition


def spell(n: int, letters: str = "abcdefgh") -> list[str]:
    """So many different words of five letters."""
    found = []
    for i in range(n):
        word = ""
        for _ in range(5):
            word, i = word + letters[i % len(letters)], i // len(letters)
        found.append(word)
    return found


def prose(n: int) -> str:
    """A text of n different words, two of them stop words."""
    return " ".join(["the", "that", *spell(n - 2)])


# ---- words --------------------------------------------------------------------------------------


# Without code points that this Python does not know: whether they are letters it cannot say.
@given(st.text(st.characters(exclude_categories=("Cs", "Cn"))))
@settings(max_examples=150, deadline=None)
def test_words_are_those_of_split(text: str) -> None:
    found, expected = words.measure_words(text), text.split()
    assert found.lengths.tolist() == [len(word) for word in expected]
    assert [bool(kind & LETTER) for kind in found.kinds] == [
        any(map(str.isalpha, word)) for word in expected
    ]
    assert [bool(kind & (LETTER | DIGIT)) for kind in found.kinds] == [
        any(map(str.isalnum, word)) for word in expected
    ]
    hashes = found.hashes.tolist()
    assert len(set(hashes)) == len(set(expected)) == len(set(zip(hashes, expected, strict=True)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "ab", "b", "the", "x1", "…"]), min_size=1, max_size=60))
def test_windows_change_nothing(parts: list[str]) -> None:
    text = "\n ".join(parts)
    whole = words.measure_words(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "WINDOW", 7)
        words.measure_words.cache_clear()
        cut = words.measure_words(text)
        words.measure_words.cache_clear()
    for field in ("hashes", "lengths", "kinds"):
        kinds = LETTER | DIGIT if field == "kinds" else -1
        ours = getattr(cut, field).astype(np.int64) & kinds
        assert ours.tolist() == (getattr(whole, field).astype(np.int64) & kinds).tolist()


def test_a_word_longer_than_a_window_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "WINDOW", 7)
    words.measure_words.cache_clear()
    assert words.measure_words("a" * 20 + " b").lengths.tolist() == [7, 7, 6, 1]
    words.measure_words.cache_clear()


# ---- Gopher, quality ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too few words"),
        (prose(49), "too few words"),
        (prose(50), ""),
        (prose(49) + " -- *** " * 9, "too few words"),
        # 50 words of 3 letters, one of them shorter
        (" ".join(["the", "and"] + ["abc"] * 48), ""),
        (" ".join(["the", "and"] + ["abc"] * 47 + ["ab"]), "mean word length too small"),
        # 10 letters, one of them more: "the" and "that" lack 13
        (" ".join(["the", "that"] + ["a" * 10] * 47 + ["a" * 23]), ""),
        (" ".join(["the", "that"] + ["a" * 10] * 47 + ["a" * 24]), "mean word length too large"),
        # a tenth of the words
        (prose(54) + " ######", "hash symbols"),  # 55 words, 5.5 allowed
        (prose(54) + " #####", ""),
        (prose(55) + "... bcdea…" * 6 + " end", "ellipses"),
        (prose(55) + "... bcdea…" * 2 + " end", ""),
        ("\n".join(["-the that"] * 91 + ["and with"] * 9), "lines that start with a bullet"),
        ("\n".join([" •the that"] * 90 + ["and with"] * 10), ""),
        ("\n".join(["the " + "and the " * 5 + "end…"] * 4 + ["more of the and"] * 6), "ellipsis"),
        ("\n".join(["the " + "and the " * 5 + "end… "] * 3 + ["more of the and"] * 7), ""),
        (prose(80) + " 123" * 20, ""),
        (prose(80) + " 123" * 21, "words without a letter"),
        (" ".join(spell(60)), "too few English stop words"),
        (" ".join(["the"] * 9 + spell(60)), "too few English stop words"),
        (" ".join(["The", "that,", *spell(60)]), "too few English stop words"),
    ],
)
def test_quality_drops_beyond_its_limits_only(text: str, reason: str) -> None:
    found = judge_quality(text)
    assert found.text == text
    assert bool(found.reason) == bool(reason), found.reason
    assert reason in found.reason


def test_the_largest_document() -> None:
    text = "the that " * 50_000
    assert judge_quality(text).reason == ""
    assert judge_quality(text + "more").reason == "too many words"


def judge_quality_plainly(text: str) -> bool:
    """The rule as a sentence each; whether the text is kept."""
    parts = text.split()
    real = [word for word in parts if any(map(str.isalnum, word))]
    lines = text.splitlines()
    return (
        5 <= len(real) <= 12
        and 3 <= sum(map(len, real)) / len(real) <= 10
        and text.count("#") / len(parts) <= 0.1
        and (text.count("...") + text.count("…")) / len(parts) <= 0.1
        and sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) <= 0.9
        and sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) <= 0.3
        and sum(any(map(str.isalpha, word)) for word in parts) / len(parts) >= 0.8
        and len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(parts)) >= 2
    )


PIECES = ["the", "and", "house", "- ", "•", "#", "...", "…", "12", "\n", "\n- ", "--", "elephants"]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.sampled_from([" ", "  ", "\n"]))
@settings(max_examples=150, deadline=None)
def test_quality_equals_its_plain_form(pieces: list[str], separator: str) -> None:
    text = separator.join(["the house of wooden people", *pieces])
    kept = not judge_quality(text, min_words=5, max_words=12).reason
    assert kept == judge_quality_plainly(text)


# ---- Gopher, repetition -------------------------------------------------------------------------


def judge_repetition_plainly(text: str, limits: dict[str, float]) -> str:
    """The table of the paper, read aloud."""
    for name, separator in (("paragraphs", "\n\n"), ("lines", "\n")):
        parts = [part.strip("\n") for part in text.split(separator)]
        parts = [part for part in parts if part]
        copies = [part for i, part in enumerate(parts) if part in parts[:i]]
        if parts and len(copies) / len(parts) > limits[f"duplicate_{name}"]:
            return f"duplicate {name}"
        if parts and sum(map(len, copies)) / len(text) > limits[f"duplicate_{name}_characters"]:
            return f"characters in duplicate {name}"
    found = text.split()
    for n in range(2, 11):
        grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
        if not grams:
            break
        if n < 5:
            gram, count = Counter(grams).most_common(1)[0]  # the first of the most frequent
            if len(" ".join(gram)) * count / len(text) > limits[f"top_{n}"]:
                return f"top {n}-gram"
            continue
        seen, n_characters, i = set(), 0, 0
        while i < len(grams):
            if grams[i] in seen:
                n_characters += len("".join(grams[i]))
                i += n
            else:
                seen.add(grams[i])
                i += 1
        if n_characters / len(text) > limits[f"duplicate_{n}"]:
            return f"duplicate {n}-grams"
    return ""


LIMITS = {
    "duplicate_lines": 0.3,
    "duplicate_paragraphs": 0.3,
    "duplicate_lines_characters": 0.2,
    "duplicate_paragraphs_characters": 0.2,
    "top_2": 0.2,
    "top_3": 0.18,
    "top_4": 0.16,
    **{f"duplicate_{n}": (20 - n) / 100 for n in range(5, 11)},
}


@given(
    st.lists(st.integers(0, 400), min_size=30, max_size=200),
    st.lists(st.tuples(st.integers(0, 150), st.integers(2, 14), st.integers(0, 150)), max_size=9),
    st.lists(st.integers(1, 30), max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_repetition_equals_its_plain_form(
    numbers: list[int], copies: list[tuple[int, int, int]], breaks: list[int]
) -> None:
    found = [spell(401)[number] * (1 + number % 3) for number in numbers]
    for start, length, to in copies:
        found[to:to] = found[start : start + length]
    for place, step in enumerate(breaks):
        found[step * (place + 1) : step * (place + 1)] = ["\n" * (1 + step % 3)]
    text = " ".join(found)
    assert judge_repetition(text).reason == judge_repetition_plainly(text, LIMITS)


@pytest.mark.parametrize("name", ["lines", "paragraphs"])
def test_repeated_parts_from_both_sides(name: str) -> None:
    separator = "\n" if name == "lines" else "\n\n"
    parts = [" ".join(spell(90)[10 * i : 10 * i + 10]) for i in range(7)]
    few, many = [*parts, "a", "a", "a"], [*parts, "a", "a", "a", "a"]  # 2 of 10, 3 of 11
    assert judge_repetition(separator.join(few)).reason == ""
    assert judge_repetition(separator.join(many)).reason == ""
    assert judge_repetition(separator.join([*many, "a"])).reason == f"duplicate {name}"  # 4 of 12
    long = separator.join([*parts, parts[0], parts[1]])  # 2 of 9, 118 of 540 characters
    assert judge_repetition(long).reason == f"characters in duplicate {name}"


def build_limits(values: dict[str, float]) -> dict[str, Any]:
    """No limit but the given ones."""
    names = [f"max_top_{n}_gram" for n in (2, 3, 4)]
    names += [f"max_duplicate_{n}_grams" for n in range(5, 11)]
    return {**dict.fromkeys(names, 9.0), **values}


@pytest.mark.parametrize("n", range(2, 11))
def test_n_grams_are_dropped_above_their_limit_only(n: int) -> None:
    gram = spell(n, "xyz")
    text = " ".join([*spell(40), *gram, *spell(60)[40:], *gram, *spell(70)[60:]])
    if n < 5:
        name, share = f"max_top_{n}_gram", 2 * (6 * n - 1) / len(text)
    else:
        name, share = f"max_duplicate_{n}_grams", 5 * n / len(text)
    assert judge_repetition(text, **build_limits({name: share + 1e-9})).reason == ""
    assert f"{n}-gram" in judge_repetition(text, **build_limits({name: share - 1e-9})).reason


# ---- FineWeb ------------------------------------------------------------------------------------


def build_lines(n_ended: int, n_short: int, n: int) -> str:
    """So many lines that end with a full stop; so many of 30 characters, the others of 31."""
    lines = []
    for i in range(n):
        size = 30 if i < n_short else 31
        end = "." if i < n_ended else "a"
        lines.append(f"{i:03} aa bb cc dd ee ff ".ljust(size - 1, "b") + end)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no text"),
        (" \n\n", "no text"),
        (build_lines(12, 0, 100), "lines that end with punctuation"),  # 0.12 and less are dropped
        (build_lines(13, 0, 100), ""),
        (build_lines(100, 66, 100), ""),
        (build_lines(100, 67, 100), "short lines"),
        (build_lines(10, 0, 10) + "\n\n \n" + build_lines(10, 0, 10)[:30], ""),
    ],
)
def test_fineweb_drops_from_its_limits_on(text: str, reason: str) -> None:
    found = judge_fineweb(text)
    assert (found.text, found.reason) == (text, reason)


def test_fineweb_counts_characters_of_repeated_lines() -> None:
    lines = [f"{i:03} aa bb cc dd ee ff gg hh ii jj kk." for i in range(9)]
    assert judge_fineweb("\n".join([*lines, lines[0]])).reason == "characters in duplicate lines"
    assert judge_fineweb("\n".join([*lines, "", "more words here", lines[0]])).reason == ""
    assert judge_fineweb("\n".join([*lines, lines[0][:-1]])).reason == ""


def test_fineweb_counts_newlines_for_each_word() -> None:
    lines = [f"{i:03}{'a' * 30} {'b' * 30} c." for i in range(30)]  # 90 words, 29 newlines
    assert judge_fineweb("\n".join(lines)).reason == "newlines per word"
    assert (
        judge_fineweb(
            "\n".join([*lines[:-1], f"{lines[-1]} and these seven more words of it."])
        ).reason
        == ""
    )


# ---- C4 -----------------------------------------------------------------------------------------

SENTENCE = "This line is a sentence."
PAGE = "\n".join([SENTENCE] * 5)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Three words here.", "Three words here."),
        ("Two words.", None),
        ("No mark at the end", None),
        ("Is it so?", "Is it so?"),
        ("It is so!", "It is so!"),
        ('He said "so"', 'He said "so"'),
        ("He said 'so'", "He said 'so'"),
        ("And so on...", None),
        ("And so on…", None),
        ("  With space around it. \t", "With space around it."),
        (f"Of {'a' * 1000} letters.", f"Of {'a' * 1000} letters."),
        (f"Of {'a' * 1001} letters.", None),
        ("Please turn on JavaScript now.", None),
        ("See our Privacy Policy for more.", None),
        ("This site uses cookies to work.", None),
        ("Known since 1900.[12]", "Known since 1900."),
        ("Known for long.[citation needed][edit]", "Known for long."),
        ("Known for [a] long time.", "Known for [a] long time."),
    ],
)
def test_c4_leaves_lines_out(line: str, kept: str | None) -> None:
    expected = PAGE if kept is None else f"{PAGE}\n{kept}"
    found = judge_c4(f"{PAGE}\n{line}")
    assert (found.text, found.reason) == (expected, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join([SENTENCE] * 4), "too few sentences"),
        (PAGE, ""),
        (" ".join([SENTENCE] * 4), "too few sentences"),
        (" ".join([SENTENCE] * 5), ""),
        (f"{PAGE}\nThe code is f() {{ }}.", "curly bracket"),
        (f"{PAGE}\nmenu {{", ""),  # that line is left out before
        (f"{PAGE}\nThen Lorem Ipsum dolor.", "lorem ipsum"),
        ("", "too few sentences"),
    ],
)
def test_c4_drops_pages(text: str, reason: str) -> None:
    assert judge_c4(text).reason == reason


def test_c4_takes_other_limits() -> None:
    assert judge_c4(SENTENCE, min_sentences=1).text == SENTENCE
    assert judge_c4("So.", min_sentences=1, min_words_per_line=1).reason == ""
    assert judge_c4("So it is.[1]", min_sentences=0, remove_citations=False).text == ""
    assert judge_c4("Of abcd words.", min_sentences=0, max_word_characters=5).text == ""


@pytest.mark.parametrize(
    ("line", "n"),
    [
        ("One. Two! Three? Four", 4),
        ("It costs 3.50 dollars at example.com today.", 1),
        ("Dr. Smith met J. S. Bach. They talked.", 2),
        ('He said "no." Then he left.', 2),
        ("Really?! Yes...", 2),
        ("no end", 1),
    ],
)
def test_sentences_are_counted(line: str, n: int) -> None:
    assert count_sentences(line) == n


@pytest.mark.parametrize("text", ["我们在这里。" * 40, "ここは家です。\n" * 9, "ที่นี่คือบ้าน " * 3])
def test_scripts_without_spaces_are_told_by_the_reason(text: str) -> None:
    assert judge_quality(text).reason == "too few words"
    assert judge_c4(text).reason == "too few sentences"
