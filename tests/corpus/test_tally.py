"""Counts of documents: equal for any batches and workers; scripts by the Unicode standard."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from operator import mul

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import find_places

from preflight.corpus import tally as tally_module
from preflight.corpus.characters import COMMON, ODD, OTHER, SCRIPTS, count_characters
from preflight.corpus.tally import (
    EXAMPLE_CHARACTERS,
    MAX_BAD_ROWS,
    Tally,
    add_up,
    count_utf8,
    is_sampled,
)

# Half characters among them, and texts that are longer than an example.
CHARACTERS = st.sampled_from("aé語😀\0\u202e\ufffd\ud83d\ude00") | st.characters()
TEXTS = st.builds(mul, st.text(CHARACTERS, max_size=20), st.sampled_from([1, 1, 30]))
ROWS = st.lists(
    st.tuples(st.sampled_from(["bad", "empty", "a: few", "b: many", "train", "val"]), TEXTS),
    max_size=25,
)


def count(rows: list[tuple[str, str]], first: int = 0, n_examples: int = 3) -> Tally:
    """The tally of rows, as a worker process counts them."""
    tally = Tally(n_examples)
    for row, (fate, text) in enumerate(rows, first):
        count_row(tally, row, fate, text)
    return tally


def count_row(tally: Tally, row: int, fate: str, text: str) -> None:
    """Count one row, as a worker process does."""
    if fate == "bad":
        tally.count_bad(row)
        return
    n_bytes = count_utf8(text)
    tally.count_found(n_bytes)
    if fate == "empty":
        tally.count_empty()
        return
    tally.sample(row, text)
    if fate in ("train", "val"):
        tally.count_kept(row, fate, text, n_bytes, len(text) + 1)
    else:
        tally.count_dropped(row, fate, text, n_bytes)


def travel(tally: Tally) -> Tally:
    """The tally out of the JSON of itself."""
    return Tally.read(json.loads(json.dumps(tally.describe())))


def list_letters() -> Iterator[str]:
    """Every letter of the Basic Multilingual Plane, and the ideographs behind it."""
    for point in (*range(0x10000), *range(0x20000, 0x2A6E0)):
        if unicodedata.category(chr(point))[0] == "L":
            yield chr(point)


@settings(max_examples=40)
@given(ROWS, st.lists(st.integers(0, 25)), st.sampled_from([0, 1, 3, 5]))
def test_the_sum_is_the_same_for_any_batches(
    rows: list[tuple[str, str]], cuts: list[int], n_examples: int
) -> None:
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    total = Tally(n_examples)
    for begin, end in pairwise(edges):
        batch = count(rows[begin:end], begin, n_examples)
        total.add(travel(batch))
        total = travel(total)  # killed and continued
    assert total.describe() == count(rows, 0, n_examples).describe()


@settings(max_examples=40)
@given(st.tuples(ROWS, ROWS, ROWS))
def test_the_grouping_does_not_matter(parts: tuple[list[tuple[str, str]], ...]) -> None:
    firsts = (0, len(parts[0]), len(parts[0]) + len(parts[1]))
    left = [count(rows, first) for rows, first in zip(parts, firsts, strict=True)]
    right = [count(rows, first) for rows, first in zip(parts, firsts, strict=True)]
    left[0].add(left[1])
    left[0].add(left[2])
    right[1].add(right[2])
    right[0].add(right[1])
    whole = count([*parts[0], *parts[1], *parts[2]]).describe()
    assert left[0].describe() == right[0].describe() == whole


@settings(max_examples=40)
@given(ROWS)
def test_the_counts_are_those_of_the_rows(rows: list[tuple[str, str]]) -> None:
    tally = count(rows, 100)
    fates = [fate for fate, _ in rows]
    assert tally.n_rows == len(rows)
    assert tally.n_bad_rows == fates.count("bad")
    assert tally.n_empty == fates.count("empty")
    assert (
        tally.first_bad_rows
        == [100 + i for i, fate in enumerate(fates) if fate == "bad"][:MAX_BAD_ROWS]
    )
    for split in ("train", "val"):
        kept = [text for fate, text in rows if fate == split]
        assert tally.n_documents[split] == len(kept)
        assert tally.n_bytes[split] == sum(len(t.encode("utf-8", "surrogatepass")) for t in kept)
        assert tally.n_tokens[split] == sum(len(text) + 1 for text in kept)
    for reason in ("a: few", "b: many"):
        dropped = [(100 + i, text) for i, (fate, text) in enumerate(rows) if fate == reason]
        n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for _, text in dropped)
        assert tally.dropped.get(reason, [0, 0]) == [len(dropped), n_bytes]
        examples = tally.dropped_examples.get(reason, [])
        assert [example.row for example in examples] == [row for row, _ in dropped[:3]]
        for example, (_, text) in zip(examples, dropped, strict=False):
            assert example.text == _mend(text[:EXAMPLE_CHARACTERS])
    bounds = [(2**key, 2 ** (key + 1), n) for key, n in tally.lengths.items()]
    lengths = [len(text) + 1 for fate, text in rows if fate in ("train", "val")]
    assert all(sum(low <= length < high for length in lengths) == n for low, high, n in bounds)
    assert sum(n for *_, n in bounds) == len(lengths)


def _mend(text: str) -> str:
    """Pairs of half characters as whole ones, single halves as U+FFFD."""
    pair = regex.compile(r"([\ud800-\udbff])([\udc00-\udfff])")
    text = pair.sub(
        lambda m: chr(0x10000 + (ord(m[1]) - 0xD800) * 0x400 + ord(m[2]) - 0xDC00), text
    )
    return regex.sub(r"[\ud800-\udfff]", "\ufffd", text)


@settings(max_examples=40)
@given(ROWS)
def test_examples_do_not_depend_on_the_order_of_counting(rows: list[tuple[str, str]]) -> None:
    added, counted = Tally(), Tally()
    for row in reversed(range(len(rows))):
        added.add(count(rows[row : row + 1], row))
        count_row(counted, row, *rows[row])
    assert added.describe() == counted.describe() == count(rows).describe()


HALVES = ["a\ud83db", "\ud83d\ude00", "\ude00\ud83d", "\ufeffx\udc80"]


@pytest.mark.parametrize("text", HALVES)
def test_half_characters_in_examples_travel(text: str) -> None:
    tally = count([("train", text), ("a: few", text)])
    for example in (*travel(tally).kept_examples, *travel(tally).dropped_examples["a: few"]):
        assert example.text == _mend(text)


def test_a_damaged_description_is_refused() -> None:
    rows = [("bad", ""), ("a: few", "some text"), ("train", "more\x00text"), ("val", "é")]
    content = count(rows).describe()
    n_refused = 0
    for container, key in find_places(content):
        before = container[key]
        if isinstance(before, str):  # any text may stand there
            continue
        for damaged in (-1, None, 1.5, True, "3"):
            container[key] = damaged
            with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
                Tally.read(json.loads(json.dumps(content)))
            n_refused += 1
        container[key] = before
    assert n_refused > 100
    with pytest.raises(ValueError):
        Tally.read({"n_rows": 1})


def test_tallies_with_other_examples_are_not_added() -> None:
    with pytest.raises(ValueError):
        Tally(3).add(Tally(5))


def test_sources_add_up() -> None:
    one, two = count([("train", "a b"), ("bad", "")]), count([("train", "c"), ("a: few", "dd")])
    total = add_up([one, two])
    assert total.n_rows == 4
    assert total.n_documents == {"train": 2, "val": 0}
    assert total.n_tokens["train"] == 4 + 2
    assert total.dropped == {"a: few": [1, 2]}
    assert not total.kept_examples
    assert len(one.kept_examples) == 1  # its own are not touched


# ---- characters ---------------------------------------------------------------------------------


def test_scripts_are_those_of_the_unicode_standard() -> None:
    """Each letter one by one against the script property that the package `regex` carries."""
    names = {"Odia": "Oriya"}
    patterns = {
        script: regex.compile(rf"\p{{Script={names.get(script, script)}}}")
        for script in SCRIPTS
        if script not in (COMMON, OTHER)
    }
    patterns[COMMON] = regex.compile(r"[\p{Script=Common}\p{Script=Inherited}]")
    of_all = "".join(list_letters())
    assert len(of_all) > 80_000
    expected = {
        script: letters
        for script, pattern in patterns.items()
        if (letters := "".join(pattern.findall(of_all)))
    }
    expected[OTHER] = "".join(set(of_all).difference(*expected.values()))
    for script, letters in expected.items():
        assert count_characters(letters) == ({script: len(letters)}, {})


SINGLE = {
    COMMON: " 7€😀、\u0301\t\n",
    "Latin": "éßı",
    "Greek": "ά",
    "Cyrillic": "Ж",
    "Hebrew": "א",
    "Arabic": "ع",
    "Devanagari": "क",
    "Han": "語𠀀",
    "Hiragana": "あ",
    "Katakana": "カ",
    "Hangul": "한",
    "Thai": "ไ",
    OTHER: "ꦄ",
}


@pytest.mark.parametrize("script", SINGLE)
def test_characters_have_their_script(script: str) -> None:
    assert count_characters(SINGLE[script]) == ({script: len(SINGLE[script])}, {})


def test_odd_characters_by_their_category() -> None:
    """Control (Cc), format (Cf), private (Co) and halves (Cs), as `unicodedata` has them."""
    kinds = {"Cc": {"nul", "control"}, "Co": {"private_use"}, "Cs": {"surrogate"}}
    marks = {"zero_width", "bidi", "byte_order_mark", "soft_hyphen"}
    for point in range(0x10000):
        category = unicodedata.category(chr(point))
        _, odd = count_characters(chr(point)) if category[0] in "CZS" else ({}, {})
        if chr(point) in "\t\n\r":
            assert not odd
        elif category in kinds:
            assert odd.keys() <= kinds[category]
            assert sum(odd.values()) == 1
        elif category == "Cf":
            assert odd.keys() <= marks
        else:
            assert odd.keys() <= {"replacement_character"}
    expected = {"\0": "nul", "\x1b": "control", "\xad": "soft_hyphen", "\u200b": "zero_width"}
    expected |= {"\u202e": "bidi", "\ufeff": "byte_order_mark", "\ufffd": "replacement_character"}
    expected |= {"\ue000": "private_use", "\U000f0000": "private_use", "\udc80": "surrogate"}
    assert set(expected.values()) == set(ODD)
    for character, name in expected.items():
        assert count_characters(character * 2) == ({}, {name: 2})


def test_every_sampled_character_is_counted_once() -> None:
    text = "".join(map(chr, range(0x3000))) * 6
    tally = Tally()
    tally.sample(0, text)
    content = tally.describe()
    n_windows = -(-len(text) // tally_module.SAMPLE_STRIDE)
    assert content["n_sampled_characters"] == (n_windows - 1) * 1000 + min(
        1000, len(text) - (n_windows - 1) * tally_module.SAMPLE_STRIDE
    )
    n_counted = sum(content["scripts"].values()) + sum(content["odd"].values())
    assert n_counted == content["n_sampled_characters"]


def test_a_sixteenth_of_the_rows_is_sampled_whatever_the_period() -> None:
    assert all(map(is_sampled, range(64)))
    for period in (1, 2, 7, 16, 64, 1000, 4096):
        rows = range(64 * period, 64 * period + period * 20_000, period)
        assert 0.85 / 16 < sum(map(is_sampled, rows)) / len(rows) < 1.15 / 16


def test_memory_stays_bounded() -> None:
    tally = Tally()
    for _ in range(1000):
        tally.sample(0, "x" * 1000)
        assert tally._n_waiting < 2**16 + 1000
    assert tally.n_sampled_characters >= 2**19
