"""A ``tokenizer.json`` of Hugging Face, run by the library `tokenizers`."""

from __future__ import annotations

import re
from typing import Any

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
        try:  # the library refuses parts of another shape than those that are looked at below
            self._library = self._import_library().Tokenizer.from_str(content.decode())
        except ImportError:
            raise
        except Exception as error:  # the library raises no class of its own
            raise ValueError(str(error)) from None
        decoders = list(iterate_parts(document.get("decoder")))
        names = {str(step.get("type")) for step in decoders}
        if names - _DECODERS:
            raise ValueError(f"its decoder {min(names - _DECODERS)} does not give the text back")
        if document["model"].get("dropout"):
            raise ValueError("its merges are random (dropout)")
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        added = document.get("added_tokens") or []
        self._special = {token["content"] for token in added if token.get("special")}
        self._added = {token["content"] for token in added} - self._special
        self._is_byte_level = "ByteLevel" in names
        self._has_bytes = "ByteFallback" in names
        self._space = next(
            (step.get("replacement", "\u2581") for step in decoders if step["type"] == "Metaspace"),
            "\u2581" if "Replace" in names else None,
        )
        self._is_cut = self._is_byte_level and _is_proven(document) and not self._added
        return dict(self._library.get_vocab(with_added_tokens=True))

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
