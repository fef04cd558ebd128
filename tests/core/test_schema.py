"""The declared shape of a JSON file."""

from __future__ import annotations

from typing import Any

import pytest

from preflight.core.schema import Schema


class Part(Schema):
    """A nested object."""

    n_tokens: int
    share: float | None = None


class File(Schema):
    """A file that lists parts."""

    version: int
    parts: list[Part]


GOOD: dict[str, Any] = {"version": 1, "parts": [{"n_tokens": 3}, {"n_tokens": 4, "share": 0.5}]}


def test_more_keys_are_accepted_and_kept() -> None:
    file = File.read(GOOD | {"later": [1]})
    assert [part.n_tokens for part in file.parts] == [3, 4]
    assert file.model_dump()["later"] == [1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "the file: "),
        (GOOD | {"version": "1"}, "version: Input should be a valid integer"),
        (GOOD | {"version": 1.0}, "version: Input should be a valid integer"),
        (GOOD | {"version": True}, "version: Input should be a valid integer"),
        ({"version": 1}, "parts: Field required"),
        (GOOD | {"parts": [{"n_tokens": 3}, {}]}, "parts.1.n_tokens: Field required"),
        (GOOD | {"parts": [{"n_tokens": None}]}, "parts.0.n_tokens: "),
    ],
)
def test_the_first_key_at_fault_is_named(value: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        File.read(value)
    assert str(caught.value).startswith(words)
    assert type(caught.value) is ValueError  # nothing of pydantic reaches a caller


class Table(Schema):
    """Keys that a file chooses."""

    sizes: dict[str, int]


def test_a_hostile_key_makes_no_long_message() -> None:
    with pytest.raises(ValueError) as caught:
        Table.read({"sizes": {"k" * 10_000: "x"}})
    assert str(caught.value).startswith("sizes." + "k" * 40 + ": ")


def test_what_was_read_does_not_change() -> None:
    file = File.read(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        file.version = 2
