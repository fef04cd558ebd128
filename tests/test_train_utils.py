"""Windows and batches: every window once, the same order from any cursor, faults noticed."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_utils
from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus import shard_reader
from preflight.corpus.build import prepare_data
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.corpus.windows import build_epoch, count_windows
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer
from train_utils import BatchLoader, iterate_windows

GPT2 = load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """About 9,000 tokens that differ from place to place, in shards of 1,024."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").write_text(" ".join(str(i * 7919 % 99991) for i in range(3500)))
    values = DataSettings(
        text_file=(str(folder / "text"),), data_dir=str(folder / "data"), shard_size=1024
    )
    return prepare_data(values, GPT2)


def read_all(data: DataFolder, split: str = "train") -> np.ndarray:
    return np.concatenate(list(getattr(data, split).open())).astype(np.int64)


def open_loader(data: DataFolder, **values: Any) -> BatchLoader:
    values = {"batch_size": 4, "context_length": 32, "seed": 1, "device": "cpu", **values}
    return BatchLoader(data, "train", **values)


def take_rows(data: DataFolder, n_batches: int, **values: Any) -> torch.Tensor:
    """(n, T + 1): the windows of the first batches."""
    rows = []
    with open_loader(data, **values) as loader:
        for _ in range(n_batches):
            inputs, targets = loader.next_batch()
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous()
            assert targets.is_contiguous()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            rows.append(torch.cat([inputs, targets[:, -1:]], 1))
    return torch.cat(rows)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=200)
def test_windows_fit_and_offsets_use_all_the_room(n_tokens: int, length: int, number: int) -> None:
    if n_tokens <= length:
        return
    n_windows = count_windows(n_tokens, length)
    epoch = build_epoch(n_tokens, length, 1, "f", number)
    assert 0 <= epoch.offset < length
    assert epoch.offset + n_windows * length + 1 <= n_tokens
    assert sorted(epoch.order) == list(range(n_windows))
    if n_windows > 1:  # no token is out of every epoch's reach for want of a window
        assert n_tokens - n_windows * length < 2 * length + 1


def test_order_is_fixed_for_ever() -> None:
    """A golden value: another NumPy, or another machine, must give the same order."""
    epoch = build_epoch(1000, 100, 42, "fingerprint", 3)
    assert (epoch.offset, epoch.order.tolist()) == (34, [4, 3, 1, 5, 8, 0, 6, 2, 7])


def test_an_epoch_covers_each_window_once_across_shard_borders(data: DataFolder) -> None:
    tokens, length = read_all(data), 32
    n_windows = count_windows(len(tokens), length)
    rows = take_rows(data, 2 * n_windows, batch_size=1)
    offsets = []
    for epoch in (rows[:n_windows], rows[n_windows:]):
        first = {tuple(row.tolist()) for row in epoch}
        assert len(first) == n_windows
        for offset in range(length):
            expected = {
                tuple(tokens[offset + i * length :][: length + 1].tolist())
                for i in range(n_windows)
            }
            if first == expected:
                offsets.append(offset)
    assert len(offsets) == 2
    assert offsets[0] != offsets[1]
    assert not torch.equal(rows[:n_windows], rows[n_windows:])


