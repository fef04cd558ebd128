"""A ``tokenizer.json`` of Hugging Face for each kind of tokenizer here, with the same ids."""

from __future__ import annotations

import re
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.merges import BytePairs, recover_pairs, spell_bytes
from preflight.tokenization import Tokenizer
from preflight.tokenization.characters import CharTokenizer
from preflight.tokenization.huggingface import HuggingFaceTokenizer
from preflight.tokenization.raw_bytes import ByteTokenizer
from preflight.tokenization.tiktoken_bpe import END_OF_TEXT, TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import GPT2_PATTERN
from preflight.tokenization.tokenizer_files import load_document

_POSSESSIVE_COUNT = re.compile(r"(\{\d*,?\d*\})\+")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def list_special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The names and ids of the tokens that stand for no text, in the order of their ids."""
    if isinstance(tokenizer, TiktokenTokenizer):
        special = tokenizer.encoding._special_tokens
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        added = load_document(tokenizer.content).get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added if token.get("special")}
    else:
        special = {END_OF_TEXT: tokenizer.end_of_text_id}
    return dict(sorted(special.items(), key=lambda item: item[1]))


def list_merges(tokenizer: Tokenizer) -> BytePairs:
    """The vocabulary, without special tokens, and the merges of a byte-level BPE.

    Raises:
        PreflightError: code CHECKPOINT, for a tokenizer of another kind, which is named.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        return recover_pairs(tokenizer.encoding._mergeable_ranks)
    if isinstance(tokenizer, ByteTokenizer):
        return BytePairs({spell_bytes(bytes([byte])): byte for byte in range(256)}, [], False)
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"the tokenizer {tokenizer.name} ({tokenizer.kind}) is no byte-level BPE: it has no merges "
        "that another program would read as we do",
        "nothing was written; what can go out: tiktoken's, bpe, byte, tokenizer.json, and into a "
        "folder char",
    )


def build_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``tokenizer.json``: the library `tokenizers` gives our ids with it.

    No token is put before or after a text; where a chat needs one, its template has it.

    Raises:
        PreflightError: code CHECKPOINT, for a kind that the format cannot hold.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return load_document(tokenizer.content)
    special = list_special_tokens(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return _build_character_document(tokenizer, special)
    pairs = list_merges(tokenizer)
    pattern = tokenizer.encoding._pat_str if isinstance(tokenizer, TiktokenTokenizer) else None
    model = _build_model(pairs.vocabulary | special, pairs.merges, pairs.is_whole_only)
    splits = _build_splits(pattern)
    return _build_document(model, special, splits, _BYTE_LEVEL | {"use_regex": True})


def _build_splits(pattern: str | None) -> dict[str, Any]:
    """What cuts a text into pieces before they are merged; ``None`` cuts nowhere."""
    if pattern == GPT2_PATTERN:  # the library's own
        return _BYTE_LEVEL | {"use_regex": True}
    to_characters = _BYTE_LEVEL | {"use_regex": False}
    if pattern is None:
        return to_characters
    split = {
        "type": "Split",
        "pattern": {"Regex": translate_pattern(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, to_characters]}


def translate_pattern(pattern: str) -> str:
    """A split pattern of tiktoken in the syntax of Oniguruma, which the library uses.

    There ``{1,3}+`` repeats ``{1,3}``, and ``$`` stands before each newline. Possessive repetition
    at the end of an alternative changes nothing but the speed.
    """
    return _POSSESSIVE_COUNT.sub(r"\1", pattern).replace(r"\s++$", r"\s++\z")


def _build_character_document(tokenizer: CharTokenizer, special: dict[str, int]) -> dict[str, Any]:
    """A BPE of single characters without merges. It leaves out characters that it lacks."""
    vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
    return _build_document(_build_model(vocabulary | special, []), special, None, {"type": "Fuse"})


def _build_model(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], is_whole_only: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": is_whole_only,
        "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        "merges": [list(pair) for pair in merges],
    }


def _build_document(
    model: dict[str, Any], special: dict[str, int], splits: Any, decoder: dict[str, Any]
) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, **flags, "special": True} for text, i in special.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splits,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
