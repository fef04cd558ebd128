"""Files of tokens: what other programs write comes back id for id; what is no tokens is refused."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.sources import token_arrays
from preflight.corpus.sources.token_arrays import TokenArray, count_text_bytes, find
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer

TYPES = ("u2", "u4", "i4", "i8")
NAMES = {20240520: (1, "<u2"), 20240801: (7, "<u4")}


def write_nanogpt(path: Path, ids: list[int]) -> Path:
    """As nanoGPT's data/shakespeare_char/prepare.py writes train.bin."""
    np.array(ids, dtype=np.uint16).tofile(path)
    return path


def write_llmc(path: Path, ids: list[int], magic: int, **changed: int) -> Path:
    """By llm.c's published layout: 256 int32, of which three are set, and then the ids."""
    version, dtype = NAMES[magic]
    words = {0: magic, 1: version, 2: len(ids)} | {int(k[1:]): v for k, v in changed.items()}
    header = b"".join(words.get(i, 0).to_bytes(4, "little", signed=True) for i in range(256))
    size = int(dtype[-1])
    path.write_bytes(header + b"".join(i.to_bytes(size, "little") for i in ids))
    return path


def open_one(path: Path) -> TokenArray:
    found = find(str(path), DataSettings())
    assert found is not None
    (source,) = found
    return source


def read_ids(source: TokenArray, start: int = 0) -> list[int]:
    return [int(i) for block in source.read(start) for i in block]


def refuse(action: Callable[[], object]) -> str:
    """The message of a refusal, which names the file first."""
    with pytest.raises(PreflightError) as caught:
        action()
    assert caught.value.code == ExitCode.TEXT
    assert len(caught.value.lines) <= 5
    return "\n".join(caught.value.lines)


