"""`tokenizer.json` of each kind: the library gives our ids; merges are the original ones."""

from __future__ import annotations

import json
import random

import pytest
import tiktoken
from formats.shapes import train_bpe
from tokenization.hostile_texts import UNITS, build_dense_ranks
from tokenization.library_files import build_kind
from tokenizers import Tokenizer as LibraryTokenizer

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.merges import recover_pairs, spell_bytes
from preflight.formats.proof import build_texts, prove_tokenizer
from preflight.formats.tokenizer_export import build_tokenizer_json, list_merges
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.characters import CharTokenizer
from preflight.tokenization.huggingface import HuggingFaceTokenizer
from preflight.tokenization.tiktoken_bpe import END_OF_TEXT, TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import CL100K_PATTERN, PROVEN_PATTERNS


def build_dense(pattern: str) -> Tokenizer:
    """Merges that show every wrong split, with gaps before the end of text as cl100k has them."""
    ranks = build_dense_ranks()
    special = {END_OF_TEXT: len(ranks) + 3}
    encoding = tiktoken.Encoding(
        "dense", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    return TiktokenTokenizer(encoding)


def build_whole_only() -> Tokenizer:
    """A token that no merges lead to: tiktoken finds it where a piece is nothing else."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"ab ": 257}
    encoding = tiktoken.Encoding(
        "whole",
        pat_str=r"\p{L}+|\s+|[^\p{L}\s]+",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 258},
    )
    return TiktokenTokenizer(encoding)


KINDS = {
    "gpt2": lambda: load_tokenizer("gpt2"),
    "bpe": train_bpe,
    "byte": lambda: load_tokenizer("byte"),
    "char": lambda: CharTokenizer("".join(sorted({*"".join(UNITS), *"abcdefghij"}))),
    "whole": build_whole_only,
    **{
        f"dense {len(pattern)}": lambda pattern=pattern: build_dense(pattern)
        for pattern in sorted(PROVEN_PATTERNS)
    },
}


def draw_texts(count: int) -> list[str]:
    """Drawn ones, after those that drawing would seldom give: long numbers, spaces at an end."""
    draw = random.Random(5)
    return ["1" * 9, "a1111111", "a   ", "a  \n ", " \n\n  \n", "\r\n\r\n", "A'S 'll x'"] + [
        "".join(draw.choices(UNITS, k=draw.randrange(1, 30))) for _ in range(count)
    ]


def write(tokenizer: Tokenizer) -> bytes:
    return json.dumps(build_tokenizer_json(tokenizer)).encode()


SLOW = {kind for kind in KINDS if kind.startswith("dense")} - {f"dense {len(CL100K_PATTERN)}"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_the_library_gives_our_ids(kind: str) -> None:
    tokenizer = KINDS[kind]()
    library = LibraryTokenizer.from_str(write(tokenizer).decode())
    library.encode_special_tokens = True
    assert library.token_to_id(END_OF_TEXT) == tokenizer.end_of_text_id
    texts = draw_texts(500) + build_texts(tokenizer, 200)
    if isinstance(tokenizer, CharTokenizer):
        texts = [text for text in texts if set(text) <= set(tokenizer.characters)]
    for text in texts:
        assert library.encode(text).ids == tokenizer.encode(text).tolist(), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_texts_and_every_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = HuggingFaceTokenizer(write(tokenizer), "x", END_OF_TEXT)
    prove_tokenizer(tokenizer, found)
    assert found.vocab_size == tokenizer.vocab_size
    for text in build_texts(tokenizer, 300):
        ids = tokenizer.encode(text).tolist()
        assert found.decode_bytes(ids) == tokenizer.decode_bytes(ids)


def test_merges_are_those_of_the_training() -> None:
    """rustbpe merges pairs in the order of the ids: each merge makes the next id from two known."""
    tokenizer = train_bpe()
    pairs = list_merges(tokenizer)
    assert not pairs.is_whole_only
    made = [pairs.vocabulary[first + second] for first, second in pairs.merges]
    assert made == list(range(256, tokenizer.vocab_size - 1))


def test_merges_of_gpt2_are_the_published_ones() -> None:
    """The first and the last of merges.txt (Radford et al. 2019)."""
    pairs = list_merges(load_tokenizer("gpt2"))
    assert len(pairs.merges) == 50_000
    assert pairs.merges[:3] == [("\u0120", "t"), ("\u0120", "a"), ("h", "e")]
    assert pairs.merges[-1] == ("\u0120g", "azed")


def test_a_token_without_merges_is_told() -> None:
    assert recover_pairs(build_whole_only().encoding._mergeable_ranks).is_whole_only
    assert spell_bytes(b" \n\xff") == "\u0120\u010a\xff"


def test_a_file_goes_out_as_it_came() -> None:
    content = write(load_tokenizer("byte"))
    tokenizer = HuggingFaceTokenizer(content, "x", END_OF_TEXT)
    assert build_tokenizer_json(tokenizer) == json.loads(content)


def test_merges_in_a_wrong_order_are_found() -> None:
    tokenizer = train_bpe()
    document = build_tokenizer_json(tokenizer)
    document["model"]["merges"].reverse()
    found = HuggingFaceTokenizer(json.dumps(document).encode(), "x", END_OF_TEXT)
    with pytest.raises(PreflightError) as caught:
        prove_tokenizer(tokenizer, found)
    assert caught.value.code == ExitCode.CHECK_FAILED


def test_a_tokenizer_that_has_no_merges_is_refused() -> None:
    with pytest.raises(PreflightError, match="no byte-level BPE"):
        list_merges(CharTokenizer("ab"))


def test_a_sentencepiece_model_is_refused_by_name() -> None:
    """transformers reads such files with other ids where a text begins with a space."""
    tokenizer = build_kind("bpe.model")
    with pytest.raises(PreflightError, match="sentencepiece"):
        build_tokenizer_json(tokenizer)
