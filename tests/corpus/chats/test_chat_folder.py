"""The data folder of chats: what is in it, when it is built, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus.chats.fake_encoder import FakeEncoder, FakeTemplate
from corpus.test_rows import hash_tree

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import hash_file
from preflight.corpus.build import prepare_data
from preflight.corpus.chats import encoding
from preflight.corpus.chats.build import prepare_chats
from preflight.corpus.chats.builder import hash_chat
from preflight.corpus.chats.data import ChatData
from preflight.corpus.chats.reading import open_chat_file, read_chats
from preflight.corpus.metadata import render_metadata
from preflight.corpus.shards import DataFolder
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer
from preflight.tokenization.chats import Chat, EncodedChat, Message

WORDS = "the quick brown f\u00f6x jumps over 12 lazy dogs \u6f22\u5b57".split(" ")


def draw_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of one to three exchanges, every tenth with a question at its end."""
    draw = random.Random(seed)

    def say(number: int) -> str:
        return f"{number} " + " ".join(draw.choices(WORDS, k=draw.randrange(1, 30)))

    return [
        {"conversations": [say(i) for _ in range(2 * draw.randrange(1, 4) + (i % 10 == 0))]}
        for i in range(n)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", draw_rows(300))


def prepare(chats: Path, encoder: FakeEncoder | None = None, **more: Any) -> ChatData:
    values = {"val_split": 0.1} | more
    return prepare_chats([chats], encoder or FakeEncoder(), chats.parent / "data", **values)


def fail(code: ExitCode, run: Callable[[], Any]) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        run()
    assert caught.value.code == code, caught.value
    assert len(caught.value.lines) <= 5
    return caught.value


def read_source(path: Path) -> list[Chat]:
    file = open_chat_file(path)
    file.scan(None)
    return [found.chat for _, found in read_chats(file)]


def read_rows(folder: ChatData, split: str) -> list[tuple[list[int], list[bool]]]:
    """All rows, read in an order of their own in groups of nine."""
    found: dict[int, tuple[list[int], list[bool]]] = {}
    with folder.open_rows(split) as rows:
        order = np.random.default_rng(1).permutation(len(rows))
        for chosen in np.array_split(order, max(len(rows) // 9, 1)):
            for row, (ids, mask) in zip(chosen.tolist(), rows.read(chosen), strict=True):
                assert (ids.dtype, mask.dtype) == (np.int64, np.bool_)
                found[row] = ids.tolist(), mask.tolist()
        return [found[row] for row in range(len(rows))]


def read_lengths(folder: ChatData) -> list[list[int]]:
    """Tokens of each row: of the training part, and of the validation part."""
    parts = []
    for split in ("train", "val"):
        with folder.open_rows(split) as rows:
            parts.append(rows.lengths.tolist())
    return parts


# ---- what is in it ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokenizer", "context"), [("byte", 10_000), ("gpt2", 60), ("byte", 90)])
def test_rows_are_those_of_the_encoder(
    chats: Path, tokenizer: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across shards and batches; all figures counted again from the encoder's own rows."""
    monkeypatch.setattr(encoding, "BATCH_CHATS", 7)
    encoder = FakeEncoder(tokenizer, context)
    folder = prepare(chats, encoder, shard_tokens=1024)
    sources = read_source(chats)
    expected: dict[str, list[Any]] = {"train": [], "val": []}
    threshold = 0.1 * 2**64
    for chat in sources:
        rows = encoder.encode([chat])[0]
        expected["val" if hash_chat(chat) < threshold else "train"] += rows
    counts = folder.facts.counts
    for split, encoded in expected.items():
        part = getattr(folder, split)
        assert len(encoded) > 5
        assert read_rows(folder, split) == [
            (row.ids.tolist(), row.mask.tolist()) for row in encoded
        ]
        with folder.open_rows(split) as rows:
            assert rows.lengths.tolist() == [len(row.ids) for row in encoded]
            assert rows.n_targets.tolist() == [row.mask.sum() for row in encoded]
            assert (part.n_documents, part.n_tokens) == (len(encoded), rows.lengths.sum())
        end = encoder.tokenizer.end_of_text_id
        learned = [row.ids[row.mask & (row.ids != end)] for row in encoded]
        spelled = map(encoder.tokenizer.decode_bytes, learned)
        assert part.n_bytes == sum(map(len, spelled))
    every = expected["train"] + expected["val"]
    assert len(folder.train.shards) > 1
    assert counts.n_chats == len(sources)
    assert counts.n_open == 30
    assert counts.n_rows == len(every) == counts.n_chats - counts.n_dropped
    assert counts.n_targets == sum(row.mask.sum() for row in every)
    assert counts.n_tokens == sum(len(row.ids) for row in every)
    assert counts.longest == max(len(row.ids) for row in every)
    for name in ("n_answers", "n_ended", "n_cut_turns", "n_cut_tokens"):
        assert getattr(counts, name) == sum(getattr(row, name) for row in every)
    assert counts.n_cut == sum(row.n_cut_turns > 0 for row in every)
    assert counts.n_cut_at_end == sum(row.n_cut_tokens > 0 for row in every)
    assert (counts.n_dropped > 0) == (context < 100)
    assert (counts.n_cut > 0) == (context < 100)
    assert folder.facts.formats == ["LIMA conversations"]
    for entry in folder.facts.examples:
        number = int(entry.place.removeprefix("chats.jsonl, line "))
        row = encoder.encode([sources[number - 1]])[0][0]
        assert read_rows(folder, "train")[entry.row][0] == row.ids.tolist()
    assert len(folder.facts.examples) == 3


def test_files_of_all_forms_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", draw_rows(10))
    alpaca = [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(10)]
    (tmp_path / "b.json").write_text(json.dumps(alpaca))
    files = [tmp_path / "b.json", tmp_path / "a.jsonl"]
    folder = prepare_chats(files, FakeEncoder(), tmp_path / "data", val_split=0.5)
    assert folder.facts.formats == ["Alpaca", "LIMA conversations"]
    assert [entry.name for entry in folder.metadata.sources] == ["b.json", "a.jsonl"]
    assert folder.facts.counts.n_chats == 20


def test_the_same_files_give_the_same_bytes(tmp_path: Path, chats: Path) -> None:
    prepare(chats)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(chats, other)
    prepare(other / "chats.jsonl")
    assert hash_tree(tmp_path / "data") == hash_tree(other / "data")


def test_equal_chats_are_on_one_side(tmp_path: Path) -> None:
    rows = draw_rows(40)
    draw = random.Random(3)
    path = write(tmp_path / "chats.jsonl", draw.choices(rows, k=400))
    folder = prepare(path, val_split=0.3)
    parts = [{tuple(ids) for ids, _ in read_rows(folder, split)} for split in ("train", "val")]
    assert parts[0].isdisjoint(parts[1])
    assert sum(map(len, read_lengths(folder))) == 400


@pytest.mark.parametrize("val_split", [1e-9, 0.5])
def test_two_chats_are_one_on_each_side(tmp_path: Path, val_split: float) -> None:
    path = write(tmp_path / "chats.jsonl", draw_rows(2))
    folder = prepare(path, val_split=val_split)
    assert [len(lengths) for lengths in read_lengths(folder)] == [1, 1]


@pytest.mark.parametrize("n", [1, 3])
def test_one_chat_alone_is_refused(tmp_path: Path, n: int) -> None:
    path = write(tmp_path / "chats.jsonl", draw_rows(1) * n)
    error = fail(ExitCode.TEXT, lambda: prepare(path))
    assert "a single chat, or copies of it" in str(error)
    assert error.lines[-1] == "give more chats"
    assert hash_tree(tmp_path / "data") == {}


def hash_pair(user: str, answer: str) -> int:
    return hash_chat(Chat((Message("user", user), Message("assistant", answer))))


def test_a_part_of_too_long_chats_is_shared_out_again(tmp_path: Path) -> None:
    """The chat that the hash chooses for validation has no target within the context."""
    pairs = [(f"{i}", "yes") for i in range(20)]
    hashes = [hash_pair(*pair) for pair in pairs]
    questions = (f"{i}" + "x" * 99 for i in itertools.count())
    pairs[7] = next((q, "yes") for q in questions if hash_pair(q, "yes") < min(hashes))
    rows = [{"prompt": user, "completion": answer} for user, answer in pairs]
    path = write(tmp_path / "chats.jsonl", rows)
    folder = prepare(path, FakeEncoder("byte", 50), val_split=1e-9)
    assert folder.facts.counts.n_dropped == 1
    assert [len(lengths) for lengths in read_lengths(folder)] == [18, 1]
    error = fail(ExitCode.TEXT, lambda: prepare(path, FakeEncoder("byte", 5)))
    assert "no chat, and 20 have no target in --context-length" in str(error)


def test_very_many_turns(tmp_path: Path) -> None:
    rows = [{"conversations": ["x", "y"] * n} for n in (50_000, 1)]

    class Counting(FakeEncoder):
        def encode(self, chats: Any) -> Any:
            sizes = [len(chat.messages) for chat in chats]
            ones = [np.ones(n, np.int64) for n in sizes]
            return [
                [EncodedChat(ids, np.arange(n) > 0, n, n)]
                for ids, n in zip(ones, sizes, strict=True)
            ]

    folder = prepare(write(tmp_path / "chats.jsonl", rows), Counting())
    assert sorted(itertools.chain(*read_lengths(folder))) == [2, 100_000]


# ---- when it is built ---------------------------------------------------------------------------


def test_an_unchanged_folder_is_not_encoded_again(chats: Path) -> None:
    first = prepare(chats)
    again = FakeEncoder()
    found = prepare(chats, again)
    assert again.n_encoded == 0
    assert found.fingerprint == first.fingerprint
    assert found.facts == first.facts
    with FolderLock(chats.parent / "data", shared=True):  # nor is it locked
        prepare(chats, again)


def test_a_complete_build_is_not_made_again(chats: Path) -> None:
    """Killed when all was written, and only the renames were left."""
    prepare(chats)
    before = hash_tree(chats.parent / "data")
    unfinish(chats.parent / "data")
    again = FakeEncoder()
    prepare(chats, again)
    assert again.n_encoded == 0
    assert hash_tree(chats.parent / "data") == before


def unfinish(folder: Path) -> None:
    """The state before the first rename of a build that is complete."""
    whole = folder.rename(folder.with_name("whole"))
    folder.mkdir()
    (whole / ".lock").unlink()
    whole.rename(folder / ".building")


def test_what_changes_is_told_and_built(chats: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(chats)
    changes: list[tuple[FakeEncoder, float, str]] = [
        (FakeEncoder(context_length=500), 0.1, "--context-length changed from 10,000 to 500"),
        (FakeEncoder(context_length=500), 0.2, "--val-split changed from 0.1 to 0.2"),
        (FakeEncoder(template=FakeTemplate("mine")), 0.2, "template changed from fake to mine"),
        (FakeEncoder(learn_from="all"), 0.2, "the chat template changed from mine to fake"),
        (FakeEncoder(), 0.2, "--learn-from changed from all to answers"),
        (FakeEncoder("gpt2"), 0.2, "the tokenizer changed from byte to gpt2"),
    ]
    for encoder, val_split, reason in changes:
        caplog.clear()
        folder = prepare(chats, encoder, val_split=val_split)
        assert encoder.n_encoded == 300
        assert reason in caplog.text
        assert folder.facts.encoder == encoder.fingerprint
    caplog.clear()
    write(chats, draw_rows(300, seed=1))
    prepare(chats, FakeEncoder("gpt2"), val_split=0.2)
    assert "the chats changed (chats.jsonl)" in caplog.text


@pytest.fixture(autouse=True)
def _propagate() -> Iterator[None]:
    """So that caplog sees what the command line would show."""
    log.propagate = True
    yield
    log.propagate = False


def test_without_files_the_encoder_decides(chats: Path) -> None:
    folder = chats.parent / "data"
    missing = fail(ExitCode.TEXT, lambda: prepare(chats.with_name("none.jsonl")))
    assert missing.lines[0] == f"{chats.with_name('none.jsonl')}: no such file"
    fail(ExitCode.DATA, lambda: prepare_chats([], FakeEncoder(), folder, val_split=0.1))
    first = prepare(chats)
    chats.unlink()
    for files in ([chats], []):
        found = prepare_chats(files, FakeEncoder(), folder, val_split=0.3)
        assert found.fingerprint == first.fingerprint
        other = FakeEncoder(context_length=500)
        error = fail(
            ExitCode.DATA, lambda f=files, e=other: prepare_chats(f, e, folder, val_split=0.1)
        )
        assert "--context-length changed from 10,000 to 500" in str(error)
    fail(ExitCode.TEXT, lambda: prepare(chats.with_name("other.jsonl")))


def test_a_run_may_keep_its_folder(chats: Path) -> None:
    first = prepare(chats)
    before = hash_tree(chats.parent / "data")
    asked: list[tuple[str, str | None, DataFolder | None]] = []

    def refuse(reason: str, old: str | None, new: DataFolder | None) -> None:
        asked.append((reason, old, new))
        if new is not None:
            raise PreflightError(ExitCode.DATA, "keep it")

    other = FakeEncoder(context_length=500)
    fail(ExitCode.DATA, lambda: prepare(chats, other, may_replace=refuse))
    assert [old for _, old, _ in asked] == [first.fingerprint, None]
    assert asked[1][2] is not None
    assert asked[1][2].fingerprint != first.fingerprint
    assert hash_tree(chats.parent / "data") == before
    prepare(chats)  # unchanged


# ---- what is refused ----------------------------------------------------------------------------


def test_folders_of_text_and_of_others_stay(tmp_path: Path, chats: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 500)
    settings = DataSettings(data_dir=str(tmp_path / "data"), text_file=(str(text),))
    prepare_data(settings, load_tokenizer("byte"))
    before = hash_tree(tmp_path / "data")
    error = fail(ExitCode.DATA, lambda: prepare(chats))
    assert "holds text, not chats" in str(error)
    fail(ExitCode.TEXT, lambda: prepare(chats.with_name("none.jsonl")))
    assert hash_tree(tmp_path / "data") == before
    shutil.rmtree(tmp_path / "data")
    prepare(chats)
    before = hash_tree(tmp_path / "data")
    for text_file in ((str(text),), ()):
        settings = DataSettings(data_dir=str(tmp_path / "data"), text_file=text_file)
        error = fail(ExitCode.DATA, lambda s=settings: prepare_data(s, load_tokenizer("byte")))
        assert "holds chats, not text" in str(error)
    unfinish(tmp_path / "data")  # it is finished, and refused
    fail(ExitCode.DATA, lambda: prepare_data(settings, load_tokenizer("byte")))
    assert hash_tree(tmp_path / "data") == before
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "mask.npy").write_bytes(b"mine")
    fail(ExitCode.DATA, lambda: prepare(chats))
    assert (tmp_path / "data" / "train" / "mask.npy").read_bytes() == b"mine"
    assert not (tmp_path / "data" / ".lock").exists()


def test_a_folder_in_use_is_refused(chats: Path) -> None:
    (chats.parent / "data").mkdir()
    with FolderLock(chats.parent / "data"):
        fail(ExitCode.LOCKED, lambda: prepare(chats))


def test_faults_leave_the_old_folder(chats: Path) -> None:
    prepare(chats)
    before = hash_tree(chats.parent / "data")
    with chats.open("a") as file:
        file.write('{"conversations": ["a"]}\n')
    error = fail(ExitCode.TEXT, lambda: prepare(chats))
    assert "line 301: no message of the assistant" in error.lines[0]
    assert hash_tree(chats.parent / "data") == before


@pytest.mark.parametrize("n_chats", [20, 300])  # of one batch, and of more
def test_a_signal_ends_the_build(tmp_path: Path, n_chats: int) -> None:
    stop = StopFlag()
    chats = write(tmp_path / "chats.jsonl", draw_rows(n_chats))

    class Stopping(FakeEncoder):
        def encode(self, chats: Any) -> Any:
            stop.received = 2
            return super().encode(chats)

    fail(ExitCode.SIGINT, lambda: prepare(chats, Stopping(), stop=stop))
    assert hash_tree(chats.parent / "data") == {}
    stop.received = None
    prepare(chats, stop=stop)


@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_file_that_changes_is_not_published(chats: Path, is_hidden: bool) -> None:
    """Hidden: size and time are as before, so that only the content tells."""
    content, status = chats.read_bytes(), chats.stat()

    class Writing(FakeEncoder):
        def encode(self, found: Any) -> Any:
            with chats.open("rb+") as file:
                file.write(content.replace(b"0", b"1") if is_hidden else content + b"\n")
            if is_hidden:
                os.utime(chats, ns=(status.st_atime_ns, status.st_mtime_ns))
            return super().encode(found)

    error = fail(ExitCode.TEXT, lambda: prepare(chats, Writing()))
    assert "changed while it was being read" in str(error)


FILES = [
    f"{split}/{name}"
    for split in ("train", "val")
    for name in ("shard_00000.npy", "mask.npy", "offsets.npy")
]


@pytest.mark.parametrize("name", [*FILES, "metadata.json"])
def test_a_flipped_bit_is_found(chats: Path, name: str) -> None:
    """Anywhere in the file; with the chats at hand the folder is built again, the same."""
    folder = chats.parent / "data"
    prepare(chats)
    before = hash_tree(folder)
    path = folder / name
    content = path.read_bytes()
    for place in (3, 90, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        error = fail(ExitCode.DATA, lambda: prepare_chats([], FakeEncoder(), folder, val_split=0.1))
        assert name in error.lines[0]
        assert error.lines[1].startswith("give the files of chats to rebuild")
        path.write_bytes(content)
    for cut in (b"", content[:-1], content + b"\0"):
        path.write_bytes(cut)
        fail(ExitCode.DATA, lambda: prepare_chats([], FakeEncoder(), folder, val_split=0.1))
    if name != "metadata.json":  # of which not even the beginning is left
        prepare(chats)
        assert hash_tree(folder) == before


def test_a_damaged_metadata_is_built_again(chats: Path) -> None:
    folder = chats.parent / "data"
    prepare(chats)
    before = hash_tree(folder)
    path = folder / "metadata.json"
    path.write_bytes(path.read_bytes()[:-40])
    prepare(chats)
    assert hash_tree(folder) == before


@dataclass(frozen=True)
class Archive:
    """An array that is saved as NumPy's archives are."""

    array: np.ndarray


def rewrite(folder: Path, name: str, array: np.ndarray | Archive) -> None:
    """Put another array in a file's place, with metadata that vouch for it."""
    with (folder / name).open("wb") as file:
        if isinstance(array, Archive):
            np.savez(file, array.array)
        else:
            np.save(file, array)
    content = json.loads((folder / "metadata.json").read_text())
    for entry in content["files"]:
        if entry["name"] == name:
            entry["sha256"] = hash_file(folder / name)
            entry["n_bytes"] = (folder / name).stat().st_size
    (folder / "metadata.json").write_bytes(render_metadata(content))


def test_a_strangers_folder_is_bounded(chats: Path) -> None:
    """Files whose digests are right, but which are no masks and no borders of rows."""
    folder = chats.parent / "data"
    prepare(chats)
    mask, offsets = (np.load(folder / "val" / f"{name}.npy") for name in ("mask", "offsets"))
    first, empty, large = mask.copy(), mask.copy(), mask.copy()
    first[offsets[3]] = 1
    empty[offsets[4] : offsets[5]] = 0
    large[offsets[2] - 1] = 2
    shifted, beyond, short = offsets.copy(), offsets.copy(), offsets.copy()
    shifted[0], beyond[-1], short[2] = 1, offsets[-1] + 1, offsets[1] + 1
    falling = offsets.copy()
    falling[2] = offsets[5]
    arrays: list[tuple[str, list[Any]]] = [
        ("mask", [first, empty, large, mask[:-1], mask.astype(np.int8), mask[None]]),
        ("offsets", [shifted, beyond, short, falling, offsets[:1], offsets[:0]]),
        ("offsets", [offsets.astype(np.int32), offsets.astype(np.float64)]),
        ("mask", [np.array([{}] * len(mask), object), Archive(mask)]),
    ]
    for name, versions in arrays:
        for array in versions:
            rewrite(folder, f"val/{name}.npy", array)
            error = fail(
                ExitCode.DATA, lambda: prepare_chats([], FakeEncoder(), folder, val_split=0.1)
            )
            assert f"{name}.npy" in error.lines[0]
        rewrite(folder, f"val/{name}.npy", mask if name == "mask" else offsets)
    prepare_chats([], FakeEncoder(), folder, val_split=0.1)


@pytest.mark.parametrize("name", ["shard_00000.npy", "mask.npy"])
def test_files_that_change_while_in_use(chats: Path, name: str) -> None:
    folder = prepare(chats)
    path = chats.parent / "data" / "train" / name
    content = path.read_bytes()
    with folder.open_rows("train") as rows:
        for change in (content[:200], content):  # cut, and written again with the same bytes
            path.write_bytes(change)
            os.utime(path, ns=(1, 1))
            error = fail(ExitCode.DATA, lambda: rows.read(np.arange(len(rows))))
            assert name in error.lines[0]


def test_the_fingerprint_covers_masks(chats: Path) -> None:
    """Equal ids with other masks, or other borders of rows, are other data."""

    class Everything(FakeEncoder):
        def encode(self, chats: Any) -> Any:
            rows = super().encode(chats)
            for row in (row for found in rows for row in found):
                row.mask[1:] = True
            return rows

    prints = {prepare(chats, kind()).fingerprint for kind in (FakeEncoder, FakeEncoder)}
    assert len(prints) == 1
    other = prepare(chats, Everything(learn_from="all"))
    assert other.fingerprint not in prints
    assert other.facts.counts.n_targets == other.facts.counts.n_tokens - 300
