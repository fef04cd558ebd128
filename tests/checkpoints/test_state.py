"""``checkpoint.pt``: plain types only, and no pickle is ever executed."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.samples import (
    CONFIG,
    HOSTILE,
    load_all,
    make_state,
    make_weights,
    mutate,
    payloads,
    refused,
    rewrite_manifest,
    same,
    save,
    torch_bytes,
    zip_of,
)
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.state import estimate_state_bytes
from preflight.core.errors import ExitCode, PreflightError


def make_loop() -> list[Any]:
    looped: list[Any] = []
    looped.append(looped)
    return looped


@pytest.mark.parametrize(
    "bad",
    [
        lambda: {"x": object()},
        lambda: {"x": [1, {2: lambda: 0}]},
        lambda: {"x": {1, 2}},
        lambda: {"x": torch.ones(4, 3).t()},
        lambda: {"x": torch.ones(6)[3:]},
        lambda: {"x": torch.ones(6, dtype=torch.uint16)},
        lambda: {"x": torch.ones(6, requires_grad=True)},
        lambda: {"x": torch.nn.Parameter(torch.ones(6))},
        make_loop,
    ],
)
def test_state_that_cannot_be_read_back_is_not_saved(
    tmp_path: Path, bad: Callable[[], Any]
) -> None:
    with pytest.raises(TypeError, match=r"not a plain type|contains itself"):
        save_checkpoint(tmp_path, 5, make_weights(1), bad(), CONFIG, {})
    assert os.listdir(tmp_path) == []


def test_weights_only_folder_writes_text_but_resumes_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).path
    (folder / "checkpoint.pt").unlink()
    opened = store.open_checkpoint(str(folder))
    assert same(checkpoint_format.load_weights(opened), make_weights(5))
    assert store.find_best(tmp_path) == opened
    with refused(ExitCode.CHECKPOINT, "weights only"):
        checkpoint_format.load_training_state(opened)
    with refused(ExitCode.CHECKPOINT, "none of the"):
        store.find_newest(tmp_path)


@pytest.mark.parametrize(
    "where", ["checkpoint.pt", "model.safetensors", "bare", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("kind", sorted(payloads(Path("x"))))
def test_pickles_are_never_executed(tmp_path: Path, kind: str, where: str) -> None:
    mark = tmp_path / "executed"
    folder = save(tmp_path, 5).path
    raw = payloads(mark)[kind]
    if where == "bare":
        for name in (
            "x.pt",
            "x.pth",
            "x.ckpt",
            "x.safetensors",
            "x",
            "checkpoint.pt",
            "model.safetensors",
        ):
            (tmp_path / name).write_bytes(raw)
            with refused(ExitCode.CHECKPOINT, "is not a Preflight checkpoint"):
                load_all(tmp_path / name)
        (tmp_path / ".metadata").write_bytes(raw)  # a folder of torch's distributed checkpoints
        shutil.rmtree(tmp_path / "milestones")
        with refused(ExitCode.CHECKPOINT, "is not a Preflight checkpoint"):
            load_all(tmp_path)
    else:
        (folder / where).write_bytes(raw)
        if where != "manifest.json":
            rewrite_manifest(folder)
        with refused(ExitCode.CHECKPOINT, re.escape(where)):
            load_all(folder)
    assert not mark.exists()


def test_the_payloads_work(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for kind in ("os.system", "exec", "subprocess", "open", "torch.load inside"):
        torch.load(io.BytesIO(payloads(mark)[kind]), weights_only=False)
        assert mark.exists(), kind
        mark.unlink()


def make_bomb() -> list[Any]:
    """2^60 leaves for a reader that walks them all."""
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    return bomb


def make_shared() -> dict[str, Any]:
    moments = torch.ones(4, 3)
    return {"a": moments, "b": moments}


# What torch writes and reads back, and no training state holds.
FORGED_VALUES: dict[str, Callable[[], Any]] = {
    "no dict": lambda: [1],
    "loop": make_loop,
    "bomb": make_bomb,
    "flat tuple a million times": lambda: [tuple(range(1000))] * 1000,
    "set": lambda: {1, 2},
    "bytes": lambda: b"x",
    "complex": lambda: 1j,
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cuda"),
    "size": lambda: torch.Size([1]),
    "key that is a float": lambda: {1.5: 1},
    "key that is a bool": lambda: {True: 1},
    "key that is a tuple": lambda: {(1, 2): 1},
    "expanded to 10^12": lambda: torch.zeros(1).expand(10**12),
    "stride 0": lambda: torch.zeros(3).as_strided((4, 3), (0, 1)),
    "transposed": lambda: torch.ones(4, 3).t(),
    "overlapping": lambda: torch.ones(6).as_strided((4, 3), (1, 1)),
    "part of its memory": lambda: torch.ones(1000)[:3],
    "second half of its memory": lambda: torch.ones(6)[3:],
    "shared memory": make_shared,
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "gradient": lambda: torch.ones(3, requires_grad=True),
    "nan": lambda: torch.tensor([1.0, float("nan")]),
    "inf": lambda: torch.tensor([1.0, float("inf")]),
    "nan in bf16": lambda: torch.tensor([float("nan")], dtype=torch.bfloat16),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(10**9, device="meta"),
    "negated view": lambda: torch._neg_view(torch.ones(3)),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "bool tensor": lambda: torch.ones(3, dtype=torch.bool),
    "uint16": lambda: torch.ones(3, dtype=torch.uint16),
}
HONEST = torch_bytes({"x": torch.arange(4.0), "y": (1, 2.5, None)})


def repack(change: Callable[[dict[str, bytes]], Any], compression: int = 0) -> bytes:
    """The honest archive with its entries changed."""
    with zipfile.ZipFile(io.BytesIO(HONEST)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def replace_in_pickle(old: bytes, new: bytes) -> bytes:
    def change(entries: dict[str, bytes]) -> None:
        assert entries["archive/data.pkl"].count(old) == 1
        entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(old, new)

    return repack(change)


def use_pickle(content: bytes) -> bytes:
    return repack(lambda entries: entries.update({"archive/data.pkl": content}))


def name_one_entry_often() -> bytes:
    """A thousand names for the same bytes: a thousand times the file's size, uncompressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(10_000)}.items():
            archive.writestr(name, content)
        for number in range(1, 1000):
            item = copy.copy(archive.getinfo("a/data/0"))
            item.filename = f"a/data/{number}"
            archive.filelist.append(item)
    return buffer.getvalue()


