"""Small models of both families with drawn weights, and tokenizers, for the tests of formats."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from preflight.formats.protocol import OutgoingModel
from preflight.models.building import build_model
from preflight.settings import ModelConfig
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.own_bpe import OwnBpeTokenizer

GPT2 = ModelConfig(257, 64, 32, 4, 2, 64)
LLAMA = ModelConfig(
    *(257, 64, 32, 4, 2, 64),
    model_family="llama",
    n_kv_heads=2,
    norm="rms",
    norm_eps=1e-4,
    positions="rope",
    rope_theta=5e4,
    feed_forward="swiglu",
    bias=False,
    tied=False,
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix jade boxes\n"


class WordsText:
    """A text to make a tokenizer from."""

    def count_bytes(self, *splits: str) -> int:
        return 40 * len(WORDS)

    def read(self, *splits: str) -> Iterator[str]:
        yield WORDS * 40


@functools.cache
def train_bpe() -> Tokenizer:
    """A BPE of its own, with 320 ids at most."""
    return OwnBpeTokenizer.train(WordsText(), 320)


def draw_model(config: ModelConfig, tokenizer: Tokenizer | None = None, **facts: Any) -> Any:
    """A model of this shape with drawn weights, large enough that each one counts."""
    tokenizer = tokenizer or load_tokenizer("byte")
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    torch.manual_seed(7)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return OutgoingModel(config, weights, tokenizer, facts.pop("template", None), facts)
