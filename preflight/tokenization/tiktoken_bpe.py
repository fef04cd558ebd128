"""Tokenizers of tiktoken: byte-level BPE over the pieces of a split pattern.

`gpt2` is built from the merge ranks in ``assets/`` and needs no network. Every other encoding is
loaded by name through tiktoken's own cache. In a checkpoint a tokenizer is two files: its ranks in
tiktoken's format, and a JSON file with its split pattern and special tokens.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.core.storage import open_regular
from preflight.core.strict_json import parse_json
from preflight.tokenization.protocol import END_OF_TEXT, Tokenizer, build_damage_error
from preflight.tokenization.tiktoken_cutting import (
    GPT2_PATTERN,
    PROVEN_PATTERNS,
    encode_long,
    find_last_cut,
)

GPT2_RANKS_PATH = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
RANKS_NAME = "tokenizer.tiktoken"
CONFIG_NAME = "tokenizer_config.json"
# Limits for files that a stranger may have written; o200k, the largest encoding, has 3.6 MB.
_MAX_RANKS_BYTES = 64 * 2**20
_MAX_CONFIG_BYTES = 2**20
_MAX_ID = 2**24


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding in which a user's text never yields a special token."""

    kind = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.end_of_text_id = encoding.eot_token
        self._is_proven = encoding._pat_str in PROVEN_PATTERNS

    @classmethod
    def load(cls, name: str) -> Self:
        """The encoding called `name`; ``gpt2`` from the assets, others through tiktoken's cache."""
        return cls(_build_gpt2_encoding() if name == "gpt2" else _load_encoding(name))

    @classmethod
    def load_saved(cls, folder: Path, facts: Mapping[str, Any]) -> Self:
        """The encoding whose files are in `folder`."""
        try:
            tokenizer = cls(_read_encoding(folder))
            found = tokenizer.fingerprint
            if (found, tokenizer.vocab_size) != (facts["fingerprint"], facts.get("vocab_size")):
                raise ValueError(
                    f"their fingerprint is {found[:12]} with {tokenizer.vocab_size} ids, expected "
                    f"{str(facts['fingerprint'])[:12]} with {str(facts.get('vocab_size'))[:12]}"
                )
        except (OSError, ValueError) as error:
            raise build_damage_error(folder, (RANKS_NAME, CONFIG_NAME), error) from None
        return tokenizer

    def save(self, folder: Path) -> list[Path]:
        """Write the ranks and, as JSON, the split pattern and the special tokens."""
        config = _SavedConfig(
            kind=self.kind,
            name=self.name,
            pattern=self.encoding._pat_str,
            special_tokens=self.encoding._special_tokens,
        )
        ranks = self.encoding._mergeable_ranks.items()  # their order enters the fingerprint
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks]
        ranks_path, config_path = folder / RANKS_NAME, folder / CONFIG_NAME
        ranks_path.write_bytes(b"".join(lines))
        config_path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return [ranks_path, config_path]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over split pattern, ranks and special tokens: equal means equal ids."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in self.encoding._mergeable_ranks.items():
            digest.update(b"%d %d " % (rank, len(token)) + token)
        for text, rank in sorted(self.encoding._special_tokens.items()):
            digest.update(f"{text} {rank}".encode())
        return digest.hexdigest()

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Those of the encoding."""
        return self.encoding._special_tokens

    def encode(self, text: str) -> np.ndarray:
        """Ids (uint32) of `text`, exactly those of tiktoken's ``encode_ordinary``.

        Raises:
            PreflightError: code TEXT, when tiktoken gives up on a text of that length.
        """
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, in a prompt that is not UTF-8
            return np.array(self.encoding.encode_ordinary(text), np.uint32)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in tiktoken's Rust is no Exception
            if self._is_proven:
                return np.concatenate(list(self.encode_parts(text)))
            raise PreflightError(
                ExitCode.TEXT,
                f"{self.name} cannot encode {len(text):,} characters at once",
                "break the text into documents (--document-separator), or use --tokenizer gpt2",
            ) from None

    def encode_parts(self, text: str) -> Iterator[np.ndarray]:
        """The ids of `encode` in parts; in bounded memory where the split pattern is known."""
        return encode_long(self.encoding, text) if self._is_proven else super().encode_parts(text)

    def last_cut(self, text: str) -> int:
        """The last safe place to cut; none where nothing is proven for the split pattern."""
        return find_last_cut(text) if self._is_proven else 0

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of an ordinary token; None for special tokens and gaps."""
        return self._tokens.get(token)

    @functools.cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.encoding._mergeable_ranks.items()}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for, special tokens by their spelling.

        Ids beyond the vocabulary, as padded embedding rows have them, give none.
        """
        return self.encoding.decode_bytes([i for i in ids if i < self.vocab_size])


# ---- by name ------------------------------------------------------------------------------------


def _load_encoding(name: str) -> tiktoken.Encoding:
    """An encoding of tiktoken's own; PreflightError (FLAGS) when it cannot be had."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' exceptions are OSErrors and carry the address
        url = getattr(getattr(error, "request", None), "url", None)
        if url is None:
            raise PreflightError(
                ExitCode.FLAGS, f"--tokenizer {name}: its vocabulary cannot be read: {error}"
            ) from None
        cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(
            tempfile.gettempdir(), "data-gym-cache"
        )
        key = hashlib.sha1(url.encode()).hexdigest()  # how tiktoken names its cache files
        raise PreflightError(
            ExitCode.FLAGS,
            f"--tokenizer {name}: its vocabulary is not in tiktoken's cache and cannot be fetched",
            f"fetch {url} elsewhere and save it as {os.path.join(cache, key)}",
            "(set TIKTOKEN_CACHE_DIR to keep it in a folder of yours), or use --tokenizer gpt2",
        ) from None


