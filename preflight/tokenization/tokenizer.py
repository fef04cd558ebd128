"""Text <-> token ids, and a fingerprint that says which vocabulary made the ids.

`gpt2` is built from the merge ranks kept in ``assets/`` and needs no network. Every other
tiktoken encoding goes by its name through tiktoken's own cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from preflight.core.errors import ExitCode, PreflightError

GPT2_RANKS_PATH = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A tiktoken encoding in which a user's text never yields a special token."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.end_of_text_id: int = encoding.eot_token
        # uint16 holds ids up to 65,535.
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over split pattern, ranks and special tokens: equal means equal ids."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in self.encoding._mergeable_ranks.items():
            digest.update(b"%d %d " % (rank, len(token)) + token)
        for text, rank in sorted(self.encoding._special_tokens.items()):
            digest.update(f"{text} {rank}".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; a special token's spelling in it is plain text."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for; ids beyond the vocabulary (padding rows) give none."""
        return self.encoding.decode_bytes([i for i in ids if i < self.vocab_size])

    def decode(self, ids: Sequence[int]) -> str:
        """`ids` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`.

    Raises:
        PreflightError: code FLAGS for an unknown name, or for an encoding that is neither cached
            nor reachable (the message says which file to put where); code STORAGE for a damaged
            built-in vocabulary.
    """
    if name == "gpt2":
        return Tokenizer(_build_gpt2_encoding())
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise PreflightError(
            ExitCode.FLAGS, f"--tokenizer {name}: unknown; choose one of {', '.join(known)}"
        )
    try:
        return Tokenizer(tiktoken.get_encoding(name))
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
        # tiktoken's own pattern for GPT-2 (tiktoken_ext/openai_public.py, MIT).
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=load_tiktoken_bpe(str(GPT2_RANKS_PATH)),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )
