"""The vocabulary in a GGUF file: read into a ``tokenizer.json``, and written from one.

A byte-level BPE is `gpt2` there, and the name of its pre-tokenizer, which llama.cpp keeps in its
own code, says how a text is split. A BPE of SentencePiece is `llama`, with a score for each token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from preflight.formats.tokenizer_export import build_tokenizer_json
from preflight.tokenization import Tokenizer
from preflight.tokenization.huggingface import LLAMA3_PATTERN, HuggingFaceTokenizer
from preflight.tokenization.raw_bytes import ByteTokenizer
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import CL100K_PATTERN, GPT2_PATTERN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.h, LLAMA_TOKEN_TYPE
_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"
_MAX_MERGED = 256  # characters of a SentencePiece token whose merges are looked for
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, _BYTE_LEVEL | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


_BY_GPT2 = _BYTE_LEVEL | {"use_regex": True}
_BY_DIGIT = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BY_GPT2],
}
_BY_LLAMA3 = _split_by(LLAMA3_PATTERN)
_BY_QWEN2 = _split_by(LLAMA3_PATTERN.replace("{1,3}", ""))
# llama-vocab.cpp: how a text is split, and whether a piece that is a token is never merged. The
# first of equal rows is the one that is written.
_PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_BY_GPT2, False),
    "phi-2": (_BY_GPT2, False),
    "mpt": (_BY_GPT2, False),
    "olmo": (_BY_GPT2, False),
    "smollm": (_BY_DIGIT, False),
    "starcoder": (_BY_DIGIT, False),
    "refact": (_BY_DIGIT, False),
    "command-r": (_BY_DIGIT, False),
    "codeshell": (_BY_DIGIT, False),
    "llama-bpe": (_BY_LLAMA3, True),
    "llama3": (_BY_LLAMA3, True),
    "llama-v3": (_BY_LLAMA3, True),
    "falcon3": (_BY_LLAMA3, True),
    "dbrx": (_BY_LLAMA3, False),
    "smaug-bpe": (_BY_LLAMA3, False),
    "qwen2": (_BY_QWEN2, False),
    "deepseek-r1-qwen": (_BY_QWEN2, False),
    "stablelm2": (_BY_QWEN2, False),
}

# ---- reading ------------------------------------------------------------------------------------


def read_tokenizer(keys: Mapping[str, Any], vocab_size: int, name: str) -> HuggingFaceTokenizer:
    """The tokenizer that a file describes.

    Args:
        keys: the file's.
        vocab_size: rows of its table of tokens.
        name: for the tokenizer.

    Raises:
        ValueError: naming what is missing, impossible or not read here.
        ImportError: the library `tokenizers` is missing.
    """
    tokens, types = _read_tokens(keys, vocab_size)
    eos = keys.get(f"{_PREFIX}eos_token_id")
    if not isinstance(eos, int) or not 0 <= eos < vocab_size:
        raise ValueError(f"{_PREFIX}eos_token_id is {str(eos)[:40]}, or missing")
    types[eos] = CONTROL
    kind = keys.get(f"{_PREFIX}model")
    if kind == "gpt2":
        document = _read_byte_level(keys, tokens, types)
    elif kind == "llama":
        document = _read_sentencepiece(keys, tokens, types)
    else:
        raise ValueError(f"its vocabulary is of kind {str(kind)[:40]!r}; read are gpt2 and llama")
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    # mypy takes `Tokenizer.train`, which raises NotImplementedError, for abstract.
    return HuggingFaceTokenizer(content, name, tokens[eos])  # type: ignore[abstract]


def _read_tokens(keys: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The tokens and their types, one of each for every row."""
    tokens = keys.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or len(tokens) != vocab_size:
        found = len(tokens) if isinstance(tokens, list) else "no"
        raise ValueError(f"{found} tokens for the {vocab_size:,} rows of the table")
    given = keys.get(f"{_PREFIX}token_type")
    types = [NORMAL] * vocab_size if given is None else [int(kind) for kind in given]
    if len(types) != vocab_size or not {*types} <= {*range(NORMAL, BYTE + 1)}:
        raise ValueError(f"{_PREFIX}token_type is not a type from 1 to 6 for each token")
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    if len({*used}) < len(used):
        raise ValueError("a token is in its vocabulary twice")
    return tokens, types


