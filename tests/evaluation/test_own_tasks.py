"""The small sets of our own: their form, and that no choice gives itself away."""

from __future__ import annotations

from collections import Counter
from importlib import resources

import pytest

from preflight.evaluation.items import Task
from preflight.evaluation.own_tasks import load_own_tasks


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.name: task for task in load_own_tasks()}


def test_each_kind_has_a_set_that_is_called_our_own(tasks: dict[str, Task]) -> None:
    found = {name: (task.kind, task.source, len(task.items)) for name, task in tasks.items()}
    assert found == {
        "own-last-word": ("last-word", "built-in", 20),
        "own-choices": ("choices", "built-in", 20),
        "own-pages": ("pages", "built-in", 3),
    }
    for task in tasks.values():
        assert [item.line for item in task.items] == list(range(1, len(task.items) + 1))
        assert len({item.context + item.continuations[0] for item in task.items}) == len(task.items)


def test_a_context_ends_with_a_word_and_what_follows_begins_with_a_space(
    tasks: dict[str, Task],
) -> None:
    for name in ("own-last-word", "own-choices"):
        for item in tasks[name].items:
            assert item.context == item.context.strip()
            assert item.context[-1].isalpha() or item.context[-1] == ","
            for text in item.continuations:
                assert text[0] == " "
                assert text.strip() == text[1:] != ""


def test_a_last_word_is_one_word_that_most_contexts_name(tasks: dict[str, Task]) -> None:
    items = tasks["own-last-word"].items
    words = [item.continuations[0].strip() for item in items]
    assert all(word.isalpha() for word in words)
    assert len(set(words)) == 20
    named = sum(w in i.context.lower() for w, i in zip(words, items, strict=True))
    assert named >= 16  # four of five, as in LAMBADA


def test_neither_place_nor_length_tells_the_right_choice(tasks: dict[str, Task]) -> None:
    items = tasks["own-choices"].items
    assert Counter(item.label for item in items) == dict.fromkeys(range(4), 5)
    longest = shortest = 0
    for item in items:
        lengths = [len(text) for text in item.continuations]
        assert len(set(item.continuations)) == 4
        assert max(lengths) - min(lengths) <= 6
        longest += lengths.index(max(lengths)) == item.label
        shortest += lengths.index(min(lengths)) == item.label
    assert longest <= 10
    assert shortest <= 10
    right = sum(len(i.continuations[i.label]) for i in items) / 20
    every = sum(len(text) for i in items for text in i.continuations) / 80
    assert right == pytest.approx(every, abs=1)


def test_pages_count_their_words_and_bytes(tasks: dict[str, Task]) -> None:
    for item in tasks["own-pages"].items:
        (page,) = item.continuations
        assert item.context == ""
        assert item.n_bytes == len(page.encode())
        assert item.n_words == len(page.split()) + 1  # the harness counts the empty end, too
        assert 150 < item.n_words < 400


def test_the_sets_are_files_of_the_package() -> None:
    folder = resources.files("preflight.evaluation").joinpath("assets")
    names = {entry.name for entry in folder.iterdir() if entry.name.startswith("own_")}
    assert names == {"own_last_word.jsonl", "own_choices.jsonl", "own_pages.jsonl"}
