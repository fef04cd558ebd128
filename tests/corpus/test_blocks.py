"""Documents to blocks: whatever the cuts, the ids are those of one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenization.fakes import PairTokenizer
from tokenization.hostile_texts import (
    GPT2,
    PATTERNS,
    TEXTS,
    build_dense_ranks,
    build_tokenizer,
)

from preflight.corpus import blocks
from preflight.corpus.sources.text import TextFile
from preflight.corpus.workers import Encoders
from preflight.settings.kinds import TOKENIZERS
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import encode_long


def encode_in_small_windows(tokenizer: Tokenizer, text: str) -> list[int]:
    """`encode_parts`, with windows so small that texts of tests have several."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return np.concatenate(list(encode_long(tokenizer.encoding, text, 128))).tolist()
    return np.concatenate(list(tokenizer.encode_parts(text))).tolist()


def cut_and_encode(text: str, tokenizer: Tokenizer, block_bytes: int) -> list[int]:
    """What the builder does with one document, whose source gives chunks of 50 bytes."""
    data = text.encode()
    chunks = iter([data[i : i + 50] for i in range(0, len(data), 50)])
    stream = blocks._ByteStream(TextFile(Path("x"), None), chunks, len(data))
    ids: list[int] = []
    at = 0
    for begin, piece, n_bytes, is_last in blocks._cut_document(
        stream, 0, block_bytes, tokenizer.last_cut
    ):
        assert begin == at
        at += n_bytes
        assert is_last == (at == len(data))
        if isinstance(piece, str):
            ids += encode_in_small_windows(tokenizer, piece)
        else:
            assert len(piece) <= block_bytes
            ids += tokenizer.encode(piece.decode()).tolist()
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
    expected = tokenizer.encoding.encode_ordinary(text)
    assert cut_and_encode(text, tokenizer, block_bytes) == expected


@given(text=TEXTS, block_bytes=st.integers(16, 200))
@settings(max_examples=50)
def test_without_a_place_to_cut_documents_are_encoded_whole(text: str, block_bytes: int) -> None:
    tokenizer = PairTokenizer("pairs")
    assert cut_and_encode(text, tokenizer, block_bytes) == tokenizer.encode(text).tolist()
    unproven = TiktokenTokenizer(
        tiktoken.Encoding(
            "unproven",
            pat_str=r"(?s).+",  # all of the text is one piece
            mergeable_ranks=build_dense_ranks(),
            special_tokens={"<|endoftext|>": 50256},
        )
    )
    assert unproven.last_cut(text) == 0
    parts = list(unproven.encode_parts(text))
    assert np.concatenate(parts).tolist() == unproven.encoding.encode_ordinary(text)


def test_tokenizers_that_a_worker_cannot_load_stay_in_this_process() -> None:
    class Local(PairTokenizer):
        """No other process can import it."""

    namesake = TiktokenTokenizer(
        tiktoken.Encoding(
            "gpt2",  # but with another vocabulary
            pat_str=r"(?s).",
            mergeable_ranks=build_dense_ranks(),
            special_tokens={"<|endoftext|>": 50256},
        )
    )
    unknown = build_tokenizer("cl100k_base")
    for tokenizer in (Local("pairs"), PairTokenizer("pairs"), unknown, namesake):
        encoders = Encoders(tokenizer, 1)
        assert encoders._pool is None
        blocks_ = [blocks.Block(0, 0, [(b"some words", True)], 10)]
        [(_, ids, _)] = encoders.encode(iter(blocks_))
        assert ids.tolist() == [*tokenizer.encode("some words"), tokenizer.end_of_text_id]


def test_workers_load_a_kind_that_only_this_process_has_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TOKENIZERS, "_targets", TOKENIZERS._targets | {"two": PairTokenizer})
    tokenizer = load_tokenizer("two")
    encoders = Encoders(tokenizer, 1)
    try:
        assert encoders._pool is not None
        blocks_ = [blocks.Block(0, 0, [(b"some words", True)], 10)]
        [(_, ids, _)] = encoders.encode(iter(blocks_))
        assert encoders._pool is not None, "the worker was lost"
    finally:
        encoders.close()
    assert ids.tolist() == [*tokenizer.encode("some words"), tokenizer.end_of_text_id]


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
