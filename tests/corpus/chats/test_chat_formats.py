"""The forms of chats: examples of each, round trips, and every fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preflight.corpus.chats.formats import FORMATS, ChatFault, find_format, read_messages
from preflight.tokenization.chats import Message

U, A, S = "user", "assistant", "system"
Pairs = list[tuple[str, str]]


def read(row: Any) -> tuple[str, Pairs, bool]:
    """Name of the form, roles with contents, and whether a question was left out."""
    form = find_format(row)
    assert form is not None
    messages, is_open = read_messages(row, form)
    return form.name, [(message.role, message.content) for message in messages], is_open


# ---- examples -----------------------------------------------------------------------------------

HI: Pairs = [(U, "Hi"), (A, "Hello")]
EXAMPLES: list[tuple[Any, str, Pairs, bool]] = [
    (
        {"messages": [{"role": U, "content": "Hi"}, {"role": A, "content": "Hello", "name": None}]},
        "OpenAI messages",
        HI,
        False,
    ),
    (
        {
            "id": 7,
            "messages": [
                {"role": S, "content": ""},
                {
                    "role": U,
                    "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                },
                {"role": A, "content": "Hello", "tool_calls": []},
                {"role": U, "content": "no answer"},
            ],
        },
        "OpenAI messages",
        [(S, ""), *HI],
        True,
    ),
    ({"conversations": ["Hi", "Hello"], "source": "x"}, "LIMA conversations", HI, False),
    ({"conversations": ["Hi", "Hello", "And?"]}, "LIMA conversations", HI, True),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        "ShareGPT conversations",
        [(S, "Be kind."), *HI],
        False,
    ),
    (
        {"conversations": [{"from": U, "value": "Hi"}, {"from": A, "value": "Hello"}]},
        "ShareGPT conversations",
        HI,
        False,
    ),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, "Alpaca", HI, False),
    ({"instruction": "Hi", "output": "Hello"}, "Alpaca", HI, False),
    ({"instruction": "Hi", "input": None, "output": "Hello"}, "Alpaca", HI, False),
    (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Count."},
        "Alpaca",
        [(S, "Count."), (U, "Add\n\n1 2"), (A, "3")],
        False,
    ),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt and completion", HI, False),
    (
        {
            "prompt": [{"role": S, "content": "s"}, {"role": U, "content": "Hi"}],
            "completion": [{"role": A, "content": "Hello"}],
        },
        "prompt and completion",
        [(S, "s"), *HI],
        False,
    ),
]


@pytest.mark.parametrize(("row", "name", "messages", "is_open"), EXAMPLES)
def test_examples(row: Any, name: str, messages: Pairs, is_open: bool) -> None:
    assert read(row) == (name, messages, is_open)


# ---- round trips --------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
answers = texts.filter(str.strip)
turns = st.lists(st.tuples(texts, answers), min_size=1, max_size=4)


def flatten(pairs: list[tuple[str, str]]) -> Pairs:
    """Questions and answers as messages."""
    return [message for user, answer in pairs for message in ((U, user), (A, answer))]


def write_openai(messages: Pairs) -> Any:
    return {"messages": [{"role": role, "content": text} for role, text in messages]}


def write_parts(messages: Pairs) -> Any:
    """Contents in parts of one character."""
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": c} for c in text]}
            for role, text in messages
        ]
    }


def write_sharegpt(messages: Pairs) -> Any:
    names = {U: "human", A: "gpt", S: "system"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in messages]}


def write_lima(messages: Pairs) -> Any:
    return {"conversations": [text for _, text in messages]}


def write_typed_completion(messages: Pairs) -> Any:
    rows = write_openai(messages)["messages"]
    return {"prompt": rows[:-1], "completion": rows[-1:]}


@given(turns, st.none() | texts)
@pytest.mark.parametrize(
    "write", [write_openai, write_parts, write_sharegpt, write_typed_completion]
)
def test_round_trip_with_system(
    write: Callable[[Pairs], Any], pairs: list[tuple[str, str]], system: str | None
) -> None:
    messages = ([] if system is None else [(S, system)]) + flatten(pairs)
    assert read(write(messages))[1:] == (messages, False)


@given(turns)
def test_round_trip_lima(pairs: list[tuple[str, str]]) -> None:
    assert read(write_lima(flatten(pairs)))[1:] == (flatten(pairs), False)


@given(texts, answers)
def test_round_trip_single(user: str, answer: str) -> None:
    """Forms of one question and one answer."""
    expected = ([(U, user), (A, answer)], False)
    assert read({"instruction": user, "input": "", "output": answer})[1:] == expected
    assert read({"prompt": user, "completion": answer})[1:] == expected


# ---- faults -------------------------------------------------------------------------------------


def openai(*pairs: Any) -> Any:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


FAULTS: list[tuple[Any, str]] = [
    (openai(), "an empty chat"),
    ({"conversations": []}, "an empty chat"),
    (openai((U, "a")), "no message of the assistant"),
    (openai((S, "a")), "no message of the assistant"),
    (openai((A, "a")), "message 1 is of the assistant; a chat begins with the user"),
    (openai((S, "s"), (A, "a")), "message 2 is of the assistant; a chat begins"),
    (openai((U, "a"), (U, "b")), "message 2 is of the user again"),
    (openai((U, "a"), (A, "b"), (A, "c")), "message 3 is of the assistant again"),
    (openai((U, "a"), (S, "b"), (A, "c")), "message 2 is of the system, which may only be"),
    (openai((S, "a"), (S, "b")), "message 2 is of the system, which may only be"),
    (openai((U, "a"), (A, "")), "message 2 is an empty answer"),
    (openai((U, "a"), (A, " \n")), "message 2 is an empty answer"),
    (openai((U, "a"), ("tool", "b")), 'message 2 has the role "tool"; one of system, user'),
    (openai((U, "a"), ("function", "b")), 'message 2 has the role "function"'),
    (openai((U, "a"), ("x" * 99, "b")), f'has the role "{"x" * 40}..."'),
    (openai((U, "a"), (None, "b")), 'message 2 has no "role"'),
    (openai((U, 5), (A, "b")), "the text of message 1 is a number; a text was expected"),
    (openai((U, None), (A, "b")), "the text of message 1 is null"),
    (openai((U, {"a": 1}), (A, "b")), "the text of message 1 is an object"),
    (openai((U, ["x"]), (A, "b")), "the text of message 1 holds a text; parts of text"),
    (openai((U, [{"type": "image_url"}]), (A, "b")), 'a part of type "image_url"'),
    (openai((U, [{"type": "text"}]), (A, "b")), "a part of the text of message 1 is null"),
    (openai((U, "a"), (A, "b\ud83d")), "half a surrogate pair (\\ud83d): no UTF-8"),
    ({"messages": ["a"]}, "message 1 is a text; an object was expected"),
    ({"messages": "a"}, '"messages" is a text; a list was expected'),
    (
        {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "tool_calls": [1]}]},
        'message 2 has "tool_calls"',
    ),
    ({"conversations": ["a", None]}, "message 2 is null; a text was expected"),
    ({"conversations": ["a", ""]}, "message 2 is an empty answer"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, 'the role "bot"; one of human, gpt'),
    ({"conversations": [{"from": "human"}]}, "the text of message 1 is null"),
    ({"instruction": "a", "output": None}, '"output" is null; a text was expected'),
    ({"instruction": "a", "output": " "}, "message 2 is an empty answer"),
    ({"instruction": "a", "input": 3, "output": "b"}, '"input" is a number'),
    ({"prompt": "a", "completion": ["b"]}, '"completion" is a list; a text was expected'),
    ({"prompt": [{"role": U, "content": "a"}], "completion": [5]}, "message 2 is a number"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_faults(row: Any, message: str) -> None:
    form = find_format(row)
    assert form is not None
    with pytest.raises(ChatFault) as caught:
        read_messages(row, form)
    assert message in str(caught.value)


@pytest.mark.parametrize("row", [None, 3, "a", [], {}, {"text": "a"}, {"prompt": "a"}])
def test_no_form(row: Any) -> None:
    assert find_format(row) is None
    for form in FORMATS:
        with pytest.raises(ChatFault, match=r"where .* was expected"):
            read_messages(row, form)


def test_another_form_is_named() -> None:
    row = {"instruction": "a", "output": "b"}
    with pytest.raises(ChatFault, match=r"^Alpaca where OpenAI messages was expected"):
        read_messages(row, FORMATS[0])
    lima = {"conversations": ["a", "b"]}
    with pytest.raises(ChatFault, match=r"^LIMA conversations where ShareGPT"):
        read_messages(lima, FORMATS[1])


def test_very_many_turns() -> None:
    """100,000 turns; linear, so far below a second a time."""
    messages, is_open = read_messages({"conversations": ["x"] * 100_000}, FORMATS[2])
    assert len(messages) == 100_000
    assert not is_open
    assert messages[-1] == Message(A, "x")
