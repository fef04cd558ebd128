"""What an evaluation is made of: tasks of items, the scores of items, figures with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "choices": several continuations, one of them right (HellaSwag). "last-word": one continuation,
# right when greedy decoding gives it (LAMBADA). "pages": whole texts, scored token by token
# (WikiText).
TaskKind = Literal["choices", "last-word", "pages"]


@dataclass(frozen=True)
class Item:
    """One item: a context and what may follow it.

    Attributes:
        context: what the model reads; empty for a page.
        continuations: the choices, the one continuation, or the page itself.
        label: index of the right continuation.
        line: of the file, from 1.
        n_words: of a page as its benchmark counts them, for the perplexity per word; else 0.
        n_bytes: of a page before any clean-up, for the bits per byte; else 0.
    """

    context: str
    continuations: tuple[str, ...]
    label: int = 0
    line: int = 0
    n_words: int = 0
    n_bytes: int = 0


@dataclass(frozen=True)
class Task:
    """A set of items of one kind.

    Attributes:
        name: for tables.
        kind: how the items are scored.
        source: the file, or "built-in" for the small sets of our own writing.
        items: all of them; a run may score the first N.
    """

    name: str
    kind: TaskKind
    source: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ItemScore:
    """What a model gave one item.

    Attributes:
        log_likelihoods: natural logarithm of each continuation's probability.
        n_tokens: predicted tokens of each continuation.
        is_greedy: whether greedy decoding gives the continuation, each.
    """

    log_likelihoods: tuple[float, ...]
    n_tokens: tuple[int, ...]
    is_greedy: tuple[bool, ...]


@dataclass(frozen=True)
class Figure:
    """One figure of a task with its 95 % interval.

    Attributes:
        name: as the field calls it: acc, acc_norm, perplexity, word_perplexity, bits_per_byte, ...
        value: the figure.
        low, high: ends of the interval.
        n_items: what it was computed from.
        higher_is_better: the direction.
    """

    name: str
    value: float
    low: float
    high: float
    n_items: int
    higher_is_better: bool
