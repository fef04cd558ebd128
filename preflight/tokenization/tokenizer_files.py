"""What tokenizers that come as one file of another program have in common."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.core.storage import open_regular
from preflight.core.strict_json import parse_json
from preflight.tokenization.protocol import (
    END_OF_TEXT,
    MissingLibraryError,
    Tokenizer,
    build_damage_error,
)

FACTS_NAME = "tokenizer_facts.json"
_MAX_FILE_BYTES = 128 * 2**20  # the largest published ones have about 40 MB
_MAX_FACTS_BYTES = 2**16
# Names of the token that ends a text, where no file says it: Llama 3, GPT-2, Llama and T5, ChatML.
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")


class _Facts(Schema):
    name: str
    end_of_text: str


class FileTokenizer(Tokenizer):
    """A tokenizer in a file that another library reads.

    Attributes:
        saved_name: the file's name in a checkpoint or a data folder.
        library: that reads the file, as it is imported and installed.
        content, end_of_text: the file, and the name of the token that ends a text, if it has one.
    """

    saved_name: ClassVar[str]
    library: ClassVar[str]

    def __init__(self, content: bytes, name: str, end_of_text: str) -> None:
        """Read `content`; `end_of_text` is a token's name, and empty where the vocabulary has none.

        Raises:
            ValueError: it is not such a file, or not one that text can be given back from.
            ImportError: the library is missing.
        """
        self.content, self.name = content, name
        pieces = self._open(content)
        self.vocab_size = 1 + max(pieces.values(), default=-1)
        if not self.vocab_size or self.vocab_size > 2**24:
            raise ValueError(f"its largest id is {self.vocab_size - 1:,}")
        known = [end for end in (end_of_text, *_ENDS) if end in pieces and not self._is_text(end)]
        self.end_of_text = known[0] if known else ""
        self.adds_end = not known
        self.end_of_text_id = pieces.get(self.end_of_text, self.vocab_size)
        self.vocab_size = max(self.vocab_size, self.end_of_text_id + 1)
        self._specials = {piece: pieces[piece] for piece in self._list_specials()}
        if self.adds_end and END_OF_TEXT not in pieces:
            self._specials[END_OF_TEXT] = self.end_of_text_id
        self._bytes = {i: self._spell(piece) for piece, i in pieces.items() if self._is_text(piece)}
        self._adds_space = self.decode_bytes(self.encode("x")) == b" x"

    @abc.abstractmethod
    def _open(self, content: bytes) -> dict[str, int]:
        """Let the library read the file, and return all pieces with their ids."""

    @abc.abstractmethod
    def _is_text(self, piece: str) -> bool:
        """Whether a piece stands for text: special tokens do not."""

    @abc.abstractmethod
    def _list_specials(self) -> Iterable[str]:
        """The special tokens, those that a chat template may write."""

    @abc.abstractmethod
    def _spell(self, piece: str) -> bytes:
        """The bytes that a piece stands for."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The library's ids."""

    @classmethod
    def load(cls, name: str) -> Self:
        """The tokenizer in the file called `name`."""
        path = Path(name)
        try:
            # A user's own link is followed: Hugging Face's cache consists of them.
            content = _read_limited(Path(os.path.realpath(path)), _MAX_FILE_BYTES)
            return cls(content, _name_after(path), _read_end_of_text(path))
        except ImportError:
            raise cls._missing_error(f"--tokenizer {name}", ExitCode.FLAGS) from None
        except (OSError, ValueError) as error:
            what = (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]
            raise PreflightError(
                ExitCode.FLAGS, f"--tokenizer {name}: no {cls.kind} tokenizer: {what}"
            ) from None

    @classmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        """The tokenizer that `save` wrote into `folder`."""
        try:
            saved = _Facts.read(parse_json(_read_limited(folder / FACTS_NAME, _MAX_FACTS_BYTES)))
            content = _read_limited(folder / cls.saved_name, _MAX_FILE_BYTES)
            tokenizer = cls(content, saved.name, saved.end_of_text)
            if tokenizer.fingerprint != facts["fingerprint"]:
                raise ValueError("they are those of another tokenizer")
        except ImportError:
            raise cls._missing_error(str(folder), ExitCode.CHECKPOINT) from None
        except (OSError, ValueError) as error:
            raise build_damage_error(folder, (cls.saved_name, FACTS_NAME), error) from None
        return tokenizer

    @classmethod
    def _missing_error(cls, what: str, code: ExitCode) -> MissingLibraryError:
        return MissingLibraryError(
            code,
            f"{what} needs the library {cls.library}, which is not installed",
            f"pip install {cls.library}",
        )

    @classmethod
    def _import_library(cls) -> Any:
        return importlib.import_module(cls.library)

    def save(self, folder: Path) -> list[Path]:
        """Write the file as it came, and which token ends a text."""
        file_path, facts_path = folder / self.saved_name, folder / FACTS_NAME
        file_path.write_bytes(self.content)
        facts = _Facts(name=self.name, end_of_text=self.end_of_text)
        facts_path.write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return [file_path, facts_path]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file and of the id that ends a text."""
        digest = hashlib.sha256(f"{self.kind} {self.end_of_text_id} ".encode())
        digest.update(self.content)
        return digest.hexdigest()

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Those of the file, and an end of text where it has none."""
        return self._specials

    def encode(self, text: str) -> np.ndarray:
        """Ids (int64) of `text` in one piece.

        Raises:
            PreflightError: code TEXT, when the library gives up on it.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._telling_failure(text):
            return np.array(self._encode(text), np.int64)

    @contextlib.contextmanager
    def _telling_failure(self, text: str) -> Iterator[None]:
        """Whatever the library raises becomes a PreflightError (TEXT)."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise PreflightError(
                ExitCode.TEXT, f"{self.name} cannot encode {text[:40]!r}...: {str(error)[:100]}"
            ) from None

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of an ordinary token; None for special tokens and gaps."""
        return self._bytes.get(token)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` encode, without the space that many put before its beginning."""
        text = super().decode(ids)
        return text[1:] if self._adds_space and text.startswith(" ") else text


def _read_limited(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} has more than {limit:,} bytes")
    return content


def _name_after(path: Path) -> str:
    """A name for checkpoints and messages: the file's, with its folder's where all are alike."""
    inner = path.absolute()
    return f"{inner.parent.name}/{inner.name}" if inner.stem == "tokenizer" else inner.name


def _read_end_of_text(path: Path) -> str:
    """The end of text that a ``tokenizer_config.json`` beside the file names; empty without one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        beside = path.with_name("tokenizer_config.json")
        end = parse_json(_read_limited(beside, 2**24)).get("eos_token") or ""
        return str(end.get("content") if isinstance(end, dict) else end)
    return ""


def iterate_parts(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of a ``tokenizer.json``, in order."""
    if isinstance(part, dict):
        lists = [part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part]
        if not lists:
            yield part
        for step in lists[0] if lists else ():
            yield from iterate_parts(step)


def load_document(content: bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else. Larger than what `parse_json` takes."""
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON, or cut short: {error}") from None
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    return document
