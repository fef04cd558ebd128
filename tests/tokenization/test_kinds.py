"""Tokenizers that are made from a text, and bytes: what they give, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenization.fakes import PlainText
from tokenization.hostile_texts import TEXTS

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ModelSettings
from preflight.tokenization import (
    Tokenizer,
    TokenizerRecipe,
    choose_tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
    own_bpe,
)
from preflight.tokenization.characters import TABLE_NAME, CharTokenizer
from preflight.tokenization.own_bpe import OwnBpeTokenizer, choose_vocab_size

PROSE = "the quick brown fox jumps over the lazy dog, then the dog jumps over the fox.\n" * 40


def make(name: str, text: str = PROSE, vocab_size: int | None = None) -> Tokenizer:
    if name == "byte":
        return load_tokenizer("byte")
    return TokenizerRecipe(name, vocab_size).make(PlainText(text))


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_a_text_comes_back_and_saved_files_give_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    ids = tokenizer.encode(PROSE).tolist()
    assert tokenizer.decode(ids) == PROSE
    assert max(ids) < tokenizer.end_of_text_id == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(tokenizer.end_of_text_id) is None
    assert b"".join(tokenizer.token_bytes(i) or b"" for i in ids) == PROSE.encode()
    paths = tokenizer.save(tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert all(path.name.startswith("tokenizer") for path in paths)  # how a data folder knows them
    found = load_saved_tokenizer(tmp_path, tokenizer.describe())
    assert found.describe() == tokenizer.describe()
    assert found.encode(PROSE).tolist() == ids


@given(text=TEXTS)
@settings(max_examples=60)
def test_special_tokens_and_odd_characters_are_plain_text(text: str) -> None:
    text += "<|endoftext|>"
    for name in ("byte", "char", "bpe"):
        tokenizer = make(name, text, None)
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.end_of_text_id not in ids
        assert tokenizer.decode(ids) == text


def test_bytes_are_bytes() -> None:
    tokenizer = make("byte")
    assert tokenizer.encode("a\u00e9\U0001f600").tolist() == list("a\u00e9\U0001f600".encode())
    assert tokenizer.decode(tokenizer.encode("a\udcffb").tolist()) == "a\ufffdb"
    assert tokenizer.id_dtype == "uint16"


def test_characters_are_sorted_and_unknown_ones_are_named() -> None:
    tokenizer = make("char", "badcab \u6f22")
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.characters == " abcd\u6f22"
    assert tokenizer.encode("dad").tolist() == [4, 1, 4]
    for text, named in (("bed", "'e' (U+0065)"), ("\U0001f600", "U+1F600"), ("\udcff", "U+DCFF")):
        with pytest.raises(PreflightError) as caught:
            tokenizer.encode(text)
        assert caught.value.code == ExitCode.TEXT
        assert named in str(caught.value)
        assert "6 characters" in str(caught.value)
    replacing = tokenizer.replacing_unknown()
    assert replacing.decode(replacing.encode("bed? \U0001f600").tolist()) == "b d   "
    assert make("char", "a?").replacing_unknown().encode("abc").tolist() == [1, 0, 0]
    with pytest.raises(PreflightError, match="no space"):
        make("char", "a").replacing_unknown()
    assert make("byte").replacing_unknown() is make("byte")
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.last_cut("bad cab") == 7  # so that a long line is never held whole


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    tokenizer = make("char")
    [path] = tokenizer.save(tmp_path)
    for content in (
        b"",
        b"[]",
        b'""',
        b'"ba"',
        b'"aa"',
        b'"\\ud800"',
        b'"ab"',
        b"\xff",
        b" " * 2**25,
    ):
        path.write_bytes(content)
        with pytest.raises(PreflightError, match=TABLE_NAME) as caught:
            load_saved_tokenizer(tmp_path, tokenizer.describe())
        assert caught.value.code == ExitCode.CHECKPOINT
    path.unlink()
    with pytest.raises(PreflightError, match="No such file"):
        load_saved_tokenizer(tmp_path, tokenizer.describe())


def test_the_same_text_gives_the_same_bpe() -> None:
    prints = {make("bpe", PROSE, 280).fingerprint for _ in range(5)}
    assert prints == {make("bpe", PROSE, 280).fingerprint}
    assert make("bpe", PROSE + " zzz" * 200, 280).fingerprint not in prints
    assert make("bpe", PROSE, 281).fingerprint not in prints


def test_the_size_of_a_bpe_is_what_was_asked_for_or_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_bpe.log, "propagate", True)
    assert make("bpe", PROSE, 280).vocab_size == 280
    assert "fewer" not in caplog.text
    small = make("bpe", PROSE, 5000)
    assert small.vocab_size < 400
    assert f"{small.vocab_size:,} ids, fewer than the 5,000 of --vocab-size" in caplog.text
    for size in (2, 256, 2**20 + 1):
        with pytest.raises(PreflightError, match=f"--vocab-size {size:,}") as caught:
            choose_tokenizer(ModelSettings(tokenizer="bpe", vocab_size=size))
        assert caught.value.code == ExitCode.FLAGS


def test_a_bpe_does_not_see_the_validation_part() -> None:
    class Parts(PlainText):
        def read(self, *splits: str) -> Iterator[str]:
            assert splits == ("train",)
            return super().read(*splits)

    OwnBpeTokenizer.train(Parts(PROSE), 300)


def test_a_long_text_is_sampled_evenly_and_that_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pieces(PlainText):
        def read(self, *splits: str) -> Iterator[str]:
            yield from (f"{chr(97 + i)}{chr(97 + i)}{chr(97 + i)} " for i in range(20))

    monkeypatch.setattr(own_bpe.log, "propagate", True)
    monkeypatch.setattr(own_bpe, "SAMPLED_BYTES", 25)
    text = Pieces("x" * 100)
    tokenizer = OwnBpeTokenizer.train(text, None)
    pieces = {tokenizer.token_bytes(i) for i in range(256, tokenizer.end_of_text_id)}
    assert {p for p in pieces if p and len(p) == 3} == {b"ddd", b"hhh", b"lll", b"ppp", b"ttt"}
    assert "of which 25 B are sampled" in caplog.text


def test_a_run_without_spaces_is_no_word_of_any_length() -> None:
    tokenizer = make("bpe", "ab" * 300_000, 400)
    assert tokenizer.decode(tokenizer.encode("abab").tolist()) == "abab"


@pytest.mark.parametrize(
    ("n_bytes", "flags", "expected", "why"),
    [
        (10**6, {}, "bpe", "976.6 KiB"),
        (60 * 10**6, {}, "gpt2", "57.2 MiB"),
        (10**6, {"model_size": "small"}, "gpt2", "--model-size small"),
        (10**6, {"vocab_size": 50_304}, "gpt2", "--vocab-size 50,304"),
        (10**6, {"vocab_size": 300}, "bpe", "976.6 KiB"),
    ],
)
def test_auto_chooses_by_the_text_and_says_why(
    n_bytes: int,
    flags: dict[str, object],
    expected: str,
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_bpe.log, "propagate", True)
    text = PlainText(PROSE)
    monkeypatch.setattr(text, "count_bytes", lambda *splits: n_bytes)
    recipe = choose_tokenizer(ModelSettings(**flags))  # type: ignore[arg-type]
    assert isinstance(recipe, TokenizerRecipe)
    assert recipe.make(text).name == expected
    assert f"auto: {expected}" in caplog.text
    assert why in caplog.text


def test_what_is_there_is_taken_when_it_is_what_was_asked_for() -> None:
    gpt2, char = load_tokenizer("gpt2").describe(), make("char").describe()
    bpe = make("bpe", PROSE, 280).describe()
    assert all(TokenizerRecipe("auto").accepts(facts) for facts in (gpt2, char, bpe))
    assert [TokenizerRecipe("bpe").accepts(facts) for facts in (gpt2, char, bpe)] == [0, 0, 1]
    assert TokenizerRecipe("bpe", 280).accepts(bpe)
    assert not TokenizerRecipe("bpe", 281).accepts(bpe)
    assert TokenizerRecipe("auto", 281).accepts(gpt2)
    assert not TokenizerRecipe("auto", 281).accepts(bpe)
    assert TokenizerRecipe("bpe", 5000).accepts(bpe | {"asked_vocab_size": 5000})


@given(st.integers(1, 10**10), st.integers(1, 10**10))
def test_more_text_never_gets_fewer_ids(one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert 512 <= choose_vocab_size(few) <= choose_vocab_size(many) <= 32_768


def test_an_unknown_name_names_all_kinds() -> None:
    with pytest.raises(PreflightError, match=r"did you mean char\?") as caught:
        choose_tokenizer(ModelSettings(tokenizer="chars"))
    assert caught.value.code == ExitCode.FLAGS
    assert all(name in str(caught.value) for name in ("auto", "bpe", "byte", "gpt2"))
    assert json.dumps(str(caught.value)).isascii()


def test_fingerprints_stay_what_old_checkpoints_have() -> None:
    """Another spelling of what is hashed would make every checkpoint that is there unusable."""
    assert load_tokenizer("byte").fingerprint.startswith("62d4d2cd5c74")
    assert CharTokenizer("abc").fingerprint.startswith("2ac31378504e")
