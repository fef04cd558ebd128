"""Exact encoding in parts: whatever the windows, the ids are those of one piece."""

from __future__ import annotations

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenization.hostile_texts import GPT2, PATTERNS, RUNS, TEXTS, build_tokenizer, read_pattern

from preflight.tokenization import tiktoken_cutting
from preflight.tokenization.tiktoken_cutting import encode_long, find_last_cut


@pytest.mark.parametrize("name", sorted(set(openai_public.ENCODING_CONSTRUCTORS) - {"gpt2"}))
def test_the_proof_covers_the_installed_tiktoken(name: str) -> None:
    assert read_pattern(name) in tiktoken_cutting.PROVEN_PATTERNS


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@given(before=TEXTS, text=TEXTS, behind=TEXTS)
@example(before="x" + ".\n/" * 9, text=".\n/", behind=".\n/" * 9)
@example(before="A" * 9, text="A\u6f22A", behind="b" * 9)
@example(before="we", text="we'", behind="ll")
@example(before="1" * 8, text="1" * 4, behind="1" * 8)
@settings(max_examples=60)
def test_a_cut_is_safe_whatever_stands_around_it(
    name: str, dense: bool, before: str, text: str, behind: str
) -> None:
    encoding = build_tokenizer(name, dense).encoding
    cut = find_last_cut(text)
    if cut:
        left, right = before + text[:cut], text[cut:] + behind
        apart = encoding.encode_ordinary(left) + encoding.encode_ordinary(right)
        assert apart == encoding.encode_ordinary(left + right)


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
        patch.setattr(tiktoken_cutting, "SEAM_TOKENS", seam_tokens)
        parts = list(tiktoken_cutting._merge_in_windows(encoding, piece, 0, len(piece), window))
    assert [i for part in parts for i in part] == encoding._encode_single_piece(piece)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("unit", ["a", "^", " ", "\U0001f600", "ab1^", "\u6f22", "A"])
def test_long_runs_are_exact_with_real_windows(name: str, unit: str) -> None:
    text = "x " + unit * (300_000 // len(unit.encode()))
    encoding = build_tokenizer(name).encoding
    found = np.concatenate(list(encode_long(encoding, text)))
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
        assert np.concatenate(
            list(encode_long(encoding, text))
        ).tolist() == encoding.encode_ordinary(text)
        assert tiktoken_cutting._has_same_classes(encoding, text) == (character not in differing)
