"""Chats on their way to rows: which turns are kept of one that is too long."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from preflight.tokenization.chats import Chat, Message

_MAX_BATCH = (512, 4 * 2**20)  # chats and characters that are rendered with one request
Span = tuple[int, int]


@dataclass
class Draft:
    """A chat on its way to a row: the beginning that it may be cut at, and what it became.

    Attributes:
        messages: all that it has.
        place: for messages.
        begins: where what is kept may begin, apart from a system message, earliest first.
        low, high: the earliest beginning that fits lies between them.
        at: the beginning that is tried, as a place in `begins`.
        ids, offsets: of what is kept.
        spans: of its answers, in the characters of its text.
        is_marked: the template marks the answers.
        rewrites: the answers are not where the chat up to them ends, so that `spans` is empty.
    """

    messages: Sequence[Message]
    place: str
    begins: list[int]
    low: int
    high: int
    at: int
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    offsets: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    spans: list[Span] = field(default_factory=list)
    is_marked: bool = False
    rewrites: bool = False

    @property
    def n_dropped(self) -> int:
        """Messages that are left out at the beginning."""
        return self.begins[self.at] - self.begins[0]

    @property
    def kept(self) -> Sequence[Message]:
        """The system message, if there is one, and what follows from the beginning tried."""
        return [*self.messages[: self.begins[0]], *self.messages[self.begins[self.at] :]]

    def narrow(self, *, fits: bool) -> bool:
        """Note whether the beginning tried fits. True: another has to be tried."""
        if fits:
            self.high = self.at
        else:
            self.low = min(self.at + 1, self.high)
        if self.at == self.high == self.low:
            return False
        self.at = (self.low + self.high) // 2
        return True


def start_draft(messages: Sequence[Message], place: str, max_tokens: int) -> Draft:
    """The draft of a chat that is to have `max_tokens` at most. It has no ids yet."""
    first = 1 if messages and messages[0].role == "system" else 0
    begins = [first]
    for i in range(first + 1, len(messages)):
        if messages[i].role == "user" and messages[i - 1].role != "user":
            begins.append(i)
    # A message has a token at least, so that most of an endless chat is never rendered.
    low = bisect.bisect_left(begins, len(messages) - max_tokens, hi=len(begins) - 1)
    return Draft(messages, place, begins, low, len(begins) - 1, low)


def drop_behind(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages up to the last answer: what follows it has nothing to learn."""
    n = len(messages)
    while n and messages[n - 1].role != "assistant":
        n -= 1
    return messages[:n]


def cut_batches(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    """The chats in parts that are rendered at once."""
    max_chats, max_characters = _MAX_BATCH
    batch: list[Chat] = []
    n_characters = 0
    for chat in chats:
        batch.append(chat)
        n_characters += sum(len(message.content) for message in chat.messages)
        if len(batch) >= max_chats or n_characters >= max_characters:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch
