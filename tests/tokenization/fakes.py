"""A tokenizer for which every wrong cut changes the ids, and a text to make tokenizers from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from preflight.tokenization import Tokenizer


class PairTokenizer(Tokenizer):
    """One id for two bytes, counted from the beginning of the text; it knows no place to cut."""

    kind = "pairs"

    def __init__(self, name: str) -> None:
        self.name = name
        self.vocab_size = 256 + 2**16 + 1
        self.end_of_text_id = self.vocab_size - 1

    @property
    def fingerprint(self) -> str:
        return f"pairs of bytes, {self.name}"

    @classmethod
    def load(cls, name: str) -> Self:
        return cls(name)

    @classmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        return cls((folder / "tokenizer_pairs.txt").read_text())

    def encode(self, text: str) -> np.ndarray:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        pairs = 256 + data[0 : len(data) // 2 * 2 : 2] * 256 + data[1::2]
        return np.concatenate([pairs, data[len(data) // 2 * 2 :]])

    def token_bytes(self, token: int) -> bytes | None:
        if token == self.end_of_text_id:
            return None
        return bytes([token]) if token < 256 else (token - 256).to_bytes(2, "big")

    def save(self, folder: Path) -> list[Path]:
        path = folder / "tokenizer_pairs.txt"
        path.write_text(self.name)
        return [path]


class PlainText:
    """One string for both parts of a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def count_bytes(self, *splits: str) -> int:
        return len(splits) * len(self.text.encode())

    def read(self, *splits: str) -> Iterator[str]:
        return iter([self.text] * len(splits))
