"""A chat as messages, and as the ids and the mask that a model learns from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preflight.core.errors import PreflightError

ROLES = ("system", "user", "assistant")


class PromptTooLongError(PreflightError):
    """The last message of a chat does not fit into the context."""


@dataclass(frozen=True)
class Message:
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: perhaps a system message, then turns of user and assistant.
        place: where it stands, for messages: ``chats.jsonl, line 12``.
    """

    messages: tuple[Message, ...]
    place: str = ""


@dataclass(frozen=True)
class EncodedChat:
    """The tokens of a chat, and which of them are learned.

    Attributes:
        ids: (T,) int64.
        mask: (T,) bool: the tokens of answers, and those that end them. The first is never one.
        n_answers: answers of which at least one token is learned.
        n_ended: those of them whose end token is learned too.
        n_cut_turns: messages left out at the beginning because the chat is too long.
        n_cut_tokens: tokens left out at the end, where the last exchange alone is too long.
    """

    ids: np.ndarray
    mask: np.ndarray
    n_answers: int
    n_ended: int
    n_cut_turns: int = 0
    n_cut_tokens: int = 0
