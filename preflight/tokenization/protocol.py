"""What every kind of tokenizer offers. A new kind is one class here and one row in `kinds.py`."""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import DISK_ERRNOS, storage_error

# How the end of text is spelled where the tokenizer itself has no spelling for it: as GPT-2 has it.
END_OF_TEXT = "<|endoftext|>"


class TrainingText(Protocol):
    """The text that a tokenizer is made from, shared out into its parts ``train`` and ``val``."""

    def count_bytes(self, *splits: str) -> int:
        """Bytes of UTF-8 in these parts."""

    def read(self, *splits: str) -> Iterator[str]:
        """These parts in pieces of at most 1 MiB, the same ones every time."""


def build_damage_error(
    folder: Path, names: tuple[str, str], error: OSError | ValueError
) -> PreflightError:
    """That the saved files `names` in `folder` cannot be used: code CHECKPOINT.

    Code STORAGE, where the disk is at fault.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return storage_error(folder / names[0], error)
    what = (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{folder}: {names[0]} or {names[1]} is damaged: {what}",
        "restore the files, or choose another checkpoint",
    )


def count_characters(data: bytes, offsets: np.ndarray) -> np.ndarray:
    """Where tokens begin and end in a text, in characters (T 2), from `offsets` in its bytes.

    A part of a character covers the whole character. `data` is the text as UTF-8.
    """
    begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # bytes that begin a character
    character = begins.cumsum() - 1  # that each byte belongs to
    last = np.minimum(offsets[:, 1], len(data)) - 1
    return np.stack([character[np.minimum(offsets[:, 0], last)], character[last] + 1], axis=1)


class MissingLibraryError(PreflightError):
    """A library that a tokenizer needs is not installed. Nothing is damaged."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    A class that inherits from this one gets the methods that follow from the others.

    Attributes:
        kind: the kind's name in ``config.json``, the same for all tokenizers of the class.
        name: the tokenizer's own name, as in ``--tokenizer``.
        vocab_size: every id is below it; not every number below it need be an id.
        end_of_text_id: comes after each document.
        is_trained: it is made from the text by `train`; otherwise its name says all, for `load`.
        max_unit_bytes: a document without a place to cut is held in memory up to this size.
        adds_end: its file has no token that ends a text, so that an id beyond its own was added.
        bos_id: the id that the tokenizer's own file puts before every text; None: none does.
    """

    kind: ClassVar[str]
    is_trained: ClassVar[bool] = False
    max_unit_bytes: ClassVar[int] = 208 * 2**20
    name: str
    vocab_size: int
    end_of_text_id: int
    adds_end: bool = False
    bos_id: int | None = None

    @classmethod
    @abstractmethod
    def load(cls, name: str) -> Self:
        """The tokenizer of this kind called `name`, in any process.

        Raises:
            PreflightError: code FLAGS, when it cannot be loaded.
        """

    @classmethod
    def train(cls, text: TrainingText, vocab_size: int | None) -> Self:
        """Make the tokenizer from the text; the same text gives the same tokenizer.

        Args:
            text: read as often as needed.
            vocab_size: ids to aim for; unset: chosen by the size of the text.

        Raises:
            PreflightError: code FLAGS, for a size that this kind cannot have.
        """
        raise NotImplementedError(f"tokenizers of kind {cls.kind} are not trained")

    @classmethod
    @abstractmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        """The tokenizer that `save` wrote into `folder`. A stranger may have written the files.

        Args:
            folder: a checkpoint's.
            facts: what its ``config.json`` says: `describe` of the tokenizer that was saved.

        Raises:
            PreflightError: code CHECKPOINT, when a file is missing or damaged, or when the files
                are not those of the tokenizer that `facts` describe.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal only if every text gives equal ids. Data folders and checkpoints record it."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, one-dimensional. A special token's spelling in it is plain text."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that an id stands for.

        None: it stands for no text, as special tokens and gaps in the vocabulary do. Such an id
        is never generated, except for the end of text.
        """

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the files that `load_saved` reads into `folder`, and return their paths."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that a chat template may write, by their spelling.

        `encode` never gives them. The end of text is one of them.
        """
        return {END_OF_TEXT: self.end_of_text_id}

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds special tokens in a text, the longest first; a group holds the spelling alone."""
        spellings = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, spellings))})")

    def encode_with_offsets(
        self, text: str, *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids (T,) of `encode`, and where each begins and ends in `text`, in characters (T 2).

        A token of a part of a character covers the whole character.

        Args:
            text: Unicode without halves of surrogate pairs.
            begins: it is the beginning of a text, and does not follow a special token.
        """
        ids = self.encode(text)
        ends = self._byte_counts[ids].cumsum()
        data = text.encode()
        if len(ids) and ends[-1] != len(data):
            raise ValueError(f"the tokens of {self.name} are not the bytes of the text")
        offsets = np.stack([ends - self._byte_counts[ids], ends], axis=1)
        return ids, offsets if len(data) == len(text) else count_characters(data, offsets)

    @functools.cached_property
    def _byte_counts(self) -> np.ndarray:
        """Bytes (V,) that each id stands for."""
        spelled = (self.token_bytes(token) or b"" for token in range(self.vocab_size))
        return np.fromiter(map(len, spelled), np.int64, self.vocab_size)

    def last_cut(self, text: str) -> int:
        """The last index in `text` where it may be cut; 0 where no such place is known.

        Encoding both sides apart must give the ids of the whole, whatever comes before `text`
        and after it. Long documents are encoded between such places, and whole without any.
        """
        return 0

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        """The ids of `encode`, in parts.

        For text of any length without a place to cut. A kind that can encode such a text in
        bounded memory overrides this.
        """
        yield self.encode(text)

    def replacing_unknown(self) -> Tokenizer:
        """The same tokenizer, which replaces characters that it has no ids for in what it encodes.

        Itself where it has ids for every text.
        """
        return self

    @property
    def id_dtype(self) -> np.dtype:
        """The type of ids in shards: uint16 holds ids up to 65,535."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; ids that stand for no text give none."""
        return b"".join(self.token_bytes(int(token)) or b"" for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """`ids` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __hash__(self) -> int:
        """By identity, so that a function can keep results per tokenizer."""
        return object.__hash__(self)

    def describe(self) -> dict[str, Any]:
        """The tokenizer as a checkpoint's ``config.json`` records it."""
        return {
            "kind": self.kind,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
        }
