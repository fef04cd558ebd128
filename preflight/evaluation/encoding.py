"""Items to token ids by the rules of lm-evaluation-harness, and which of them are run together.

A `Row` is what a model reads at once: one context, and the continuations that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from preflight.core.errors import PreflightError
from preflight.corpus.sources.protocol import text_error
from preflight.evaluation.items import Item, Task
from preflight.tokenization import Tokenizer


@dataclass(frozen=True)
class Branch:
    """A continuation after a row's context: which of its item, and its tokens (at least one)."""

    index: int
    tokens: list[int]


@dataclass(frozen=True)
class Row:
    """What is run at once: a context of at least one token, and what may follow it.

    A page has several rows with one branch each, all of them parts of continuation 0.
    """

    item: int
    context: list[int]
    branches: list[Branch]

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model: a continuation's last one need not."""
        return len(self.context) + sum(len(branch.tokens) - 1 for branch in self.branches)


@dataclass
class EncodedTask:
    """The rows of a task's items, and what a reader of the figures should know of them.

    Attributes:
        rows: in the order of the items.
        n_truncated: continuations whose context lost its beginning, since it was too long.
        n_joined: continuations whose first token would span the border to the context; they are
            encoded apart.
    """

    rows: list[Row] = field(default_factory=list)
    n_truncated: int = 0
    n_joined: int = 0

    def list_notes(self) -> list[str]:
        """The counts in words, those that are not zero."""
        notes = []
        if self.n_truncated:
            notes.append(f"{self.n_truncated:,} contexts were cut on the left to fit the model")
        if self.n_joined:
            notes.append(f"{self.n_joined:,} continuations were encoded apart from their context")
        return notes


def encode_task(
    task: Task, items: Sequence[Item], tokenizer: Tokenizer, context_length: int
) -> EncodedTask:
    """The rows of `items`, which are of `task`.

    Raises:
        PreflightError: code TEXT, naming file and line, for a continuation longer than the
            context, and for a character that the tokenizer does not know.
    """
    encoded = EncodedTask()
    for number, item in enumerate(items):
        try:
            if task.kind == "pages":
                page = _encode(tokenizer, item.continuations[0])
                start = tokenizer.end_of_text_id
                windows = list_windows(page, start, context_length)
                encoded.rows += [Row(number, c, [Branch(0, tokens)]) for c, tokens in windows]
            else:
                encoded.rows += _encode_item(number, item, tokenizer, context_length, encoded)
        except ValueError as error:
            raise text_error(
                task.source, f"line {item.line}: {error}", "shorten it, or leave the line out"
            ) from None
        except PreflightError as error:
            raise PreflightError(
                error.code, f"{task.source}, line {item.line}:", *error.lines
            ) from None
    return encoded


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text).tolist()
    return ids


def _encode_item(
    number: int, item: Item, tokenizer: Tokenizer, context_length: int, counts: EncodedTask
) -> list[Row]:
    """The rows of an item with a context: one for each length that its context is cut to."""
    rows: dict[tuple[int, ...], Row] = {}
    kept = item.context.rstrip()
    shared = _encode(tokenizer, kept)
    for index, continuation in enumerate(item.continuations):
        # White space at the end of the context belongs to the first token of what follows.
        tail = item.context[len(kept) :] + continuation
        context = shared
        if not kept:
            tokens = _encode(tokenizer, tail)
            # A new text begins after an end of text; one that is there already is not doubled.
            begins = tokens[:1] == [tokenizer.end_of_text_id] and len(tokens) > 1
            context, tokens = (
                (tokens[:1], tokens[1:])
                if begins
                else (
                    [tokenizer.end_of_text_id],
                    tokens,
                )
            )
        else:
            tokens = _encode(tokenizer, kept + tail)[len(shared) :]
            if not tokens:
                counts.n_joined += 1
                tokens = _encode(tokenizer, tail)
        if not tokens:
            raise ValueError(f"continuation {index} has no token")
        if len(tokens) > context_length:
            raise ValueError(
                f"continuation {index} has {len(tokens):,} tokens, the model's context "
                f"{context_length:,}"
            )
        # All but the last token go through the model.
        room = context_length + 1 - len(tokens)
        counts.n_truncated += len(context) > room
        context = context[-room:]
        row = rows.setdefault(tuple(context), Row(number, context, []))
        row.branches.append(Branch(index, tokens))
    return list(rows.values())


def list_windows(
    tokens: Sequence[int], start: int, context_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """A long text in windows that predict each token once: contexts, and the tokens after them.

    The first window begins with the token `start`. Each later one has one token of context; the
    last is filled with as many as there is room for.
    """
    text = [start, *tokens]
    for first in range(0, len(tokens), context_length):
        last = min(first + context_length, len(tokens))
        begin = max(0, last - context_length)
        yield text[begin : first + 1], text[first + 1 : last + 1]