# ---- round trips --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@given(
    kind=st.sampled_from(["raw", "gpt-2", "llama-3", *(f"{e}{t}" for e in "<>" for t in TYPES)]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_what_another_program_wrote_comes_back(
    folder: Path, kind: str, data: st.DataObject
) -> None:
    largest = 2**31 - 1 if kind[-2:] in ("-3", "u4", "i4", "i8") else 2**16 - 1
    ids = data.draw(st.lists(st.integers(0, largest), min_size=1, max_size=30))
    block = data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, len(ids)))
    if kind == "raw":
        path = write_nanogpt(folder / "train.bin", ids)
    elif kind in ("gpt-2", "llama-3"):
        path = write_llmc(folder / "part.bin", ids, 20240520 if kind == "gpt-2" else 20240801)
    else:
        path = folder / "ids.npy"
        np.save(path, np.array(ids, dtype=kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_arrays, "BLOCK_TOKENS", block)
        source = open_one(path)
        source.scan(None)
        assert source.n_tokens == len(ids)
        assert read_ids(source) == ids
        assert read_ids(source, start) == ids[start:]
        blocks = list(source.read())
    assert max(map(len, blocks)) <= block
    assert all(b.ndim == 1 and b.dtype.isnative for b in blocks)


def test_facts_identify_the_file_and_tell_what_it_was_taken_for(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", [5, 50256, 7])
    source = open_one(path)
    facts = source.scan(None)
    assert (facts.size, facts.sha256) == (6, hashlib.sha256(path.read_bytes()).hexdigest())
    assert facts.notes == (
        "taken as nanoGPT's uint16 tokens: the file has no header that would say so",
    )
    assert (source.name, source.label, source.is_tokens) == ("train.bin", str(path), True)
    assert not facts.document_bytes
    header = write_llmc(tmp_path / "p.bin", [1, 2], 20240801)
    assert open_one(header).scan(None).notes == ("taken as llm.c's tokens of Llama 3",)
    array = tmp_path / "a.NPY"
    with open(array, "wb") as file:
        np.save(file, np.array([1], np.uint16))
    assert open_one(array).scan(None).notes == ()


def test_npy_version_two_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.npy"
    ids = np.arange(7, dtype=np.uint16)
    with open(path, "wb") as file:
        np.lib.format.write_array(file, ids, version=(2, 0))
    assert read_ids(open_one(path)) == ids.tolist()


def test_an_npy_called_bin_is_read_by_its_head(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    with open(path, "wb") as file:
        np.save(file, np.array([3, 1, 4], np.uint32))
    assert read_ids(open_one(path)) == [3, 1, 4]


def test_other_names_and_folders_are_for_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "train.txt").write_text("text")
    for given_name in ("train.txt", "folder.bin", "missing.npy"):
        assert find(str(tmp_path / given_name), DataSettings()) is None
    assert find(None, DataSettings()) is None
    os.mkfifo(tmp_path / "pipe.bin")
    assert find(str(tmp_path / "pipe.bin"), DataSettings()) is None


# ---- refusals -----------------------------------------------------------------------------------


def save_bytes(array: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)  # type: ignore[arg-type]
    return file.getvalue()


GOOD_NPY = save_bytes(np.arange(100, dtype=np.uint16))
DEEP_HEADER = b"(" * 9000
REFUSED = {
    "floats.npy": (save_bytes(np.ones(3)), "an array of float64"),
    "bools.npy": (save_bytes(np.ones(3, bool)), "an array of bool"),
    "bytes.npy": (save_bytes(np.ones(3, np.uint8)), "an array of uint8"),
    "signed.npy": (save_bytes(np.ones(3, np.int16)), "an array of int16"),
    "wide.npy": (save_bytes(np.ones(3, np.uint64)), "an array of uint64"),
    "times.npy": (save_bytes(np.zeros(3, "M8[s]")), "an array of datetime64"),
    "fields.npy": (save_bytes(np.zeros(3, "u2,u2")), "token ids are"),
    "square.npy": (save_bytes(np.zeros((3, 4), np.uint16)), "shape (3, 4)"),
    "scalar.npy": (save_bytes(np.uint16(3)), "shape ()"),
    "objects.npy": (save_bytes(np.array([{}, 1], object), allow_pickle=True), "pickled"),
    "cut.npy": (GOOD_NPY[:-7], "its header says 100 tokens, it holds 96"),
    "more.npy": (GOOD_NPY + b"12345", "5 bytes follow the 100 tokens"),
    "header.npy": (GOOD_NPY[:40], "header cannot be read"),
    "magic.npy": (b"\x93NUMPY", "header cannot be read"),
    "version.npy": (b"\x93NUMPY\x03\x00" + GOOD_NPY[8:], "version 3.0"),
    "deep.npy": (
        b"\x93NUMPY\x01\x00" + len(DEEP_HEADER).to_bytes(2, "little") + DEEP_HEADER,
        "header cannot be read",
    ),
    "negative.npy": (GOOD_NPY.replace(b"(100,)", b"(-10,)"), "-10"),
    "huge.npy": (
        GOOD_NPY.replace(b"(100,), }   ", b"(10**19,), }").replace(b"10**19", b"999999"),
        "its header says 999,999 tokens, it holds 100",
    ),
    "text.npy": (b"once upon a time", "not a .npy file"),
    "empty.npy": (b"", "empty"),
    "none.npy": (save_bytes(np.zeros(0, np.uint16)), "holds no tokens"),
    "empty.bin": (b"", "holds no tokens"),
    "odd.bin": (b"\1\2\3", "3 bytes, an odd number"),
    "text.bin": ("Once upon a time, é.\n".encode() * 300, "text, not tokens"),
    "model.bin": (b"PK\x03\x04" + b"\0" * 20, "a zip archive"),
    "old.bin": (b"\x80\x02}q\0." + b"\0" * 20, "a pickle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tokens_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, expected = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refuse(lambda: find(str(path), DataSettings()))
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize("magic", NAMES)
def test_an_llmc_file_must_be_as_long_as_its_header_says(magic: int, tmp_path: Path) -> None:
    for changed, expected in (
        ({"w2": 9}, "its header says 9 tokens, it holds 3"),
        ({"w2": 2}, "bytes follow the 2 tokens"),
        ({"w2": -1}, "its header says -1 tokens"),
        ({"w2": 0}, "holds no tokens"),
        ({"w1": 5}, "version 5"),
        ({"w0": 20240522}, "an evaluation of llm.c"),
    ):
        path = write_llmc(tmp_path / "part.bin", [1, 2, 3], magic, **changed)
        assert expected in refuse(partial(open_one, path))
    path.write_bytes(write_llmc(path, [1, 2, 3], magic).read_bytes()[:1000])
    assert "cut off within the header" in refuse(lambda: open_one(path))


def test_few_ids_that_look_like_text_are_ids(tmp_path: Path) -> None:
    path = tmp_path / "val.bin"
    path.write_bytes(b"Once upon a time")
    assert open_one(path).n_tokens == 8


def test_the_first_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([0, 9, 10, 3, -1, 12], np.int64))
    source = open_one(path)
    (ids,) = source.read()
    assert "token 4 (counted from 0) is -1" in refuse(lambda: source.check_ids(ids, 13, 0))
    assert "token 1,002 (counted from 0) is 10" in refuse(lambda: source.check_ids(ids, 10, 1000))
    source.check_ids(ids[:4], 11, 0)
    source.check_ids(ids[:0], 1, 0)


def test_ids_above_int64_of_uint32_are_compared_right(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([1, 2**32 - 1], np.uint32))
    source = open_one(path)
    (ids,) = source.read()
    assert "is 4294967295" in refuse(lambda: source.check_ids(ids, 100_000, 0))


# ---- change -------------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\0")
    os.utime(path, ns=(1, 1))


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("change", [rewrite, cut])
def test_a_file_that_changes_is_noticed(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_arrays, "BLOCK_TOKENS", 20_000)
    path = write_nanogpt(tmp_path / "train.bin", list(range(60_000)))
    source = open_one(path)
    facts = source.scan(None)
    source.check_unchanged(facts)
    blocks = source.read()
    next(blocks)
    change(path)
    assert "changed while it was being read" in refuse(lambda: list(blocks))
    assert "changed while it was being read" in refuse(lambda: next(source.read()))
    assert "changed while it was being read" in refuse(lambda: source.check_unchanged(facts))


def test_a_file_that_goes_is_told(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", [1, 2])
    source = open_one(path)
    path.unlink()
    assert "No such file" in refuse(lambda: source.scan(None))


def test_a_signal_ends_the_scan(tmp_path: Path) -> None:
    source = open_one(write_nanogpt(tmp_path / "train.bin", [1, 2]))
    with StopFlag() as stop:
        stop.received = signal.SIGINT
        with pytest.raises(PreflightError) as caught:
            source.scan(stop)
    assert caught.value.code == ExitCode.SIGINT


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A sparse file of 4 GiB is read without its size in memory."""
    path = tmp_path / "train.bin"
    path.write_bytes(b"\0")
    os.truncate(path, 2**32)
    source = open_one(path)
    assert source.n_tokens == 2**31
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, block in zip(range(50), source.read(2**30), strict=False):
        source.check_ids(block, 1, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB


# ---- sizes --------------------------------------------------------------------------------------


def test_sizes_of_ids_add_up_to_the_text(tmp_path: Path) -> None:
    text = "Ünïcode 🙂 and plain text.\n" * 20
    for name in ("gpt2", "byte"):
        tokenizer = load_tokenizer(name)
        sizes = count_text_bytes(tokenizer)
        assert sizes.shape == (tokenizer.vocab_size,)
        assert sizes[tokenizer.end_of_text_id] == 0
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
