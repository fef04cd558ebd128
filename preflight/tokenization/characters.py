"""One id per character of the text: a sorted table, as nanoGPT's character-level examples have."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import open_regular
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json
from preflight.tokenization.protocol import Tokenizer, TrainingText

TABLE_NAME = "tokenizer_characters.json"
_UNKNOWN = -1


class CharTokenizer(Tokenizer):
    """The sorted characters of a text, and one more id for its end."""

    kind = "characters"
    name = "char"
    is_trained = True

    def __init__(self, characters: str) -> None:
        """`characters`: each once, in the order of their code points.

        Raises:
            ValueError: they are not.
        """
        if list(characters) != sorted(set(characters)) or not characters:
            raise ValueError("the characters are not sorted, or one is given twice")
        characters.encode()  # half a surrogate pair is no character: UnicodeEncodeError
        self.characters = characters
        self.end_of_text_id = len(characters)
        self.vocab_size = len(characters) + 1
        codes = _read_codes(characters)
        self._ids = np.full(int(codes[-1]) + 2, _UNKNOWN, np.int32)  # the last: all above
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def load(cls, name: str) -> Self:
        """Never: the table is made from a text."""
        raise PreflightError(ExitCode.FLAGS, f"--tokenizer {name} is made from a text: give one")

    @classmethod
    def train(cls, text: TrainingText, vocab_size: int | None) -> Self:
        """The characters of the whole text, its validation part included."""
        found: set[str] = set()
        for piece in text.read("train", "val"):
            found.update(piece)
        return cls("".join(sorted(found)))

    @classmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        """The table that `save` wrote into `folder`."""
        try:
            with open_regular(folder / TABLE_NAME) as file:
                content = parse_json(file.read(MAX_JSON_BYTES + 1))
            if not isinstance(content, str):
                raise ValueError("not a text")
            tokenizer = cls(content)
            if tokenizer.fingerprint != facts["fingerprint"]:
                raise ValueError("it is the table of another tokenizer")
        except (OSError, ValueError) as error:
            what = (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"{folder / TABLE_NAME} is damaged: {what}",
                "restore the file, or choose another checkpoint",
            ) from None
        return tokenizer

    def save(self, folder: Path) -> list[Path]:
        """Write the table as one JSON string."""
        path = folder / TABLE_NAME
        path.write_text(json.dumps(self.characters) + "\n", encoding="ascii")
        return [path]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the table."""
        return hashlib.sha256(b"characters " + json.dumps(self.characters).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of the characters.

        Raises:
            PreflightError: code TEXT, naming characters that the table does not hold.
        """
        codes = _read_codes(text)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(ids) and ids.min() == _UNKNOWN:
            raise self._unknown_error({chr(code) for code in codes[ids == _UNKNOWN]})
        return ids

    def encode_with_offsets(
        self, text: str, *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """A character each, also where it is replaced."""
        starts = np.arange(len(text))
        return self.encode(text), np.stack([starts, starts + 1], axis=1)

    def replacing_unknown(self) -> CharTokenizer:
        """The same table; unknown characters become U+FFFD, "?" or a space: the first it holds.

        Raises:
            PreflightError: code TEXT, when the table holds none of them.
        """
        stand_in = next((c for c in "\ufffd? " if c in self.characters), None)
        if stand_in is None:
            raise PreflightError(
                ExitCode.TEXT,
                "--replace-unknown: the char tokenizer knows no '?' and no space to put in place",
            )
        replacing = CharTokenizer(self.characters)
        replacing._ids[replacing._ids == _UNKNOWN] = self.characters.index(stand_in)
        return replacing

    def _unknown_error(self, unknown: set[str]) -> PreflightError:
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in sorted(unknown)[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        return PreflightError(
            ExitCode.TEXT,
            f"the text has {named}{more}, which the char tokenizer does not know: its table holds "
            f"the {len(self.characters):,} characters of the text that it was made from",
            "leave them out; in prompts, --replace-unknown replaces them",
        )

    def token_bytes(self, token: int) -> bytes | None:
        """The character's UTF-8."""
        is_character = 0 <= token < len(self.characters)
        return self.characters[token].encode() if is_character else None

    def last_cut(self, text: str) -> int:
        """The end: characters do not depend on each other."""
        return len(text)


def _read_codes(text: str) -> np.ndarray:
    """Code points (uint32) of the characters, halves of surrogate pairs included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
