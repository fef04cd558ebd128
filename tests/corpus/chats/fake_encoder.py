"""A plain encoder of chats: roles and contents as text, the end of text behind each answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.chats import Chat, EncodedChat, Message


@dataclass(frozen=True)
class FakeTemplate:
    """A name, and nothing else."""

    name: str = "fake"

    @property
    def fingerprint(self) -> str:
        """Of the name."""
        return hashlib.sha256(self.name.encode()).hexdigest()


class FakeEncoder:
    """``User: ...``, ``Assistant: ...`` in lines; the first turns go where a chat is too long."""

    def __init__(
        self,
        tokenizer: Tokenizer | str = "byte",
        context_length: int = 10_000,
        *,
        template: FakeTemplate = FakeTemplate(),
        learn_from: str = "answers",
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.template, self.context_length = template, context_length
        self.learn_from = learn_from
        self.n_encoded = 0

    @property
    def fingerprint(self) -> str:
        """Of all that changes ids or masks."""
        facts = (
            self.tokenizer.fingerprint,
            self.template.fingerprint,
            self.context_length,
            self.learn_from,
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def encode(self, chats: Sequence[Chat]) -> list[list[EncodedChat]]:
        """One row a chat, or none."""
        self.n_encoded += len(chats)
        return [self._encode(chat) for chat in chats]

    def _encode(self, chat: Chat) -> list[EncodedChat]:
        turns = [self._encode_turn(message) for message in chat.messages]
        n_cut = 0
        while n_cut < len(turns) - 2 and sum(len(i) for i, _ in turns) > self.context_length:
            turns, n_cut = turns[1:], n_cut + 1
        ids, mask = (np.concatenate(parts) for parts in zip(*turns, strict=True))
        n_tokens = len(ids)
        ids, mask = ids[: self.context_length], mask[: self.context_length]
        if not mask.any():
            return []
        n_answers = sum(message.role == "assistant" for message in chat.messages[n_cut:])
        n_ended = int((ids[mask] == self.tokenizer.end_of_text_id).sum())
        return [EncodedChat(ids, mask, n_answers, n_ended, n_cut, n_tokens - len(ids))]

    def _encode_turn(self, message: Message) -> tuple[np.ndarray, np.ndarray]:
        head = self.tokenizer.encode(f"{message.role.title()}: ").astype(np.int64)
        body = self.tokenizer.encode(message.content).astype(np.int64)
        is_answer = message.role == "assistant"
        tail = [self.tokenizer.end_of_text_id] if is_answer else self.tokenizer.encode("\n")
        ids = np.concatenate([head, body, np.array(tail, np.int64)])
        mask = np.zeros(len(ids), bool)
        mask[len(head) :] = is_answer
        return ids, mask