def _build_gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's byte-level BPE (Radford et al. 2019) from its 50,256 merge ranks."""
    try:
        content = GPT2_RANKS_PATH.read_bytes()
    except OSError as error:
        raise PreflightError(
            ExitCode.STORAGE, f"{GPT2_RANKS_PATH}: {error.strerror}; it belongs to Preflight"
        ) from None
    if hashlib.sha256(content).hexdigest() != GPT2_RANKS_SHA256:
        raise PreflightError(
            ExitCode.STORAGE, f"{GPT2_RANKS_PATH} is damaged; take it from a fresh copy"
        )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=load_tiktoken_bpe(str(GPT2_RANKS_PATH)),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


# ---- from a checkpoint's files ------------------------------------------------------------------


class _SavedConfig(Schema):
    kind: str
    name: str
    pattern: str
    special_tokens: dict[str, int]


def _read_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding in two files that a stranger may have written.

    Raises:
        OSError, ValueError: a file cannot be read, or is not what `TiktokenTokenizer.save` writes.
    """
    config = _SavedConfig.read(parse_json(_read_limited(folder / CONFIG_NAME, _MAX_CONFIG_BYTES)))
    ranks = _parse_ranks(_read_limited(folder / RANKS_NAME, _MAX_RANKS_BYTES))
    special = list(config.special_tokens.values())
    taken = set(ranks.values())
    # tiktoken panics, or encodes wrongly, where one of these is not so.
    if len(taken) != len(ranks) or len(taken.union(special)) != len(ranks) + len(special):
        raise ValueError("an id is given twice")
    if not all(0 <= i <= _MAX_ID for i in taken.union(special)):
        raise ValueError("an id is out of range")
    if not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError("a single byte has no id")
    if END_OF_TEXT not in config.special_tokens:
        raise ValueError(f"no {END_OF_TEXT} among the special tokens")
    return tiktoken.Encoding(
        config.name,
        pat_str=config.pattern,
        mergeable_ranks=ranks,
        special_tokens=config.special_tokens,
    )


def _read_limited(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} has more than {limit:,} bytes")
    return content


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Ranks by token, from tiktoken's file format: base64, a space, the rank, on each line."""
    ranks: dict[bytes, int] = {}
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} of {RANKS_NAME} is no token with its rank") from None
    if len(ranks) != len(lines):
        raise ValueError("a token is given twice")
    return ranks
