"""What a data folder of chats records of them: the key ``chats`` of its ``metadata.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.corpus.metadata import Count, Metadata, damaged_error
from preflight.tokenization import Tokenizer
from preflight.tokenization.chats import Chat, EncodedChat

CHATS_KEY = "chats"


class Template(Protocol):
    """How a chat is written as text."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def fingerprint(self) -> str:
        """Equal only if every chat is written alike."""


class Encoder(Protocol):
    """Turns chats into ids and masks."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the ids."""

    @property
    def template(self) -> Template:
        """Of the text."""

    @property
    def context_length(self) -> int:
        """Tokens of a row at most."""

    @property
    def learn_from(self) -> str:
        """``answers`` or ``all``."""

    @property
    def fingerprint(self) -> str:
        """Equal only if every chat has equal ids and masks."""

    def encode(self, chats: Sequence[Chat]) -> list[list[EncodedChat]]:
        """The rows of each chat; none where no target fits."""


class TemplateEntry(Schema):
    """The template that wrote the chats."""

    name: str
    fingerprint: str


class ExampleEntry(Schema):
    """A row of the training part to show, and where its chat stands."""

    place: str
    row: Count


class ChatCounts(Schema):
    """What was counted while the chats were encoded, both parts together.

    Attributes:
        n_chats: that were read.
        n_open: of them, those whose last message had no answer; it was left out.
        n_dropped: chats without a target, of which nothing was kept.
        n_rows: that were written; a chat may give more than one.
        n_cut: chats that are too long and have lost their first messages.
        n_cut_turns: messages that were left out so.
        n_cut_at_end: chats whose last exchange alone is too long; its end was left out.
        n_cut_tokens: tokens that were left out so.
        n_answers: answers that are learned from.
        n_ended: of them, those whose end token is learned too.
        n_targets, n_tokens: tokens that are learned, and all.
        longest: tokens of the longest row.
    """

    n_chats: Count = 0
    n_open: Count = 0
    n_dropped: Count = 0
    n_rows: Count = 0
    n_cut: Count = 0
    n_cut_turns: Count = 0
    n_cut_at_end: Count = 0
    n_cut_tokens: Count = 0
    n_answers: Count = 0
    n_ended: Count = 0
    n_targets: Count = 0
    n_tokens: Count = 0
    longest: Count = 0


class ChatFacts(Schema):
    """The whole key ``chats``."""

    formats: list[str]
    template: TemplateEntry
    encoder: str
    context_length: Count
    learn_from: str
    counts: ChatCounts
    examples: list[ExampleEntry]


def read_facts(folder: Path, metadata: Metadata) -> ChatFacts:
    """What the metadata of a data folder says of its chats.

    Raises:
        PreflightError: code DATA, when it holds text, or what it says is damaged.
    """
    content = (metadata.model_extra or {}).get(CHATS_KEY)
    if content is None:
        raise build_text_error(folder)
    try:
        return ChatFacts.read(content)
    except ValueError as error:
        raise damaged_error(folder, f"{CHATS_KEY}: {error}") from None


def build_text_error(folder: Path) -> PreflightError:
    """The error to raise for a data folder of text where one of chats is expected."""
    return PreflightError(
        ExitCode.DATA,
        f"{folder} holds text, not chats",
        "nothing was changed; choose another --data-dir",
    )
