"""Exact tokenising in parts: whatever the cuts and windows, the ids are those of one piece."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken import _educational
from tiktoken_ext import openai_public

from preflight.corpus import blocks
from preflight.corpus.blocks import encode_run
from preflight.corpus.sources import Document, Source
from preflight.corpus.workers import Encoders
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer

GPT2 = load_tokenizer("gpt2")

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


@functools.cache
def build_tokenizer(name: str, dense: bool = False) -> Tokenizer:
    """gpt2's, cl100k's or o200k's split pattern, over GPT-2's ranks or dense ones: offline."""
    original = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = lambda *args, **kwargs: {}  # type: ignore[assignment]
    try:
        pattern = (
            openai_public.r50k_pat_str
            if name == "gpt2"
            else (getattr(openai_public, name)()["pat_str"])
        )
    finally:
        openai_public.load_tiktoken_bpe = original
    ranks = build_dense_ranks() if dense else GPT2.encoding._mergeable_ranks
    encoding = tiktoken.Encoding(
        f"test_{name}",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    return Tokenizer(encoding)


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


def cut_and_encode(text: str, tokenizer: Tokenizer, block_bytes: int) -> list[int]:
    """What the builder does with one document, without files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        with open(path, "rb") as file:
            source = Source("x", path, 0, "", (), None)  # type: ignore[arg-type]
            document = Document(source, 0, path.stat().st_size)
            ids: list[int] = []
            for _, data, _, _ in blocks._cut_document(document, file, 0, block_bytes):
                if isinstance(data, str):
                    for part in encode_run(tokenizer.encoding, data, window_bytes=128):
                        ids += part.tolist()
                else:
                    assert len(data) <= block_bytes + 16
                    ids += blocks.encode_block(tokenizer.encoding, data.decode()).tolist()
    return ids


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@given(text=TEXTS, block_bytes=st.integers(16, 200))
@example(text="\u6f22" * 30 + "A" * 200 + "b", block_bytes=64)
@example(text="x" * 70 + " " * 90 + "\n" * 40 + "y", block_bytes=64)
@example(text="x" + ".\n/" * 60, block_bytes=64)
@example(text="." * 64 + "\n" * 9 + "/" * 30 + "a" * 500, block_bytes=64)
@settings(max_examples=100)
def test_cutting_never_changes_the_ids(name: str, dense: bool, text: str, block_bytes: int) -> None:
    tokenizer = build_tokenizer(name, dense)
    assert cut_and_encode(text, tokenizer, block_bytes) == tokenizer.encode(text)


@pytest.mark.parametrize("seam_tokens", [0, 1, 8])
@given(
    piece=st.lists(RUNS, min_size=4, max_size=60).map("".join),
    window=st.integers(64, 300),
    dense=st.booleans(),
)
@settings(max_examples=60)
def test_long_pieces_are_merged_as_in_one_piece(
    seam_tokens: int, piece: str, window: int, dense: bool
) -> None:
    encoding = build_tokenizer("gpt2", dense).encoding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SEAM_TOKENS", seam_tokens)
        parts = list(blocks._merge_in_windows(encoding, piece, 0, len(piece), window))
    assert [i for part in parts for i in part] == encoding._encode_single_piece(piece)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("unit", ["a", "^", " ", "\U0001f600", "ab1^", "\u6f22", "A"])
def test_long_runs_are_exact_with_real_windows(name: str, unit: str) -> None:
    text = "x " + unit * (300_000 // len(unit.encode()))
    encoding = build_tokenizer(name).encoding
    found = np.concatenate(list(encode_run(encoding, text)))
    assert found.tolist() == encoding.encode_ordinary(text)


def test_characters_that_the_two_engines_judge_differently() -> None:
    """`regex` and tiktoken carry Unicode tables of their own age; where they differ, it counts."""
    encoding = GPT2.encoding
    characters = "".join(map(chr, [*range(0x100, 0xD800), *range(0x10000, 0x33480)]))
    single_bytes = {bytes([i]): i for i in range(256)}
    probe = tiktoken.Encoding(
        "probe", pat_str=r"\p{L}", mergeable_ranks=single_bytes, special_tokens={}
    )
    known = set(bytes(probe.encode_ordinary(characters)).decode())
    differing = sorted(known ^ set(regex.findall(r"\p{L}", characters)))
    for character in [*differing[:3], *differing[-3:], "\u6f22"]:
        text = f"{character}a^\u0e2a" * 50
        assert np.concatenate(list(encode_run(encoding, text))).tolist() == GPT2.encode(text)
        assert blocks._has_same_classes(encoding, text) == (character not in differing)


def test_workers_are_light() -> None:
    """A worker starts in a fraction of a second, since it imports no torch."""
    encoders = Encoders(GPT2, 1)
    try:
        assert encoders._pool is not None
        loaded = encoders._pool.submit(eval, "sorted(__import__('sys').modules)").result()
    finally:
        encoders.close()
    assert "preflight.corpus.workers" in loaded
    assert "torch" not in loaded
