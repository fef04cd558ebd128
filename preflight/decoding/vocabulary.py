"""What decoding needs to know of token ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Vocabulary(Protocol):
    """The ids that a model may generate. Every `Tokenizer` is one."""

    def __hash__(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        ...

    @property
    def end_of_text_id(self) -> int:
        """The id that ends a completion."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that an id stands for; None: it is not generated, but as the end of text."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        ...


@dataclass(frozen=True)
class AnyIds:
    """Ids without a tokenizer: all may be generated, none ends a text, none stands for bytes."""

    vocab_size: int
    end_of_text_id: int = -1

    def token_bytes(self, token: int) -> bytes | None:
        """None of them."""
        return b""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """None of them."""
        return b""


@functools.cache
def list_ids_without_text(vocabulary: Vocabulary) -> list[int]:
    """Ids never generated: gaps in the vocabulary, special tokens other than the end of text."""
    ids, end = range(vocabulary.vocab_size), vocabulary.end_of_text_id
    return [i for i in ids if vocabulary.token_bytes(i) is None and i != end]