def claim_directory(size: int) -> bytes:
    """An end of an archive whose directory has `size` bytes and a million entries."""
    return bytes(size) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 0, 0)


FOUR_FLOATS = b"K\x04tq\x07Q"  # 4 elements, end of the tuple of a storage
FORGED_FILES: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: repack(lambda entries: None, zipfile.ZIP_DEFLATED),
    "one entry deflated": lambda: zip_of(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED),
    "one entry often": name_one_entry_often,
    "directory of 5 MB": lambda: claim_directory(5 * 2**20),
    "pickle of 5 MB": lambda: use_pickle(b"\x80\x02}" + b"N0" * 2_500_000 + b"."),
    "no pickle": lambda: repack(lambda entries: entries.pop("archive/data.pkl")),
    "two pickles": lambda: repack(lambda entries: entries.update({"b/data.pkl": b"\x80\x02}."})),
    "no byte order": lambda: repack(lambda entries: entries.pop("archive/byteorder")),
    "big end first": lambda: repack(lambda entries: entries.update({"archive/byteorder": b"big"})),
    "no entry for a tensor": lambda: repack(lambda entries: entries.pop("archive/data/0")),
    "short entry": lambda: repack(lambda entries: entries.update({"archive/data/0": b"1234"})),
    "long entry": lambda: repack(lambda entries: entries.update({"archive/data/0": bytes(99)})),
    "wrong checksum": lambda: HONEST.replace(
        torch.arange(4.0).numpy().tobytes(), torch.ones(4).numpy().tobytes()
    ),
    "more elements": lambda: replace_in_pickle(FOUR_FLOATS, b"M\xa0\x0ftq\x07Q"),
    "2^70 elements": lambda: replace_in_pickle(
        FOUR_FLOATS, b"\x8a\x09" + (2**70).to_bytes(9, "little") + b"tq\x07Q"
    ),
    "fewer elements": lambda: replace_in_pickle(FOUR_FLOATS, b"K\x03tq\x07Q"),
    "elements as a float": lambda: replace_in_pickle(
        FOUR_FLOATS, b"G" + struct.pack(">d", 4.0) + b"tq\x07Q"
    ),
    "another type": lambda: replace_in_pickle(b"FloatStorage", b"DoubleStorage"),
    "unknown type": lambda: replace_in_pickle(b"FloatStorage", b"ObjectStorage"),
    "another module": lambda: replace_in_pickle(b"ctorch\n", b"cbuiltins\n"),
    "deep": lambda: use_pickle(b"\x80\x02" + b"]" * 9000 + b"a" * 8999 + b"."),
    "bytearray of 1 TB": lambda: use_pickle(b"\x80\x05\x96" + (2**40).to_bytes(8, "little")),
    "call of bytearray": lambda: use_pickle(
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    ),
    "text that ends early": lambda: use_pickle(b"\x80\x02X\xff\xff\xff\x7fx."),
    "stack underflow": lambda: use_pickle(b"\x80\x02u."),
    "not on the stack": lambda: use_pickle(b"\x80\x02."),
    "empty": lambda: b"",
    "text": lambda: b"PK\3\4 is not enough",
}


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("forged"), 5).path


