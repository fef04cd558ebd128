"""Tokenizers of other libraries, in files: exact bytes, plain special tokens, faults by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenization.library_files import LIBRARY_FILES, LOSSLESS, build_kind, read_library_file

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ModelSettings
from preflight.tokenization import (
    choose_tokenizer,
    is_choice,
    load_saved_tokenizer,
    load_tokenizer,
)
from preflight.tokenization.tokenizer_files import FACTS_NAME, FileTokenizer

TEXT = "Two words, caf\u00e9 \U0001f600\n\tx = 12345  </s><unk><|endoftext|><0x41>\u2581\u6f22"


def write(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def refuse(name: str) -> str:
    with pytest.raises(PreflightError) as caught:
        choose_tokenizer(ModelSettings(tokenizer=name))
    assert caught.value.code == ExitCode.FLAGS
    assert len(caught.value.lines) <= 5
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_ids_are_those_of_the_library_and_files_travel(name: str, tmp_path: Path) -> None:
    tokenizer = build_kind(name)
    ids = tokenizer.encode("plain words").tolist()
    if name.endswith(".model"):
        oracle = sentencepiece.SentencePieceProcessor(model_proto=read_library_file(name))
        assert ids == oracle.encode("plain words")
    else:
        library = tokenizers.Tokenizer.from_str(read_library_file(name).decode())
        assert ids == library.encode("plain words", add_special_tokens=False).ids
    paths = tokenizer.save(tmp_path)
    assert all(path.name.startswith("tokenizer") for path in paths)
    found = load_saved_tokenizer(tmp_path, tokenizer.describe())
    assert found.describe() == tokenizer.describe()
    assert found.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert found.end_of_text_id == tokenizer.end_of_text_id


@pytest.mark.parametrize("name", sorted(LOSSLESS & set(LIBRARY_FILES)))
def test_pieces_are_the_bytes_of_the_text(name: str) -> None:
    tokenizer = build_kind(name)
    ids = tokenizer.encode(TEXT).tolist()
    pieces = [tokenizer.token_bytes(token) for token in ids]
    assert None not in pieces  # neither an end of text nor an unknown one
    joined = b"".join(piece or b"" for piece in pieces)
    assert joined.removeprefix(b" ") == TEXT.replace("\u2581", joined.decode()[-2]).encode()
    assert tokenizer.token_bytes(tokenizer.end_of_text_id) is None
    assert tokenizer.end_of_text_id < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("a\udcffb").tolist()) == "a\ufffdb"


def test_the_end_of_text_is_the_one_that_stands_beside_the_file(tmp_path: Path) -> None:
    document = json.loads(read_library_file("gpt2.json"))
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 600, "content": "<stop>"})
    name = write(tmp_path, "tokenizer.json", json.dumps(document).encode())
    assert load_tokenizer(name).end_of_text_id == 0
    for given in ("<stop>", {"content": "<stop>"}):
        write(tmp_path, "tokenizer_config.json", json.dumps({"eos_token": given}).encode())
        load_tokenizer.cache_clear()
        tokenizer = load_tokenizer(name)
        assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (600, 601)
    assert tokenizer.name == f"{tmp_path.name}/tokenizer.json"
    tokenizer.save(tmp_path)
    assert load_saved_tokenizer(tmp_path, tokenizer.describe()).end_of_text_id == 600


def test_without_an_end_of_text_one_is_added(tmp_path: Path) -> None:
    document = json.loads(read_library_file("gpt2.json"))
    document["added_tokens"] = []
    tokenizer = load_tokenizer(write(tmp_path, "none.json", json.dumps(document).encode()))
    assert tokenizer.end_of_text_id == tokenizer.vocab_size - 1 == 600
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"  # here it is a piece as any other


def test_a_moved_file_is_the_same_choice(tmp_path: Path) -> None:
    one = write(tmp_path, "one.json", read_library_file("gpt2.json"))
    other = write(tmp_path, "other.json", read_library_file("gpt2.json"))
    facts = load_tokenizer(one).describe()
    assert is_choice(other, facts)
    assert not is_choice(write(tmp_path, "b.json", read_library_file("digits.json")), facts)
    assert is_choice("auto", facts)
    assert not is_choice("gpt2", facts)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    good = json.loads(read_library_file("llama2.json"))
    contents = [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b"[" * 10**6,
        json.dumps(good | {"model": {"type": "BPE"}}).encode(),
        json.dumps(good | {"model": good["model"] | {"dropout": 0.5}}).encode(),
        json.dumps(good | {"decoder": {"type": "WordPiece", "prefix": "##"}}).encode(),
    ]
    for number, content in enumerate(contents):
        refuse(write(tmp_path, f"{number}.json", content))
    for number, content in enumerate((b"", b"not a model", read_library_file("bpe.model")[:-99])):
        refuse(write(tmp_path, f"{number}.model", content))
    assert "No such file" in refuse(str(tmp_path / "missing.json"))
    (tmp_path / "folder.json").mkdir()
    refuse(str(tmp_path / "folder.json"))


@pytest.mark.parametrize(
    ("name", "library"), [("a.json", "tokenizers"), ("a.model", "sentencepiece")]
)
def test_a_missing_library_is_told_with_the_command(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "gpt2.json" if name.endswith("json") else "bpe.model"
    path = write(tmp_path, name, read_library_file(kind))
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path)
    load_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install {library}" in refuse(path)
    with pytest.raises(PreflightError, match=f"pip install {library}") as caught:
        load_saved_tokenizer(tmp_path, tokenizer.describe())
    assert caught.value.code == ExitCode.CHECKPOINT


@pytest.mark.parametrize("name", ["gpt2.json", "bpe.model"])
def test_damaged_files_of_a_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    tokenizer = build_kind(name)
    assert isinstance(tokenizer, FileTokenizer)
    for saved, content in [
        (tokenizer.saved_name, read_library_file(name)[:-30]),
        (tokenizer.saved_name, read_library_file("unigram.model")),
        (FACTS_NAME, b"{}"),
        (FACTS_NAME, b"x"),
    ]:
        tokenizer.save(tmp_path)
        (tmp_path / saved).write_bytes(content)
        with pytest.raises(PreflightError, match="damaged") as caught:
            load_saved_tokenizer(tmp_path, tokenizer.describe())
        assert caught.value.code == ExitCode.CHECKPOINT