def test_batch_size_and_cursor_do_not_change_the_order(data: DataFolder) -> None:
    with open_loader(data) as loader:
        n_rows = loader.n_windows * 2 + 20
    whole = take_rows(data, n_rows, batch_size=1)
    for batch_size in (3, 7, loader.n_windows + 5):
        rows = take_rows(data, n_rows // batch_size, batch_size=batch_size)
        assert torch.equal(rows, whole[: len(rows)])
    for cursor in (1, 17, loader.n_windows - 1, loader.n_windows, loader.n_windows + 3):
        rows = take_rows(data, 5, batch_size=3, cursor=cursor)
        assert torch.equal(rows, whole[cursor : cursor + 15])


def test_cursor_counts_what_was_handed_out(data: DataFolder) -> None:
    with open_loader(data, cursor=5) as loader:
        loader.next_batch()
        loader.next_batch()
        assert loader.cursor == 13
        assert type(loader.cursor) is int


def test_seed_and_fingerprint_change_the_order(data: DataFolder) -> None:
    first = take_rows(data, 5)
    assert not torch.equal(first, take_rows(data, 5, seed=2))
    other = dataclasses.replace(data, fingerprint="0" * 64)
    assert not torch.equal(first, take_rows(other, 5))
    assert torch.equal(first, take_rows(data, 5))


def test_evaluation_windows_are_even_and_the_same_every_time(data: DataFolder) -> None:
    tokens = read_all(data, "val")
    available = count_windows(len(tokens), 8)
    starts = []
    for inputs, targets in iterate_windows(
        data, "val", batch_size=4, context_length=8, n_windows=6, device="cpu"
    ):
        for row in torch.cat([inputs, targets[:, -1:]], 1).numpy():
            matches = [s for s in range(len(tokens) - 8) if (tokens[s : s + 9] == row).all()]
            starts += [s // 8 for s in matches if s % 8 == 0][:1]
    assert starts == [i * available // 6 for i in range(6)]
    many = list(
        iterate_windows(data, "val", batch_size=4, context_length=8, n_windows=10**9, device="cpu")
    )
    assert sum(len(inputs) for inputs, _ in many) == available


# ---- faults -------------------------------------------------------------------------------------


def read_far(loader: BatchLoader, batch_size: int) -> None:
    """More chunks than are read ahead."""
    for _ in range(5 * train_utils._CHUNK_TOKENS // (batch_size * 33)):
        loader.next_batch()


def test_shard_cut_short_or_changed_while_in_use(data: DataFolder) -> None:
    path = data.train.shards[2].path
    content, status = path.read_bytes(), path.stat()
    with open_loader(data, batch_size=1, prefetch=1) as loader:
        loader.next_batch()
        os.truncate(path, 1000)
        with pytest.raises(PreflightError, match=path.name) as caught:
            read_far(loader, batch_size=1)
        assert caught.value.code == ExitCode.DATA
    with pytest.raises(PreflightError, match=r"changed|cut short"):
        list(
            iterate_windows(
                data, "train", batch_size=1, context_length=8, n_windows=9, device="cpu"
            )
        )
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    take_rows(data, 1)


def test_shard_rewritten_while_in_use_is_noticed(data: DataFolder) -> None:
    path = data.train.shards[0].path
    content, status = path.read_bytes(), path.stat()
    with open_loader(data, batch_size=64, prefetch=1) as loader:
        loader.next_batch()
        with open(path, "r+b") as file:
            file.write(content)  # of the same size
        with pytest.raises(PreflightError, match="changed while it was in use") as caught:
            read_far(loader, batch_size=64)
        assert caught.value.code == ExitCode.DATA
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_deleted_but_open_shards_keep_working(data: DataFolder) -> None:
    expected = take_rows(data, 600)
    with open_loader(data) as loader:
        aside = data.path / "aside"
        os.rename(data.path / "train", aside)
        rows = [loader.next_batch()[0] for _ in range(600)]
        os.rename(aside, data.path / "train")
    assert torch.equal(torch.cat(rows), expected[:, :-1])


def test_missing_shard(data: DataFolder) -> None:
    path = data.train.shards[1].path
    os.rename(path, path.with_suffix(".away"))
    try:
        with pytest.raises(PreflightError, match=path.name) as caught:
            open_loader(data)
        assert caught.value.code == ExitCode.DATA
    finally:
        os.rename(path.with_suffix(".away"), path)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_reader_maps_a_bounded_number_of_shards(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    expected = take_rows(data, 8)
    monkeypatch.setattr(shard_reader, "_MAX_OPENED", limit)
    opened = []
    real = np.load

    def load(*args: Any, **options: Any) -> np.ndarray:
        if len(opened) < 20 or len(opened) % 16 == 0:  # a look takes long
            maps = Path("/proc/self/maps").read_text()
            opened.append(len(set(re.findall(r"\S+/shard_\d+\.npy", maps))))
        else:
            opened.append(0)
        return real(*args, **options)

    monkeypatch.setattr(np, "load", load)
    assert len(data.train.shards) > 2 * limit
    assert torch.equal(take_rows(data, 8), expected)
    assert len(opened) > len(data.train.shards)
    assert max(opened) <= limit + 1  # and one that is on its way out


def test_id_beyond_the_vocabulary(data: DataFolder) -> None:
    small = dataclasses.replace(data, vocab_size=100)
    with pytest.raises(PreflightError, match="token id") as caught:
        take_rows(small, 1)
    assert caught.value.code == ExitCode.DATA


def test_failure_in_the_thread_reaches_the_caller(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(ShardReader, "read", fail)
    error: BaseException = LookupError("no more")
    with pytest.raises(PreflightError, match="LookupError: no more") as caught:
        take_rows(data, 1)
    assert caught.value.code == ExitCode.WORKER_LOST
    error = MemoryError()  # which has an exit code of its own
    with pytest.raises(MemoryError):
        take_rows(data, 1)


def test_dead_thread_is_noticed_within_seconds(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_utils._RowsAhead, "_read_ahead", lambda self, cursor: None)
    began = time.monotonic()
    with pytest.raises(PreflightError) as caught:
        take_rows(data, 1)
    assert caught.value.code == ExitCode.WORKER_LOST
    assert time.monotonic() - began < 5


def test_close_ends_the_thread(data: DataFolder) -> None:
    loader = open_loader(data)
    loader.next_batch()
    loader.close()
    assert not loader._rows._thread.is_alive()  # type: ignore[attr-defined]


@pytest.mark.cuda
def test_batches_on_cuda_equal_those_on_cpu(data: DataFolder) -> None:
    assert torch.equal(take_rows(data, 50), take_rows(data, 50, device="cuda").cpu())


def test_path_of_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        load_data_folder(tmp_path / "none", GPT2)
    assert caught.value.code == ExitCode.DATA


# ---- splits that are shorter than a window ------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "one two three four. Five six seven eight. Nine ten.",
        "a b",
        pytest.param("ab", marks=pytest.mark.slow),
    ],
)
def test_a_short_text_is_one_window_of_its_own_length(tmp_path: Path, text: str) -> None:
    (tmp_path / "text").write_text(text)
    values = DataSettings(text_file=(str(tmp_path / "text"),), data_dir=str(tmp_path / "data"))
    short = prepare_data(values, GPT2)
    for split in ("train", "val"):
        ids = read_all(short, split)
        assert len(ids) < 64
        batches = iterate_windows(
            short, split, batch_size=3, context_length=64, n_windows=9, device="cpu"
        )
        ((inputs, targets),) = list(batches)
        assert inputs.tolist() == [ids[:-1].tolist()]
        assert targets.tolist() == [ids[1:].tolist()]
    rows = take_rows(short, 3, context_length=64)
    assert rows.tolist() == [read_all(short).tolist()] * 12


def test_only_a_text_without_two_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a")
    values = DataSettings(text_file=(str(tmp_path / "text"),), data_dir=str(tmp_path / "data"))
    with pytest.raises(PreflightError, match="too short") as caught:
        prepare_data(values, GPT2)
    assert caught.value.code == ExitCode.TEXT
    assert not (tmp_path / "data" / "metadata.json").exists()
