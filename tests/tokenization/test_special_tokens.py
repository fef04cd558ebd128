"""Special tokens, beginnings of text and places in a text, beside the libraries that know them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenization.chat_samples import SPECIALS, build_library_file, load_both
from tokenization.library_files import LIBRARY_FILES, build_kind, build_mixture, read_library_file

from preflight.core.errors import PreflightError
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import DEFAULT_TEMPLATE
from preflight.tokenization.chats import Chat, Message
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer

KINDS = ["byte", "char", "bpe", "gpt2", *LIBRARY_FILES]


def test_special_tokens_are_those_of_the_libraries() -> None:
    for name in ("byte", "char", "bpe", "gpt2"):
        kind = build_kind(name)
        assert kind.special_tokens == {"<|endoftext|>": kind.end_of_text_id}
    assert load_both()[0].special_tokens == {name: i for i, name in enumerate(SPECIALS)}
    pieces = build_kind("bpe.model")
    assert pieces.special_tokens == {"<s>": 1, "</s>": 2}
    ranks = {bytes([i]): i for i in range(256)}
    known = {"<|endoftext|>": 256, "<|fim|>": 300}
    made = tiktoken.Encoding("made", pat_str=".", mergeable_ranks=ranks, special_tokens=known)
    assert TiktokenTokenizer(made).special_tokens == known


@pytest.mark.parametrize("name", KINDS)
def test_an_encoding_never_gives_a_special_token(name: str) -> None:
    kind = build_kind(name)
    assert kind.end_of_text_id in kind.special_tokens.values()
    if name == "char":
        return  # it knows no other characters than those of its text
    text = " ".join(kind.special_tokens)
    assert not set(kind.encode(text).tolist()) & set(kind.special_tokens.values())


def test_the_beginning_of_a_text_is_what_the_post_processor_puts_first() -> None:
    for name in LIBRARY_FILES:
        assert build_kind(name).bos_id is None
    ours, _ = load_both(adds_bos=True)
    library = tokenizers.Tokenizer.from_str(build_library_file(adds_bos=True))
    assert ours.bos_id == library.encode("why").ids[0]


def test_a_file_without_an_end_of_text_gets_one_if_its_spelling_is_free(tmp_path: Path) -> None:
    document = json.loads(read_library_file("gpt2.json"))
    document["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    taken = load_tokenizer.__wrapped__(str(path))  # there it is a piece of text
    assert taken.adds_end
    assert not taken.special_tokens
    with pytest.raises(PreflightError, match="has no token that ends an answer"):
        ChatEncoder(taken, DEFAULT_TEMPLATE, 9)
    path.write_text(json.dumps(document).replace("<|endoftext|>", "<|e|>"), encoding="utf-8")
    bare = load_tokenizer.__wrapped__(str(path))
    assert bare.adds_end
    assert bare.special_tokens == {"<|endoftext|>": bare.vocab_size - 1}
    chat = Chat((Message("user", "why"), Message("assistant", "<|endoftext|>")))
    [[row]] = ChatEncoder(bare, DEFAULT_TEMPLATE, 99).encode([chat])
    assert row.ids.tolist().count(bare.end_of_text_id) == 1
    assert not build_kind("gpt2.json").adds_end


def encode_apart(kind: Tokenizer, text: str) -> None:
    """The places of tokens cover the text in order, and each token stands for its place."""
    ids, offsets = kind.encode_with_offsets(text)
    assert ids.tolist() == kind.encode(text).tolist()
    assert offsets.shape == (len(ids), 2)
    begins, ends = offsets[:, 0], offsets[:, 1]
    assert (begins <= ends).all()
    assert (np.diff(begins) >= 0).all()
    assert (np.diff(ends) >= 0).all()
    assert ends.max(initial=0) <= len(text)
    for token, (begin, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        spelled = kind.token_bytes(token)
        assert spelled is not None
        if kind.kind in ("tiktoken", "bytes", "characters"):
            assert spelled in text[begin:end].encode()
            assert len(text[begin:end].encode()) - len(spelled) < 7


@pytest.mark.parametrize("name", KINDS)
def test_where_tokens_lie_in_a_text(name: str) -> None:
    kind = build_kind(name)
    text = build_mixture()
    for start in range(0, 4000, 500):
        encode_apart(kind, text[start : start + 300])
    assert kind.encode_with_offsets("")[1].shape == (0, 2)


def test_places_where_a_character_has_several_tokens() -> None:
    ids, offsets = build_kind("byte").encode_with_offsets("a\u00e9\U0001f600b")
    assert len(ids) == 8
    assert offsets.tolist() == [[0, 1], *[[1, 2]] * 2, *[[2, 3]] * 4, [3, 4]]
