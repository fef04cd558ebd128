"""Tokenizers by name and from a checkpoint's files; a new kind is one class and one row."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenization.fakes import PairTokenizer
from tokenization.hostile_texts import GPT2, build_tokenizer

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings.kinds import TOKENIZERS
from preflight.tokenization import load_saved_tokenizer, load_tokenizer
from preflight.tokenization.tiktoken_bpe import CONFIG_NAME, RANKS_NAME, TiktokenTokenizer


def test_gpt2_is_what_it_always_was() -> None:
    v1 = json.loads((Path(__file__).parents[1] / "fixtures/v1/data/metadata.json").read_text())
    assert GPT2.fingerprint == v1["tokenizer"]["fingerprint"]
    assert GPT2.end_of_text_id == v1["tokenizer"]["end_of_text_id"]
    assert load_tokenizer("gpt2") is load_tokenizer("gpt2")


def test_unknown_name_is_a_mistake_in_the_flags() -> None:
    with pytest.raises(PreflightError, match="gpt2") as caught:
        load_tokenizer("gtp2")
    assert caught.value.code == ExitCode.FLAGS


@pytest.mark.parametrize("name", ["gpt2", "dense"])
def test_saved_files_give_the_same_tokenizer(tmp_path: Path, name: str) -> None:
    tokenizer = GPT2 if name == "gpt2" else build_tokenizer("o200k_base", dense=True)
    paths = tokenizer.save(tmp_path)
    assert sorted(path.name for path in paths) == sorted(p.name for p in tmp_path.iterdir())
    found = load_saved_tokenizer(tmp_path, tokenizer.describe())
    assert found.describe() == tokenizer.describe()
    text = "two words, \u6f22\u5b57 <|endoftext|> \U0001f600\n\n'll"
    assert found.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert found.end_of_text_id == tokenizer.end_of_text_id


def test_format_v1_has_no_files(tmp_path: Path) -> None:
    facts = {key: value for key, value in GPT2.describe().items() if key != "kind"}
    assert load_saved_tokenizer(tmp_path, facts) is load_tokenizer("gpt2")


def test_an_encoding_that_has_no_row_is_read_from_its_files(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("cl100k_base")
    assert tokenizer.name not in TOKENIZERS.names()
    tokenizer.save(tmp_path)
    assert load_saved_tokenizer(tmp_path, tokenizer.describe()).name == tokenizer.name


def test_a_new_kind_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZERS, "_targets", dict(TOKENIZERS._targets))
    TOKENIZERS.register("new row", "tokenization.fakes:PairTokenizer")
    tokenizer = load_tokenizer("new row")
    assert isinstance(tokenizer, PairTokenizer)
    assert tokenizer.decode(tokenizer.encode("odd").tolist()) == "odd"
    assert tokenizer.decode([tokenizer.end_of_text_id]) == ""
    assert tokenizer.id_dtype == "uint32"
    assert tokenizer.last_cut("many words") == 0
    tokenizer.save(tmp_path)
    assert load_saved_tokenizer(tmp_path, tokenizer.describe()).name == "new row"


def refuse(folder: Path, tokenizer: TiktokenTokenizer = GPT2, **facts: object) -> str:
    with pytest.raises(PreflightError) as caught:
        load_saved_tokenizer(folder, tokenizer.describe() | facts)
    assert caught.value.code == ExitCode.CHECKPOINT
    assert len(caught.value.lines) <= 5
    return str(caught.value)


def test_files_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    GPT2.save(tmp_path)
    assert "fingerprint" in refuse(tmp_path, fingerprint="0" * 64)
    assert "fingerprint" in refuse(tmp_path, vocab_size=50256)
    assert "unknown" in refuse(tmp_path, kind="telepathy")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("gpt2", dense=True)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    paths = {path.name: path.read_bytes() for path in tokenizer.save(good)}
    ranks, config = paths[RANKS_NAME], json.loads(paths[CONFIG_NAME])
    lines = ranks.splitlines(keepends=True)
    mutants = {
        RANKS_NAME: [
            b"",
            ranks[:-5],
            b"".join(lines[:-1]),
            b"".join([*lines[:-1], lines[0]]),  # a token twice
            b"".join([*lines[:-1], lines[-1].replace(b" 605", b" 604")]),  # an id twice
            ranks.replace(b" 605", b" 70000000"),
            ranks.replace(b" 605", b" -605"),
            ranks.replace(b" 605", b" 9" + b"9" * 5000),
            ranks.replace(b" 605\n", b"\n"),
            b"".join(lines[1:]),  # a single byte without an id
            b"!" + ranks,
        ],
        CONFIG_NAME: [
            b"{}",
            b"[" * 100_000,
            b"\xff",
            json.dumps(config | {"pattern": "("}).encode(),
            json.dumps(config | {"pattern": "\\p{L}"}).encode(),
            json.dumps(config | {"pattern": "(" * 50_000 + ")" * 50_000}).encode(),
            json.dumps(config | {"special_tokens": {}}).encode(),
            json.dumps(config | {"special_tokens": {"<|endoftext|>": 5}}).encode(),
            json.dumps(config | {"special_tokens": {"<|endoftext|>": True}}).encode(),
            json.dumps(config | {"special_tokens": {"<|endoftext|>": 2**70}}).encode(),
            json.dumps(config | {"name": 3}).encode(),
            b" " * 2**21,
        ],
    }
    for name, contents in mutants.items():
        for content in contents:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            assert content != paths[name]
            (bad / name).write_bytes(content)
            assert "damaged" in refuse(bad, tokenizer), content[:100]
    shutil.rmtree(bad)
    shutil.copytree(good, bad)
    for name in paths:
        (bad / name).unlink()
        (bad / name).symlink_to(good / name)
        assert "symbolic link" in refuse(bad, tokenizer)
        (bad / name).unlink()
        assert "No such file" in refuse(bad, tokenizer)
        shutil.copy(good / name, bad / name)


def test_flipped_bits_in_saved_files_never_change_the_tokenizer(tmp_path: Path) -> None:
    tokenizer, draw = build_tokenizer("gpt2", dense=True), random.Random(0)
    for path in tokenizer.save(tmp_path):
        content = path.read_bytes()
        for _ in range(150):
            at, flipped = draw.randrange(len(content)), bytearray(content)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                found = load_saved_tokenizer(tmp_path, tokenizer.describe())
            except PreflightError as error:
                assert error.code == ExitCode.CHECKPOINT
            else:  # a space of the JSON, or a name that nothing depends on
                assert found.fingerprint == tokenizer.fingerprint
        path.write_bytes(content)


def test_ids_that_stand_for_no_text() -> None:
    tokenizer = build_tokenizer("gpt2", dense=True)
    assert tokenizer.token_bytes(tokenizer.end_of_text_id) is None
    assert tokenizer.token_bytes(tokenizer.end_of_text_id - 1) is None  # a gap
    assert tokenizer.token_bytes(65) == tokenizer.decode_bytes([65])
    assert tokenizer.decode_bytes([65, tokenizer.vocab_size + 7]) == tokenizer.decode_bytes([65])


def test_halves_of_surrogate_pairs_become_replacement_characters() -> None:
    ids = GPT2.encode("a\udcffb").tolist()
    assert ids == GPT2.encoding.encode_ordinary("a\udcffb")
    assert GPT2.decode(ids) == "a\ufffdb"
