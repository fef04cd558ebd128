"""Tokenizers that cannot be used, or are not those of the run: told by name, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints.samples import CONFIG, make_weights, rewrite_manifest
from tokenization.fakes import PlainText
from tokenization.library_files import read_library_file

import main
from preflight.checkpoints.saving import save_checkpoint
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer, TokenizerRecipe, load_tokenizer

from .harness import TRAIN_FLAGS, find_message_faults, hash_tree, make_text

Said = pytest.CaptureFixture[str]
BASE = [flag for flag in TRAIN_FLAGS if flag not in ("--tokenizer", "gpt2")]
RUN = [*BASE, "--max-steps", "1", "--no-compile-model"]
CONTINUE = [*BASE[:-2], "--max-steps", "2"]
GENERATE = ["--generate", "--device", "cpu", "--max-new-tokens", "2", "--prompts"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run ``char``; and ``json`` and ``model``, whose checkpoints are those of no training."""
    folder = tmp_path_factory.mktemp("runs")
    before = os.getcwd()
    for kind in ("char", "json", "model"):
        (folder / kind / "training_output").mkdir(parents=True)
        os.chdir(folder / kind)
        Path("text.txt").write_text(make_text(4000))
        Path("own.json").write_bytes(read_library_file("gpt2.json"))
        if kind == "char":
            assert main.main([*RUN, "--tokenizer", "char"]) == 0
            continue
        Path("own.model").write_bytes(read_library_file("bpe.model"))
        load_tokenizer.cache_clear()
        tokenizer = load_tokenizer(f"own.{kind}")
        prepare_data(DataSettings(text_file=("text.txt",)), tokenizer, n_workers=0)
        save_first(tokenizer)
    os.chdir(before)
    return folder


def save_first(tokenizer: Tokenizer, **facts: object) -> None:
    """A checkpoint with this tokenizer, in an output folder that is there."""
    config = CONFIG | {"tokenizer": tokenizer.describe() | facts}
    save_checkpoint(Path("training_output"), 1, make_weights(1), {}, config, {}, tokenizer)


@pytest.fixture(autouse=True)
def _cached_tokenizers() -> None:
    load_tokenizer.cache_clear()


def enter(runs: Path, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs / kind, place, dirs_exist_ok=True)
    monkeypatch.chdir(place)


def refuse(said: Said, code: int, argv: list[str], *words: str) -> None:
    said.readouterr()
    before = hash_tree(Path.cwd())
    assert main.main(argv) == code, said.readouterr().err
    out, err = said.readouterr()
    assert find_message_faults(err, *words) == "", argv
    assert out == ""
    assert hash_tree(Path.cwd()) == before


def change(**parts: Any) -> bytes:
    """A good ``tokenizer.json`` with other parts."""
    return json.dumps(json.loads(read_library_file("gpt2.json")) | parts).encode()


def test_files_that_hold_no_tokenizer(
    place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    Path("text.txt").write_text("a text")
    Path("folder.json").mkdir()
    Path("folder.model").mkdir()
    os.mkfifo("pipe.json")
    for name, content, word in (
        ("empty.json", b"", "not JSON, or cut short"),
        ("cut.json", read_library_file("gpt2.json")[:-500], "not JSON, or cut short"),
        ("bytes.json", bytes(range(256)), "not JSON, or cut short"),
        ("list.json", b"[1, 2]", "no JSON object"),
        ("words.json", b'{"hello": 1}', "no model"),
        ("text.json", b'{"model": "BPE"}', "no model"),
        ("parts.json", change(decoder={"type": "Sequence", "decoders": 3}), "Decoder"),
        ("added.json", change(added_tokens=[3]), "invalid type"),
        ("splits.json", change(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}), ""),
        ("folder.json", None, "not a plain file"),
        ("pipe.json", None, "not a plain file"),
        ("missing.json", None, "No such file"),
        ("empty.model", b"", "no pieces"),
        ("cut.model", read_library_file("bpe.model")[:-99], "not a SentencePiece model, or cut"),
        ("text.model", b"a text", "not a SentencePiece model"),
        ("folder.model", None, "not a plain file"),
        ("missing.model", None, "No such file"),
    ):
        if content is not None:
            Path(name).write_bytes(content)
        named = f"--tokenizer {name}: no "
        refuse(capsys, 2, [*RUN, "--tokenizer", name], named, word)
        refuse(capsys, 2, ["--tokenize", "a", "--tokenizer", name], named, word)