def load_forged(folder: Path, raw: bytes) -> dict[str, Any]:
    (folder / "checkpoint.pt").write_bytes(raw)
    rewrite_manifest(folder)
    return checkpoint_format.load_training_state(store.open_checkpoint(str(folder)))


@pytest.mark.parametrize("kind", FORGED_VALUES)
def test_forged_values_are_refused(saved_folder: Path, kind: str) -> None:
    value = FORGED_VALUES[kind]()
    raw = torch_bytes(value if kind == "no dict" else {"x": value})
    with refused(ExitCode.CHECKPOINT, "not a training state"):
        load_forged(saved_folder, raw)


@pytest.mark.parametrize("kind", FORGED_FILES)
def test_forged_archives_are_refused(saved_folder: Path, kind: str) -> None:
    began = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(ExitCode.CHECKPOINT, "not a training state"):
        load_forged(saved_folder, FORGED_FILES[kind]())
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 1024


def test_the_honest_archive_is_read(saved_folder: Path) -> None:
    """As it is and repacked: what the tests above change is what is refused."""
    expected = {"x": torch.arange(4.0), "y": (1, 2.5, None)}
    for raw in (HONEST, repack(lambda entries: None)):
        assert same(load_forged(saved_folder, raw), expected)


@HOSTILE
@given(place=st.integers(0, 2**40), kind=st.sampled_from(["flip", "cut", "grow"]))
def test_mutated_state_with_a_true_hash(saved_folder: Path, place: int, kind: str) -> None:
    try:
        state = load_forged(saved_folder, mutate(torch_bytes(make_state(5)), kind, place))
    except PreflightError as error:
        assert error.code == ExitCode.CHECKPOINT
    else:
        estimate_state_bytes(state)  # plain types and whole tensors


@settings(max_examples=40)
@given(
    state=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False)
        | st.text(max_size=5)
        | st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64]).map(
            lambda dtype: torch.arange(6).to(dtype).reshape(2, 1, 3)
        ),
        lambda part: (
            st.lists(part)
            | st.lists(part).map(tuple)
            | st.dictionaries(st.text() | st.integers(), part)
        ),
    )
)
def test_what_is_saved_is_read_back(saved_folder: Path, state: Any) -> None:
    state = {"state": state, "empty": torch.empty(0, 3), "number": torch.tensor(2.0)}
    estimate_state_bytes(state)
    assert same(load_forged(saved_folder, torch_bytes(state)), state)