def _read_byte_level(
    keys: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    pre = keys.get(f"{_PREFIX}pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"its pre-tokenizer {str(pre)[:40]!r} is not known here")
    splits, is_whole_only = _PRE_TOKENIZERS[pre]
    merges = keys.get(f"{_PREFIX}merges")
    if not isinstance(merges, list) or not all(isinstance(pair, str) for pair in merges):
        raise ValueError(f"{_PREFIX}merges is missing")
    # A space within a token is spelled as another character, so the only one parts the pair.
    pairs = [pair.split(" ") for pair in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{_PREFIX}merges holds something else than pairs of tokens")
    control = {token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL}
    pairs = [pair for pair in pairs if not control.intersection(pair)]  # see `list_vocabulary`
    model = {"ignore_merges": is_whole_only, "merges": pairs}
    return _build_document(model, tokens, types, {"pre_tokenizer": splits, "decoder": _BY_GPT2})


def _read_sentencepiece(
    keys: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    scores = keys.get(f"{_PREFIX}scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(f"{_PREFIX}scores is missing, or not one for each token")
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    begins_with_space = bool(keys.get(f"{_PREFIX}add_space_prefix", True))
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if begins_with_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": unknown,
        "merges": _order_merges(tokens, [float(score) for score in scores]),
    }
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    return _build_document(model, tokens, types, steps)


def _order_merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs that make a token, those of the highest score first, as SentencePiece merges them.

    The order among equal scores is that of transformers' SentencePieceExtractor.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        if len(token) > _MAX_MERGED:
            raise ValueError(f"a token has {len(token):,} characters")
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda item: item[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _build_document(
    model: dict[str, Any], tokens: list[str], types: list[int], steps: dict[str, Any]
) -> dict[str, Any]:
    added = [
        {"id": i, "content": token, **_FLAGS, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    base = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    return (
        {"version": "1.0", "added_tokens": added, "post_processor": None}
        | empty
        | steps
        | {"model": base | {"byte_fallback": False, "vocab": vocabulary} | model}
    )


# ---- writing ------------------------------------------------------------------------------------


def list_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, tuple[str, Any]]:
    """The keys of a file for a byte-level BPE, each with its type.

    Args:
        tokenizer: of the model.
        vocab_size: rows of its table of tokens; those without a token are unused.

    Raises:
        ValueError: naming what the format cannot hold.
        PreflightError: as `build_tokenizer_json`.
    """
    document = build_tokenizer_json(tokenizer)
    model = document["model"]
    if "ByteLevel" not in json.dumps(document.get("decoder")) or model.get("type") != "BPE":
        raise ValueError(f"the tokenizer {tokenizer.name} is no byte-level BPE")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for token in document.get("added_tokens") or []:
        i = token["id"]
        tokens[i] = token["content"]
        types[i] = CONTROL if token.get("special") else USER_DEFINED
    if len({*tokens}) < len(tokens):
        raise ValueError(f"a token of {tokenizer.name} is called like another one")
    end = tokenizer.end_of_text_id
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:
        # An array has to hold something. Texts contain no token of this kind, so that this pair
        # is never there to be merged.
        merges = [f"{tokens[end]} {tokens[end]}"]
    return {
        f"{_PREFIX}model": ("STRING", "gpt2"),
        f"{_PREFIX}pre": ("STRING", _name_pre_tokenizer(tokenizer, document)),
        f"{_PREFIX}tokens": ("ARRAY", tokens),
        f"{_PREFIX}token_type": ("ARRAY", types),
        f"{_PREFIX}merges": ("ARRAY", merges),
        f"{_PREFIX}bos_token_id": ("UINT32", end),
        f"{_PREFIX}eos_token_id": ("UINT32", end),
        f"{_PREFIX}add_bos_token": ("BOOL", False),  # a chat's own text has it where it needs one
        f"{_PREFIX}add_eos_token": ("BOOL", False),
    }


def _name_pre_tokenizer(tokenizer: Tokenizer, document: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which `tokenizer` splits a text."""
    if isinstance(tokenizer, ByteTokenizer):
        return "gpt-2"  # without merges it does not matter
    if isinstance(tokenizer, TiktokenTokenizer):
        # tiktoken, as llama.cpp does with llama-bpe, looks for a whole piece before it merges.
        names = {GPT2_PATTERN: "gpt-2", CL100K_PATTERN: "llama-bpe"}
        name = names.get(tokenizer.encoding._pat_str)
    else:
        asked = _simplify(document.get("pre_tokenizer"))
        is_whole_only = bool(document["model"].get("ignore_merges"))
        rows = _PRE_TOKENIZERS.items()
        name = next(
            (n for n, (s, whole) in rows if _simplify(s) == asked and whole == is_whole_only), None
        )
        if document.get("normalizer"):
            name = None
    if name is None:
        raise ValueError(f"llama.cpp has no name for how {tokenizer.name} splits a text")
    return name


def _simplify(step: Any) -> Any:
    """A pre-tokenizer without what changes no id."""
    if isinstance(step, dict):
        return {
            key: _simplify(value)
            for key, value in sorted(step.items())
            if key not in ("trim_offsets", "invert")
        }
    return (
        [_simplify(item) for item in step]
        if isinstance(step, Sequence | list) and not isinstance(step, str)
        else step
    )
