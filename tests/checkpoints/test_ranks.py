"""Checkpoints that several ranks write and read together: threads, and processes joined by gloo."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.samples import CONFIG, FakeTokenizer, make_state, same
from checkpoints.thread_ranks import run_ranks
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store, tensor_file
from preflight.checkpoints.format import Checkpoint, load_optimizer, load_weights
from preflight.checkpoints.ranks import Ranks
from preflight.checkpoints.rows import Rows, split_rows
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError

CHUNK_BYTES = 1024


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Rows that no number of ranks divides, fewer rows than ranks, and none."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "wide.weight": torch.randn(37, 11, generator=generator),
        "few.weight": torch.randn(2, 400, generator=generator),
        "bias": torch.randn(101, generator=generator),
        "half.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
    }


def make_moments(seed: int) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.exp_avg": t for name, t in make_tensors(seed + 1).items()}
    return tensors | {"bias.step": torch.tensor(float(seed)), "bias.count": torch.tensor([seed])}


def shard(tensors: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor | Rows]:
    """What a rank holds of them: as FSDP2 does, `torch.chunk` of those that have dimensions."""
    held: dict[str, torch.Tensor | Rows] = {}
    for name, tensor in tensors.items():
        if not tensor.dim() or ranks.world == 1:
            held[name] = tensor
            continue
        chunks = [*tensor.chunk(ranks.world), *[tensor[:0]] * ranks.world]
        first = sum(map(len, chunks[: ranks.rank]))
        held[name] = Rows(chunks[ranks.rank].clone(), tuple(tensor.shape), first)
    return held


def save(output_dir: Path, step: int, ranks: Ranks) -> Checkpoint:
    return save_checkpoint(
        output_dir,
        step,
        shard(make_tensors(step), ranks),
        make_state(step),
        CONFIG,
        {"val_loss": None},
        FakeTokenizer(),
        optimizer=shard(make_moments(step), ranks),
        ranks=ranks,
    )


def save_with(output_dir: Path, step: int, world: int) -> list[Any]:
    output_dir.mkdir(exist_ok=True)
    return run_ranks(world, lambda ranks: save(output_dir, step, ranks))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small files have several."""
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", CHUNK_BYTES)


