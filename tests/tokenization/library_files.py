"""Small tokenizers of other libraries, trained on hostile texts so that a wrong cut shows."""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenization.fakes import PlainText
from tokenization.hostile_texts import UNITS
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from preflight.tokenization import Tokenizer, TokenizerRecipe, load_tokenizer
from preflight.tokenization.huggingface import _PROVEN_PATTERNS

GPT2_SPELLED = (  # as published files have it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


@functools.cache
def build_mixture() -> str:
    """Runs of all units, in mixtures."""
    draw = random.Random(1)
    words = [*UNITS, "the ", " dog", "12345", "\n\n", " x = 1", "caf\u00e9", "\u4f60\u597d"]
    return "".join(draw.choice(words) * draw.randrange(1, 5) for _ in range(4000)).replace("\0", "")


def _train_byte_level(*steps: pre_tokenizers.PreTokenizer) -> bytes:
    """A byte-level BPE behind these steps, as GPT-2, Llama 3, Qwen2 and SmolLM have it."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([build_mixture()], trainer)
    return built.to_str().encode()


def _split(pattern: str) -> bytes:
    return _train_byte_level(
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def _train_llama2() -> bytes:
    """Merges over the whole text with ▁ for spaces, and pieces for bytes."""
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"],
        limit_alphabet=60,
        max_token_length=8,
        show_progress=False,
    )
    built.train_from_iterator(build_mixture().split("\n"), trainer)
    document = json.loads(built.to_str())
    first = max(document["model"]["vocab"].values()) + 1
    document["model"]["vocab"] |= {f"<0x{i:02X}>": first + i for i in range(256)}
    return json.dumps(document).encode()


def _train_sentencepiece(kind: str, **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(build_mixture().splitlines()),
        model_writer=model,
        vocab_size=500,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LIBRARY_FILES: dict[str, Callable[[], bytes]] = {
    "gpt2.json": lambda: _train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix.json": lambda: _train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3.json": lambda: _split(_PROVEN_PATTERNS[0]),
    "qwen2.json": lambda: _split(_PROVEN_PATTERNS[1]),
    "unproven.json": lambda: _split(GPT2_SPELLED + r"|\p{M}+"),
    "digits.json": lambda: _train_byte_level(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "llama2.json": _train_llama2,
    "bpe.model": lambda: _train_sentencepiece("bpe", **EXACT),
    "unigram.model": lambda: _train_sentencepiece("unigram", **EXACT),
    "lossy.model": lambda: _train_sentencepiece("bpe"),
}
LOSSLESS = {"byte", "char", "bpe", *LIBRARY_FILES} - {"prefix.json", "lossy.model"}


@functools.cache
def read_library_file(name: str) -> bytes:
    """The content of a file of that name."""
    return LIBRARY_FILES[name]()


@functools.cache
def build_kind(name: str) -> Tokenizer:
    """The tokenizer in a file of that name, or of a kind without a file."""
    if name not in LIBRARY_FILES:
        return (
            load_tokenizer(name)
            if name in ("byte", "gpt2")
            else TokenizerRecipe(name, 500).make(PlainText(build_mixture()))
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(read_library_file(name))
        return load_tokenizer(str(path))
