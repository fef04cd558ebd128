"""Documents to blocks: whatever the cuts, the ids are those of one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenization.fakes import PairTokenizer, PlainText
from tokenization.hostile_texts import (
    GPT2,
    PATTERNS,
    TEXTS,
    build_dense_ranks,
    build_tokenizer,
)
from tokenization.library_files import LIBRARY_FILES, LOSSLESS, build_kind

from preflight.core.errors import PreflightError
from preflight.corpus import blocks
from preflight.corpus.sources.text import TextFile
from preflight.corpus.workers import Encoders
from preflight.tokenization import Tokenizer, TokenizerRecipe, load_tokenizer
from preflight.tokenization.characters import CharTokenizer
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
    stream = blocks.ByteStream(chunks, len(data), TextFile(Path("x"), None))
    ids: list[int] = []
    at = 0
    for begin, piece, n_bytes, is_last in blocks.cut_document(
        stream, 0, block_bytes, tokenizer.last_cut, tokenizer.max_unit_bytes
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


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", *LIBRARY_FILES])
@given(text=TEXTS, block_bytes=st.integers(16, 200))
@example(text="x" * 70 + " " * 90 + "\n" * 40 + "y", block_bytes=64)
@example(text="12345 1234 a1b2" * 9 + "\n\n" * 40 + "'ll", block_bytes=64)
@settings(max_examples=50)
def test_every_kind_gives_the_ids_of_one_piece(kind: str, text: str, block_bytes: int) -> None:
    tokenizer = build_kind(kind)
    if kind == "char":
        tokenizer = TokenizerRecipe("char").make(PlainText(text or " "))
    whole = tokenizer.encode(text).tolist()
    assert cut_and_encode(text, tokenizer, block_bytes) == whole
    assert tokenizer.end_of_text_id not in whole
    if kind in LOSSLESS:
        assert tokenizer.decode(whole) == text


def test_where_a_safe_cut_is_known() -> None:
    cut = {kind for kind in ("bpe", "byte", *LIBRARY_FILES) if build_kind(kind).last_cut("a b c")}
    assert cut == {"bpe", "byte", "gpt2.json", "llama3.json", "qwen2.json", "digits.json"}


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


def encode_in_worker(tokenizer: Tokenizer, folder: Path) -> tuple[list[int], bool]:
    """The ids of two words, and whether a worker made them."""
    tokenizer.save(folder)
    encoders = Encoders(tokenizer, 1, folder)
    try:
        had_pool = encoders._pool is not None
        block = blocks.Block([blocks.Piece(b"some words", "train", 10, ends=True)], (1, 0))
        [(_, encoded, _)] = encoders.encode(iter([(0, block)]))
        assert had_pool == (encoders._pool is not None), "the worker was lost"
    finally:
        encoders.close()
    ids = encoded.ids.tolist()
    assert ids == [*tokenizer.encode("some words"), tokenizer.end_of_text_id]
    return ids, had_pool


def test_a_tokenizer_that_a_worker_cannot_import_stays_in_this_process(tmp_path: Path) -> None:
    class Local(PairTokenizer):
        """No other process can import it."""

    assert not encode_in_worker(Local("pairs"), tmp_path)[1]


@pytest.mark.parametrize("kind", ["registered here", "without a row", "char", "byte", "bpe"])
def test_workers_load_what_this_process_has_saved(kind: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = {
        "registered here": lambda: PairTokenizer("two"),
        "without a row": lambda: build_tokenizer("cl100k_base", dense=True),
        "byte": lambda: load_tokenizer("byte"),
    }.get(kind, lambda: TokenizerRecipe(kind, None).make(PlainText("some words, some more")))()
    assert encode_in_worker(tokenizer, tmp_path)[1]


def test_saved_files_that_give_another_tokenizer_are_not_worked_with(tmp_path: Path) -> None:
    one, other = (CharTokenizer(text) for text in (" demorsw", " demorstw"))
    other.save(tmp_path)
    with pytest.raises(PreflightError, match="another tokenizer"):
        Encoders(one, 1, tmp_path)
    PairTokenizer("two").save(tmp_path)
    (tmp_path / "tokenizer_pairs.txt").write_text("three")
    with pytest.raises(ValueError, match="not two"):
        Encoders(PairTokenizer("two"), 1, tmp_path)


def test_workers_are_light(tmp_path: Path) -> None:
    """A worker starts in a fraction of a second, since it imports no torch."""
    GPT2.save(tmp_path)
    encoders = Encoders(GPT2, 1, tmp_path)
    try:
        assert encoders._pool is not None
        loaded = encoders._pool.submit(eval, "sorted(__import__('sys').modules)").result()
    finally:
        encoders.close()
    assert "preflight.corpus.workers" in loaded
    assert "torch" not in loaded
