"""A ``tokenizer.json`` of Hugging Face, run by the library `tokenizers`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from preflight.tokenization.tiktoken_cutting import find_last_cut
from preflight.tokenization.tokenizer_files import FileTokenizer, iterate_parts, load_document

LLAMA3_PATTERN = (  # of Qwen2 with \p{N}, one digit at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Split patterns for which the cuts of `tiktoken_cutting` are safe, as for their siblings there.
_PROVEN_PATTERNS = (LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""))
# Decoders whose text is that of their pieces, joined; what others do to it is not known.
_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "BPEDecoder"}
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def _build_byte_characters() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's vocabulary (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _build_byte_characters()


class HuggingFaceTokenizer(FileTokenizer):
    """The library's ids without special tokens, whose spelling in a text is plain text."""

    kind = "huggingface"
    saved_name = "tokenizer.json"
    library = "tokenizers"
    # The library needs 120 to 190 bytes for each byte of a text.
    max_unit_bytes = 2 * 2**20

    def _open(self, content: bytes) -> dict[str, int]:
        document = load_document(content)
        if not isinstance(document.get("model"), dict):
            raise ValueError("it has no model")
        # The library refuses parts of another shape than those that are looked at below.
        self._library = self._load_library(content.decode())
        decoders = list(iterate_parts(document.get("decoder")))
        names = {str(step.get("type")) for step in decoders}
        if names - _DECODERS:
            raise ValueError(f"its decoder {min(names - _DECODERS)} does not give the text back")
        if document["model"].get("dropout"):
            raise ValueError("its merges are random (dropout)")
        added = document.get("added_tokens") or []
        specials = {token["content"]: token for token in added if token.get("special")}
        self._special = set(specials)
        self._eats_before = {name for name, token in specials.items() if token.get("lstrip")}
        self._eats_after = {name for name, token in specials.items() if token.get("rstrip")}
        self._added = {token["content"] for token in added} - self._special
        self._is_byte_level = "ByteLevel" in names
        self._has_bytes = "ByteFallback" in names
        self._space = next(
            (step.get("replacement", "\u2581") for step in decoders if step["type"] == "Metaspace"),
            "\u2581" if "Replace" in names else None,
        )
        self._is_cut = self._is_byte_level and _is_proven(document) and not self._added
        self.bos_id = self._find_bos()
        return dict(self._library.get_vocab(with_added_tokens=True))

    def _load_library(self, content: str) -> Any:
        try:
            library = self._import_library().Tokenizer.from_str(content)
        except ImportError:
            raise
        except Exception as error:  # the library raises no class of its own
            raise ValueError(str(error)) from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        return library

    @functools.cached_property
    def _inner_library(self) -> Any:
        """For text behind a special token: some put a space before a whole text alone."""
        document = load_document(self.content)
        steps = list(iterate_parts(document.get("pre_tokenizer")))
        if all(step.get("prepend_scheme") != "first" for step in steps):
            return self._library
        for step in steps:
            if "prepend_scheme" in step:
                step["prepend_scheme"] = "never"
        return self._load_library(json.dumps(document))

    def _find_bos(self) -> int | None:
        """What the file's post-processor puts before a text."""
        plain = self._library.encode("x", add_special_tokens=False).ids
        ids = self._library.encode("x").ids
        return ids[0] if len(ids) > len(plain) and ids[: len(plain)] != plain else None

    def _list_specials(self) -> Iterable[str]:
        return self._special

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """With the white space around a token that the file gives to it."""
        parts = []
        for name in sorted(self.special_tokens, key=len, reverse=True):
            before = r"\s*" if name in self._eats_before else ""
            after = r"\s*" if name in self._eats_after else ""
            parts.append(f"{before}({re.escape(name)}){after}")
        return re.compile("|".join(parts))

    def encode_with_offsets(
        self, text: str, *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The library's own places: a normaliser may change the bytes."""
        library = self._library if begins else self._inner_library
        with self._telling_failure(text):
            encoded = library.encode(text, add_special_tokens=False)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        return np.array(encoded.ids, np.int64), offsets

    def _is_text(self, piece: str) -> bool:
        return piece not in self._special

    def _spell(self, piece: str) -> bytes:
        if piece in self._added:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in piece)
        if self._has_bytes and (found := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        return (piece.replace(self._space, " ") if self._space else piece).encode()

    def _encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def last_cut(self, text: str) -> int:
        """The last safe place to cut; none where nothing is proven for the pre-tokenizer."""
        return find_last_cut(text) if self._is_cut else 0


def _is_proven(document: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer splits where `find_last_cut` cuts, and nothing comes before it."""
    if document.get("normalizer"):
        return False
    steps = list(iterate_parts(document.get("pre_tokenizer")))
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return False
    splits_by_gpt2 = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return splits_by_gpt2
    first = steps[0]
    if len(steps) > 2:
        return False
    if first.get("type") == "Digits":
        return splits_by_gpt2
    pattern = first.get("pattern")
    return (
        first.get("type") == "Split"
        and not splits_by_gpt2
        and isinstance(pattern, dict)
        and pattern.get("Regex") in _PROVEN_PATTERNS
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
    )
