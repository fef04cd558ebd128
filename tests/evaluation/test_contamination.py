"""Contamination against a plain search for substrings, on planted and on strange items."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_folders import make_split

from preflight.corpus.shards import DataFolder
from preflight.evaluation import contamination
from preflight.evaluation.contamination import (
    GramSearch,
    build_text,
    find_contamination,
    split_words,
)
from preflight.evaluation.items import Item, Task
from preflight.tokenization import Tokenizer, load_tokenizer

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstx"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2")


def encode(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    parts = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in documents]
    return np.concatenate(parts).astype(tokenizer.id_dtype)


def make_data(folder: Path, documents: list[str], tokenizer: Tokenizer) -> DataFolder:
    ids = encode(documents, tokenizer)
    sizes = [len(ids) // 3, len(ids) // 4, len(ids) - len(ids) // 3 - len(ids) // 4]
    train = make_split(folder / "train", ids, sizes)
    nothing = cast(Any, None)
    return DataFolder(folder, nothing, "", train, train, tokenizer.vocab_size, tokenizer.id_dtype)


def build_task(texts: list[str], kind: str = "pages") -> Task:
    items = [Item("", (text,), line=n) for n, text in enumerate(texts, 1)]
    return Task("some", cast(Any, kind), "a file", tuple(items))


def write_words(n: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def search_plainly(text: str, documents: list[str]) -> set[int] | None:
    """Numbers of the documents with 13 words of the text in a row; None for a short text."""
    words = split_words(text)
    length = min(13, len(words))
    if length < 8:
        return None
    rows = [f" {' '.join(split_words(document))} " for document in documents]
    grams = [f" {' '.join(words[i : i + length])} " for i in range(len(words) - length + 1)]
    return {n for n, row in enumerate(rows, 1) if any(gram in row for gram in grams)}


def find_in(texts: list[str], ids: np.ndarray, tokenizer: Tokenizer, step: int) -> GramSearch:
    search = GramSearch(texts)
    for start in range(0, len(ids), step):
        search.push(ids[start : start + step], tokenizer)
    search.finish()
    return search


@pytest.mark.parametrize("chunk", [97, 2**18])
def test_planted_items_are_all_found_and_no_others(
    chunk: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    documents = [write_words(rng.randrange(20, 200), rng) for _ in range(120)]
    planted = []
    for _ in range(100):  # written otherwise: capitals, commas, line ends
        number = rng.randrange(len(documents))
        words = documents[number].split(" ")
        first = rng.randrange(len(words) - 13)
        span = words[first : first + rng.randrange(13, 20)]
        text = "".join(w.capitalize() + rng.choice([" ", ", ", "\n", ' "']) for w in span)
        planted.append(f"{write_words(9, rng)} {text}. {write_words(9, rng)}")
    others = [write_words(rng.randrange(13, 60), rng) for _ in range(500)]
    monkeypatch.setattr(contamination, "_CHUNK_TOKENS", chunk)
    data = make_data(tmp_path, documents, tokenizer)
    found = find_contamination([build_task(planted), build_task(others)], data, tokenizer)
    assert [(f.n_items, f.n_found, f.n_too_short) for f in found] == [(100, 100, 0), (500, 0, 0)]
    assert (found[0].share, found[1].share) == (1.0, 0.0)
    for index, text in enumerate(planted):
        overlap = found[0].overlaps[index]
        assert overlap.line == index + 1
        assert overlap.document in (search_plainly(text, documents) or set())
        assert len(overlap.words.split(" ")) == 13
        assert overlap.words in " ".join(split_words(text))
        assert overlap.words in documents[overlap.document - 1]
    assert found[0].examples == [found[0].overlaps[index] for index in range(5)]


few_words = st.sampled_from(["a", "B", "c,", "d.", "É", "ü!", "日", "e\u00a0f", "g_h", "1"])
texts = st.lists(few_words, max_size=24).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(
    items=st.lists(texts, min_size=1, max_size=4),
    documents=st.lists(texts, min_size=1, max_size=4),
    copies=st.integers(0, 3),
    step=st.integers(1, 90),
)
@example(items=["a b c d e f g h"], documents=["x a b c d", "e f g h"], copies=0, step=5)
def test_what_is_found_is_what_a_search_for_substrings_finds(
    items: list[str], documents: list[str], copies: int, step: int
) -> None:
    tokenizer = load_tokenizer("byte")
    documents = documents + [f"a {items[0]} b"] * copies
    search = find_in(items, encode(documents, tokenizer), tokenizer, step)
    for index, text in enumerate(items):
        expected = search_plainly(text, documents)
        assert (index in search.too_short) == (expected is None)
        assert (index in search.found) == bool(expected)
        if expected:
            assert search.found[index][1] in expected


def test_an_item_of_8_to_12_words_is_looked_for_as_a_whole(tokenizer: Tokenizer) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    texts = [" ".join(words[:n]) for n in (7, 8, 12)]
    whole = find_in(texts, encode(["So: One, two " + " ".join(words[2:])], tokenizer), tokenizer, 9)
    assert (set(whole.found), whole.too_short) == ({1, 2}, {0})
    part = find_in(texts, encode([" ".join(words[:11])], tokenizer), tokenizer, 9)
    assert set(part.found) == {1}


def test_a_gram_across_two_documents_is_none(tokenizer: Tokenizer) -> None:
    words = write_words(13, random.Random(0))
    halves = [words[:25], words[25:]]
    assert "".join(halves) == words
    assert not find_in([words], encode(halves, tokenizer), tokenizer, 50).found
    assert find_in([words], encode(["".join(halves)], tokenizer), tokenizer, 50).found


def test_a_hash_that_two_grams_share_finds_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contamination, "_hash_words", lambda words: np.zeros(len(words), np.uint64))
    rng = random.Random(3)
    texts, documents = [write_words(15, rng)], [write_words(40, rng)]
    assert not find_in(texts, encode(documents, tokenizer), tokenizer, 64).found
    assert find_in(texts, encode([*documents, texts[0]], tokenizer), tokenizer, 64).found


def test_a_choice_is_looked_for_with_its_right_ending(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    context, right, wrong = (write_words(8, rng) for _ in range(3))
    task = Task("c", "choices", "f", (Item(context, (wrong, right), label=1),))
    text = build_text(task, task.items[0])
    assert find_in([text], encode([f"{context} {right}"], tokenizer), tokenizer, 64).found
    assert not find_in([text], encode([f"{context} {wrong}"], tokenizer), tokenizer, 64).found


def test_text_without_spaces_is_read_in_bounded_memory(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contamination, "_MAX_HELD_BYTES", 1000)
    search = GramSearch([write_words(20, random.Random(5))])
    for _ in range(30):
        search.push(tokenizer.encode("日本語" * 40), tokenizer)
        assert len(search._held) <= 1400
    assert not search.is_done


def test_items_that_are_all_too_short_have_no_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = make_data(tmp_path, ["some text, and more of it"], tokenizer)
    (found,) = find_contamination([build_task(["too short", "日本語 日本語"])], data, tokenizer)
    assert (found.n_too_short, found.share) == (2, None)
