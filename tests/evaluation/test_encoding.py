"""The border between context and continuation, and contexts that are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.encoding import EncodedTask, encode_task
from preflight.evaluation.items import Item, Task
from preflight.tokenization import load_tokenizer

GPT2 = load_tokenizer("gpt2")
BYTE = load_tokenizer("byte")


def encode(item: Item, tokenizer=GPT2, context_length: int = 64) -> EncodedTask:
    task = Task("t", "choices", "file.jsonl", (item,))
    return encode_task(task, [item], tokenizer, context_length)


@given(
    st.text("ab \n.,é", min_size=1, max_size=30),
    st.lists(st.text("ab .é", min_size=1, max_size=12), min_size=1, max_size=4, unique=True),
)
def test_a_row_is_the_encoded_whole_behind_the_encoded_context(
    context: str, continuations: list[str]
) -> None:
    encoded = encode(Item(context, tuple(continuations)))
    found = {b.index: (row.context, b.tokens) for row in encoded.rows for b in row.branches}
    assert len(found) == len(continuations)
    for index, continuation in enumerate(continuations):
        whole = GPT2.encode(context + continuation).tolist()
        before = GPT2.encode(context.rstrip()).tolist()
        tokens = whole[len(before) :]
        if not tokens:  # one token spans the border
            assert encoded.n_joined
            tail = context[len(context.rstrip()) :] + continuation
            tokens = GPT2.encode(tail).tolist()
        assert found[index] == (before or [GPT2.end_of_text_id], tokens)
    assert len(encoded.rows) == 1  # all share the context


def test_a_token_over_the_border_is_counted() -> None:
    encoded = encode(Item("He said wo", ("rld",)))
    assert encoded.n_joined == 1
    assert "encoded apart" in encoded.list_notes()[0]


def test_each_continuation_keeps_as_much_context_as_fits() -> None:
    item = Item("abcdefghij", ("xy", "x", "123456"))
    encoded = encode(item, BYTE, 8)
    rows = {
        b.index: (bytes(row.context), bytes(b.tokens)) for row in encoded.rows for b in row.branches
    }
    assert rows == {0: (b"defghij", b"xy"), 1: (b"cdefghij", b"x"), 2: (b"hij", b"123456")}
    assert encoded.n_truncated == 3
    assert len(encoded.rows) == 3


def test_a_continuation_longer_than_the_context_is_refused_by_line() -> None:
    item = Item("a", ("12345678", "123456789"), line=7)
    with pytest.raises(PreflightError) as caught:
        encode(item, BYTE, 8)
    assert caught.value.code == ExitCode.TEXT
    assert "file.jsonl" in caught.value.lines[0]
    assert "line 7" in caught.value.lines[0]
    assert "continuation 1 has 9 tokens" in caught.value.lines[0]