def test_a_link_to_a_tokenizer_is_followed(
    place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face's cache consists of links."""
    monkeypatch.chdir(place)
    Path("blob").write_bytes(read_library_file("gpt2.json"))
    Path("tokenizer.json").symlink_to("blob")
    assert main.main(["--tokenize", "a", "--tokenizer", "tokenizer.json"]) == 0
    Path("round.json").symlink_to("round.json")
    refuse(capsys, 2, ["--tokenize", "a", "--tokenizer", "round.json"], "round.json", "link")


@pytest.mark.parametrize(("kind", "library"), [("json", "tokenizers"), ("model", "sentencepiece")])
def test_a_missing_library(
    kind: str, library: str, runs: Path, place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(runs, kind, place, monkeypatch)
    monkeypatch.setitem(sys.modules, library, None)
    command = f"pip install {library}"
    new = ["--output-dir", "new"]
    for code, argv in (
        (2, [*RUN, *new, "--data-dir", "new data", "--tokenizer", f"own.{kind}"]),
        (5, [*CONTINUE]),
        (5, [*GENERATE, "the"]),
        (5, ["--tokenize", "the"]),
        (4, [*CONTINUE, *new, "--tokenizer", "auto"]),
        (4, ["--tokenize", "the", *new]),
    ):
        refuse(capsys, code, argv, f"needs the library {library}", command)


def test_another_vocabulary_than_the_checkpoints(
    runs: Path, place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(runs, "char", place, monkeypatch)
    for name in ("gpt2", "byte", "bpe", "own.json"):
        told = f"tokenizer: checkpoint char, flags {name}"
        refuse(capsys, 5, [*RUN, "--tokenizer", name], told)
        refuse(capsys, 5, [*GENERATE, "the", "--tokenizer", name], told)
    shutil.copytree(runs / "json" / "data", "other")
    on_other = [*CONTINUE, "--data-dir", "other"]
    refuse(capsys, 4, on_other, "other was made with tokenizer own.json", "not char")
    refuse(
        capsys, 4, [*on_other, "--output-dir", "new", "--tokenizer", "byte"], "own.json", "not byte"
    )


def test_another_table_in_the_checkpoint(
    runs: Path, place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(runs, "char", place, monkeypatch)
    [folder] = Path("training_output/milestones").iterdir()
    table = folder / "tokenizer_characters.json"
    content = table.read_bytes()
    table.write_bytes(content.replace(b"a", b"A"))
    refuse(capsys, 5, [*GENERATE, "the"], table.name)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    files = {name: entry for name, entry in manifest["files"].items() if name != table.name}
    rewrite_manifest(folder, files=files)  # whoever wrote the table wrote the manifest too
    for argv in ([*GENERATE, "the"], CONTINUE, ["--tokenize", "the"]):
        refuse(capsys, 5, argv, table.name, "of another tokenizer")


def test_ids_that_the_weights_do_not_have(
    place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    byte = load_tokenizer("byte")
    for facts, words in (
        ({}, "11 embeddings are too few for the 257 ids of byte"),
        ({"fingerprint": "f" * 64}, "another vocabulary than that of byte"),
        ({"kind": "telepathy"}, "kind 'telepathy', which is unknown here"),
    ):
        shutil.rmtree("training_output", ignore_errors=True)
        Path("training_output").mkdir()
        save_first(byte, **facts)
        refuse(capsys, 5, [*GENERATE, "the"], words)


def test_a_vocabulary_that_the_text_cannot_fill_is_told(
    place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    Path("text.txt").write_text(make_text(4000))
    flags = ["--tokenizer", "bpe", "--vocab-size"]
    assert main.main([*RUN, *flags, "5000"]) == 0
    told = capsys.readouterr().err
    assert "ids, fewer than the 5,000 of --vocab-size" in told
    config = json.loads(next(Path.cwd().rglob("config.json")).read_bytes())
    n_ids = config["tokenizer"]["vocab_size"]
    assert f"gives {n_ids} ids" in told
    assert n_ids < 400
    new = ["--output-dir", "new", "--data-dir", "new data"]
    refuse(capsys, 2, [*RUN, *flags, "256", *new], "--vocab-size 256: a bpe has 257 ids")
    for name, n_least in (("gpt2", "50,257"), ("byte", "257")):
        words = "--vocab-size 200 is smaller than", f"{n_least} ids of {name}"
        refuse(capsys, 2, [*RUN, "--tokenizer", name, "--vocab-size", "200", *new], *words)


def test_characters_that_the_model_does_not_know(
    runs: Path, place: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(runs, "char", place, monkeypatch)
    refuse(capsys, 3, [*GENERATE, "caf\u00e9"], "U+00E9", "--replace-unknown")
    assert main.main([*GENERATE, "the \u00e9", "--replace-unknown"]) == 0
    assert capsys.readouterr().out.startswith("the \u00e9")
    table = TokenizerRecipe("char").make(PlainText("abc"))
    Path("training_output").rename("old")
    Path("training_output").mkdir()
    save_first(table)
    refuse(capsys, 3, ["--tokenize", "x", "--replace-unknown"], "no '?' and no space")
