"""Data folders whose tokenizer is made from the text: kept there, and changed with the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenization.library_files import read_library_file

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import hash_file
from preflight.corpus import collector
from preflight.corpus.build import prepare_data
from preflight.corpus.metadata import FileEntry, render_metadata
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.settings import DataSettings
from preflight.tokenization import TokenizerChoice, TokenizerRecipe, load_tokenizer, own_bpe

PROSE = "".join(f"the {number} foxes jump over {number * 7} dogs.\n" for number in range(900))
BPE, CHAR, AUTO = (TokenizerRecipe(name) for name in ("bpe", "char", "auto"))


def build(tmp_path: Path, text: str | None, choice: TokenizerChoice, **options: Any) -> DataFolder:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    values = DataSettings(
        text_file=() if text is None else (str(path),),
        data_dir=str(tmp_path / "data"),
        shard_size=2048,
    )
    return prepare_data(values, choice, **({"block_bytes": 700, "n_workers": 0} | options))


def read_text(data: DataFolder) -> str:
    tokenizer = data.load_tokenizer()
    ids = np.concatenate([*data.train.open(), *data.val.open()]).tolist()
    return tokenizer.decode(token for token in ids if token != tokenizer.end_of_text_id)


@pytest.mark.parametrize("choice", [BPE, CHAR, TokenizerRecipe("bpe", 300)], ids=str)
def test_the_folder_holds_its_tokenizer(tmp_path: Path, choice: TokenizerRecipe) -> None:
    data = build(tmp_path, PROSE + "\u6f22", choice)
    assert read_text(data) == PROSE + "\u6f22"
    assert [f.name.split("/")[0] for f in data.metadata.files] == ["tokenizer"] * (
        1 if choice is CHAR else 2
    )
    assert data.load_tokenizer().fingerprint == data.metadata.tokenizer.fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(data.path, moved)
    assert load_data_folder(moved, AUTO).load_tokenizer().vocab_size == data.vocab_size


def test_workers_and_block_sizes_give_the_same_folder(tmp_path: Path) -> None:
    fingerprints = set()
    for number, options in enumerate(
        ({"block_bytes": 100}, {"n_workers": 2}, {"block_bytes": 10**6})
    ):
        (tmp_path / str(number)).mkdir()
        fingerprints.add(build(tmp_path / str(number), PROSE, BPE, **options).fingerprint)
    assert len(fingerprints) == 1


def test_a_folder_is_reused_and_rebuilt_by_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(tmp_path, PROSE, TokenizerRecipe("bpe", 300))
    trained: list[int | None] = []
    train = own_bpe.OwnBpeTokenizer.train
    monkeypatch.setattr(
        own_bpe.OwnBpeTokenizer,
        "train",
        lambda text, size: trained.append(size) or train(text, size),
    )
    for choice in (AUTO, BPE, TokenizerRecipe("bpe", 300), data.load_tokenizer()):
        assert build(tmp_path, PROSE, choice).fingerprint == data.fingerprint
        assert build(tmp_path, None, choice).fingerprint == data.fingerprint
    assert trained == []
    assert build(tmp_path, PROSE, TokenizerRecipe("bpe", 310)).vocab_size == 310
    assert build(tmp_path, PROSE + "more and more words " * 50, BPE).vocab_size == 512
    assert trained == [310, None]
    assert build(tmp_path, PROSE, load_tokenizer("gpt2")).vocab_size == 50_257
    assert build(tmp_path, PROSE, AUTO).vocab_size == 50_257  # what is there
    for choice in (BPE, CHAR):
        with pytest.raises(PreflightError, match=f"gpt2.*not {choice.name}") as caught:
            build(tmp_path, None, choice)
        assert caught.value.code == ExitCode.DATA


def test_a_size_that_the_text_cannot_fill_is_no_reason_to_build_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = TokenizerRecipe("bpe", 5000)
    data = build(tmp_path, PROSE, choice)
    assert data.vocab_size < 5000
    monkeypatch.setattr(own_bpe.OwnBpeTokenizer, "train", None)
    assert build(tmp_path, PROSE, choice).fingerprint == data.fingerprint


def test_a_tokenizer_that_was_given_is_kept_on_another_text(tmp_path: Path) -> None:
    """As for a run that continues from its checkpoint."""
    kept = build(tmp_path, PROSE, BPE).load_tokenizer()
    data = build(tmp_path, "other words, of another text. " * 50, kept)
    assert data.metadata.tokenizer.fingerprint == kept.fingerprint
    chars = build(tmp_path, PROSE, CHAR).load_tokenizer()
    with pytest.raises(PreflightError, match=r"U\+00E9") as caught:
        build(tmp_path, PROSE + "\u00e9", chars)
    assert caught.value.code == ExitCode.TEXT
    assert read_text(load_data_folder(tmp_path / "data", AUTO)) == PROSE


def test_damage_to_the_files_is_found_and_mended(tmp_path: Path) -> None:
    data = build(tmp_path, PROSE, BPE)
    for entry in data.metadata.files:
        path = data.path / entry.name
        content = path.read_bytes()
        for damaged in (content[:-1], content.replace(b"1", b"2", 1), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(PreflightError, match=path.name) as caught:
                load_data_folder(data.path, AUTO)
            assert caught.value.code == ExitCode.DATA
            assert build(tmp_path, PROSE, BPE).fingerprint == data.fingerprint


def test_forged_files_with_right_digests_are_refused(tmp_path: Path) -> None:
    """A stranger can write metadata that lists files of another tokenizer."""
    data = build(tmp_path, PROSE, CHAR)
    path = data.path / "tokenizer/tokenizer_characters.json"
    path.write_text('"abc"')
    content = json.loads((data.path / "metadata.json").read_text())
    entry = FileEntry(
        name="tokenizer/tokenizer_characters.json",
        n_bytes=5,
        sha256=hash_file(path),
    )
    content["files"] = [entry.model_dump()]
    (data.path / "metadata.json").write_bytes(render_metadata(content))
    with pytest.raises(PreflightError, match="another tokenizer") as caught:
        load_data_folder(data.path, AUTO)
    assert caught.value.code == ExitCode.DATA


@pytest.mark.parametrize("has_metadata", [False, True])
def test_a_folder_of_that_name_that_is_not_ours_is_kept(tmp_path: Path, has_metadata: bool) -> None:
    if has_metadata:
        shutil.rmtree(build(tmp_path, PROSE, CHAR).path / "tokenizer")
    mine = tmp_path / "data/tokenizer/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(PreflightError, match=r"tokenizer/notes.txt") as caught:
        build(tmp_path, PROSE + "more", BPE)
    assert caught.value.code == ExitCode.DATA
    assert mine.read_text() == "mine"


def test_a_build_that_was_cut_continues_with_the_same_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = build(tmp_path / "a", PROSE, BPE)
    written = []

    def fail_after_three(*args: Any, **content: Any) -> None:
        written.append(1)
        if len(written) > 3:
            raise KeyboardInterrupt
        original(*args, **content)

    original = collector.write_journal
    with monkeypatch.context() as patch:
        patch.setattr(collector, "write_journal", fail_after_three)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "b", PROSE, BPE)
    assert build(tmp_path / "b", PROSE, BPE).fingerprint == whole.fingerprint
    assert "resuming at shard 3" in capsys.readouterr().err


def test_a_document_too_long_for_a_tokenizer_that_cannot_cut_is_told(tmp_path: Path) -> None:
    name = tmp_path / "llama2.json"
    name.write_bytes(read_library_file("llama2.json"))
    tokenizer = load_tokenizer(str(name))
    with pytest.raises(PreflightError, match="encodes documents whole") as caught:
        build(tmp_path, PROSE * 80, tokenizer)
    assert caught.value.code == ExitCode.TEXT
    assert "--document-separator" in str(caught.value)
    text = read_text(build(tmp_path, PROSE, tokenizer))  # each part begins with a space
    assert text.replace("\n the", "\nthe").strip() == PROSE.strip()