def test_the_files_are_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    (one,) = save_with(tmp_path / "1", 5, 1)
    expected = read_files(one.path)
    assert len(expected["model.safetensors"]) > 3 * CHUNK_BYTES
    assert same(load_weights(one), make_tensors(5))
    assert same(load_optimizer(one), make_moments(5))
    for world in (2, 3, 4, 5):
        saved = save_with(tmp_path / str(world), 5, world)
        assert [each.step for each in saved] == [5] * world
        assert read_files(saved[0].path) == expected, world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_rank_reads_its_rows(tmp_path: Path, world: int) -> None:
    folder = save_with(tmp_path, 5, 3)[0].path
    checkpoint_format.forget_verified()

    def read(ranks: Ranks) -> dict[str, torch.Tensor]:
        opened = checkpoint_format.read_checkpoint(folder)
        checkpoint_format.verify_checkpoint(opened, ranks=ranks)
        parts = {}
        for load, whole in ((load_weights, make_tensors(5)), (load_optimizer, make_moments(5))):
            sized = {name: len(tensor) for name, tensor in whole.items() if tensor.dim()}
            rows = {n: split_rows(size, ranks.rank, ranks.world) for n, size in sized.items()}
            parts |= load(opened, rows=rows)
        return parts

    parts = run_ranks(world, read)
    for name, tensor in (make_tensors(5) | make_moments(5)).items():
        read_back = [part[name] for part in parts]
        whole = torch.cat(read_back) if tensor.dim() else read_back[-1]
        assert same(whole, tensor), name
        assert all(len(part) <= -(-len(tensor) // world) for part in read_back if tensor.dim())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_flipped_bit_is_found_by_every_rank(tmp_path: Path, world: int) -> None:
    folder = save_with(tmp_path, 5, 2)[0].path

    def verify(ranks: Ranks) -> None:
        checkpoint_format.verify_checkpoint(checkpoint_format.read_checkpoint(folder), ranks=ranks)

    assert run_ranks(world, verify) == [None] * world
    for name, raw in read_files(folder).items():
        for at in range(0, len(raw), max(1, len(raw) // 6)):
            flipped = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
            (folder / name).write_bytes(flipped)
            checkpoint_format.forget_verified()
            errors = run_ranks(world, verify)
            assert {type(error) for error in errors} == {PreflightError}, (name, at)
            assert {error.code for error in errors} == {ExitCode.CHECKPOINT}
            assert len({str(error) for error in errors}) == 1
            assert name in str(errors[0])
        (folder / name).write_bytes(raw)


def test_a_share_of_the_chunks_is_read_by_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage is seen by one rank, and told by all."""
    folder = save_with(tmp_path, 5, 1)[0].path
    sizes: list[int] = []
    real = checkpoint_format.hash_together.__globals__["hash_chunks"]

    def counted(file: Any, chunk_bytes: int, ranks: Ranks) -> list[bytes]:
        digests: list[bytes] = real(file, chunk_bytes, ranks)
        sizes.append(len(digests))
        return digests

    monkeypatch.setitem(checkpoint_format.hash_together.__globals__, "hash_chunks", counted)
    checkpoint_format.forget_verified()
    checkpoint = checkpoint_format.read_checkpoint(folder)
    run_ranks(3, lambda ranks: checkpoint.verify_together("model.safetensors", ranks))
    n_chunks = -(-(folder / "model.safetensors").stat().st_size // CHUNK_BYTES)
    assert sum(sizes) == n_chunks
    assert max(sizes) <= -(-n_chunks // 3)


class Forgetful(set[Any]):
    """Holds nothing."""

    def __contains__(self, item: object) -> bool:
        return False


def test_ranks_find_the_newest_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is hashed once; what one rank finds damaged or refuses, none uses."""
    for step in (1, 2, 3):
        folder = save_with(tmp_path, step, 2)[0].path
    hashed: list[int] = []
    real = checkpoint_format.hash_together.__globals__["hash_chunks"]

    def counted(file: Any, chunk_bytes: int, ranks: Ranks) -> list[bytes]:
        digests: list[bytes] = real(file, chunk_bytes, ranks)
        hashed.append(len(digests))
        return digests

    monkeypatch.setitem(checkpoint_format.hash_together.__globals__, "hash_chunks", counted)
    monkeypatch.setattr(checkpoint_format, "_verified", Forgetful())  # the threads share it
    found = run_ranks(3, lambda ranks: store.find_newest(tmp_path, ranks=ranks))
    assert [each.step for each in found] == [3] * 3
    sizes = [(folder / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")]
    assert sum(hashed) == sum(-(-size // CHUNK_BYTES) for size in sizes)

    def refuse(ranks: Ranks) -> Checkpoint | None:
        def check(checkpoint: Checkpoint) -> None:
            if (ranks.rank, checkpoint.step) == (1, 3):
                raise PreflightError(ExitCode.CHECKPOINT, "these rows are not finite")

        return store.find_newest(tmp_path, check, ranks)

    assert [each.step for each in run_ranks(3, refuse)] == [2] * 3
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    found = run_ranks(3, lambda ranks: store.find_newest(tmp_path, ranks=ranks))
    assert [each.step for each in found] == [2] * 3


def expect_all(errors: list[Any], code: ExitCode, text: str) -> None:
    assert {getattr(error, "code", error) for error in errors} == {code}
    assert len({str(error) for error in errors}) == 1
    assert text in str(errors[0])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("failing", ["write", "fsync", "read back", "create"])
def test_a_full_or_failing_disk_on_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, rank: int, failing: str
) -> None:
    save_with(tmp_path, 4, 2)
    before = read_files(tmp_path / "milestones" / "checkpoint-4")
    guilty = threading.local()

    def fail(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if getattr(guilty, "here", False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return call

    if failing == "write":
        monkeypatch.setattr(tensor_file, "_write_at", fail(tensor_file._write_at))
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail(os.fsync))
    elif failing == "create":
        monkeypatch.setattr(os, "posix_fallocate", fail(os.posix_fallocate))
    else:
        monkeypatch.setattr(
            tensor_file.TensorFile,
            "_is_written",
            lambda self, file: not getattr(guilty, "here", False),
        )

    def save_marked(ranks: Ranks) -> Checkpoint:
        guilty.here = ranks.rank == rank
        return save(tmp_path, 5, ranks)

    if failing == "create" and rank:
        assert all(isinstance(c, Checkpoint) for c in run_ranks(world, save_marked))
        return  # rank 0 alone reserves the space
    errors = run_ranks(world, save_marked)
    told = "differs from what was written" if failing == "read back" else "No space left"
    expect_all(errors, ExitCode.STORAGE, told)
    assert os.listdir(tmp_path / "milestones") == ["checkpoint-4"]
    assert read_files(tmp_path / "milestones" / "checkpoint-4") == before


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    def save_bad(ranks: Ranks) -> Checkpoint:
        weights = shard(make_tensors(5), ranks)
        part = weights["bias"]
        assert isinstance(part, Rows)
        if ranks.rank == 1:
            part.values[3] = float("nan")
        return save_checkpoint(tmp_path, 5, weights, {}, CONFIG, {}, ranks=ranks)

    expect_all(run_ranks(3, save_bad), ExitCode.DIVERGED, "weights bias are not finite")

    def save_unknown(ranks: Ranks) -> Checkpoint:
        state: Any = {"x": object() if ranks.rank == 2 else 1}
        weights = shard(make_tensors(5), ranks)
        return save_checkpoint(tmp_path, 5, weights, state, CONFIG, {}, ranks=ranks)

    errors = run_ranks(3, save_unknown)
    assert isinstance(errors[2], TypeError)
    expect_all(errors[:2], ExitCode.INTERNAL, "rank 2 failed: TypeError")
    assert os.listdir(tmp_path) == []


def test_the_store_does_not_ask_how_many_ranks_wrote(tmp_path: Path) -> None:
    """Listing, finding, recording and rotation."""
    for step in (1, 2, 3):
        saved = save_with(tmp_path, step, 3)[0]
    checkpoint_format.record_validation(saved, 1.5)
    checkpoint_format.forget_verified()
    newest = store.find_newest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.val_loss) == (3, 1.5)
    assert same(load_weights(newest), make_tensors(3))
    retired = store.retire_checkpoints(tmp_path, 1)
    assert [path.name for path in retired] == ["checkpoint-1", "checkpoint-2"]
