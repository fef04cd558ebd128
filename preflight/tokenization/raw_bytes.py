"""One id per byte: knows every text, needs no file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from preflight.tokenization.protocol import Tokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; 256 is the end of the text."""

    kind = "bytes"
    name = "byte"
    vocab_size = 257
    end_of_text_id = 256
    fingerprint = hashlib.sha256(b"bytes of UTF-8, then the end of text").hexdigest()

    @classmethod
    def load(cls, name: str) -> Self:
        """There is one."""
        return cls()

    @classmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        """There is one, whatever the folder holds."""
        return cls()

    def save(self, folder: Path) -> list[Path]:
        """It has no files."""
        return []

    def encode(self, text: str) -> np.ndarray:
        """The bytes (uint8); half a surrogate pair becomes U+FFFD, as tiktoken has it."""
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return np.frombuffer(data, np.uint8)

    def token_bytes(self, token: int) -> bytes | None:
        """The byte."""
        return bytes([token]) if 0 <= token < 256 else None

    def last_cut(self, text: str) -> int:
        """The end: bytes do not depend on each other."""
        return len(text)
