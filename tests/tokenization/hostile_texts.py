"""Texts and tokenizers that make a wrong cut show in the ids; other folders use them too."""

from __future__ import annotations

import functools
import random

import tiktoken
from hypothesis import strategies as st
from tiktoken import _educational
from tiktoken_ext import openai_public

from preflight.tokenization import load_tokenizer
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer

GPT2 = load_tokenizer("gpt2")
assert isinstance(GPT2, TiktokenTokenizer)

# What the texts below are made of, beside words: runs that no pattern cuts, or all cut differently.
UNITS = [
    "a",
    "A",
    "ab",
    "Ab",
    "^",
    "1",
    " ",
    "\n",
    "\r\n",
    "\r",
    "\t ",
    " \n",
    "\u6f22",
    "\u6f22A",
    "\u3002",
    "\U0001f600",
    "'",
    "'s",
    "/",
    "\n/",
    "\u0301",
    "\xa0",
    "\u3000",
    "x'll",
    "\x1c",
    "\u0130",
    "=-",
    "\ufeff",
    "\0",
    "<|endoftext|>",
]


@functools.cache
def build_dense_ranks() -> dict[bytes, int]:
    """Merges trained on mixtures of all units, whatever the classes: a wrong cut shows in the ids.

    GPT-2's own ranks would hide it: they merge hardly any of the runs in question.
    """
    draw = random.Random(0)
    text = "".join(draw.choice(UNITS) * draw.randrange(1, 5) for _ in range(1500))
    return _educational.bpe_train(text, 256 + 350, r"(?s).+", visualise=None)


def read_pattern(name: str) -> str:
    """The split pattern of an encoding, as the installed tiktoken spells it: offline."""
    if name == "gpt2":
        return openai_public.r50k_pat_str
    original = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = lambda *args, **kwargs: {}  # type: ignore[assignment]
    try:
        return str(openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"])
    finally:
        openai_public.load_tiktoken_bpe = original


@functools.cache
def build_tokenizer(name: str, dense: bool = False) -> TiktokenTokenizer:
    """gpt2's, cl100k's or o200k's split pattern, over GPT-2's ranks or dense ones: offline."""
    ranks = build_dense_ranks() if dense else GPT2.encoding._mergeable_ranks
    encoding = tiktoken.Encoding(
        f"test_{name}",
        pat_str=read_pattern(name),
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    return TiktokenTokenizer(encoding)


PATTERNS = ("gpt2", "cl100k_base", "o200k_base")


RUNS = st.builds(
    lambda unit, count: unit * count,
    st.sampled_from(UNITS),
    st.integers(1, 90),
)
WORDS = st.sampled_from(
    [
        "the ",
        "we'll",
        " I'M",
        "don't ",
        "\n\n",
        "  ",
        "x = 1\n",
        "12345",
        "3.14",
        "\u4f60\u597d\u3002",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "caf\xe9 ",
        "\u043f\u0440\u0438\u0432\u0435\u0442",
        "://",
        "\r\n",
        "HTTPServer",
    ]
)
TEXTS = st.lists(st.one_of(RUNS, WORDS, st.text(max_size=12)), min_size=1, max_size=12).map("".join)
