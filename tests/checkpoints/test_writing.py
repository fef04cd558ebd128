"""Saves that are killed, that meet a full or failing disk, or that the power cut may undo."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.samples import (
    CONFIG,
    FILE_NAMES,
    ROOT,
    SYSTEM_CALLS,
    FakeTokenizer,
    find_durability_faults,
    load_all,
    make_state,
    make_weights,
    refused,
    same,
    save,
)
from checkpoints.thread_ranks import run_ranks
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store, tensor_file, writing
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.tensor_file import TensorFile
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_never_saved(tmp_path: Path, value: float) -> None:
    weights = make_weights(1)
    weights["wte.weight"][3, 2] = value
    with refused(ExitCode.DIVERGED, "wte.weight"):
        save_checkpoint(tmp_path, 5, weights, {}, CONFIG, {})
    with pytest.raises(ValueError, match="int64"):
        save_checkpoint(tmp_path, 5, {"x": torch.tensor([1])}, {}, CONFIG, {})
    assert os.listdir(tmp_path) == []


def run_killed(action: Callable[[], Any], point: int) -> bool:
    """Run `action` in a forked process, killed at its n-th system call: before it, or after it
    where `point` is odd. True when the process ended by itself."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFEXITED(status)
    try:
        torch.set_num_threads(1)
        numbers = itertools.count(1)

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                number = next(numbers)  # of this call, also where another thread calls
                if point == 2 * number:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if point == 2 * number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        for name in SYSTEM_CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        tensor_file._write_at = wrap(tensor_file._write_at)
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def find_unrecoverable_points(
    tmp_path: Path, prepare: Callable[[Path], Any], action: Callable[[Path], Any]
) -> tuple[int, list[int]]:
    """The kill points passed, and those after which no intact checkpoint was found."""
    bad: list[int] = []
    prepare(tmp_path / "before")
    for point in range(2, 1000):
        output_dir = tmp_path / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(tmp_path / "before", output_dir)
        done = run_killed(lambda place=output_dir: action(place), point)
        checkpoint_format.forget_verified()
        try:
            store.remove_leftovers(output_dir)
            found, damaged = store.scan_checkpoints(output_dir)
            assert found
            assert not damaged
            for each in found:
                checkpoint_format.verify_checkpoint(each)
                assert any(
                    same(checkpoint_format.load_weights(each), make_weights(seed))
                    for seed in (each.step, 77)
                )
            assert not list(output_dir.rglob(".tmp-*"))
        except (PreflightError, AssertionError):
            bad.append(point)
        if done or len(bad) > 5:
            return point, bad
    raise AssertionError("the save never ended")


def prepare_two(output_dir: Path) -> None:
    output_dir.mkdir()
    save(output_dir, 1, val_loss=2.0)
    save(output_dir, 2)


def save_and_rotate(output_dir: Path) -> None:
    new = save(output_dir, 3)
    checkpoint_format.record_validation(new, 1.0)
    store.retire_checkpoints(output_dir, 1)


def test_kill_at_every_point_of_save_and_rotation(tmp_path: Path) -> None:
    points, bad = find_unrecoverable_points(tmp_path, prepare_two, save_and_rotate)
    assert points > 50
    assert bad == []


def test_kill_at_every_point_of_replacing_the_only_one(tmp_path: Path) -> None:
    def prepare(output_dir: Path) -> None:
        output_dir.mkdir()
        save(output_dir, 5)

    points, bad = find_unrecoverable_points(
        tmp_path, prepare, lambda output_dir: save(output_dir, 5, seed=77)
    )
    assert points > 30
    assert bad == []


def test_kill_at_every_point_of_a_save_by_two_ranks(tmp_path: Path) -> None:
    """Whichever of them is at work: the threads share their process."""

    def save_together(output_dir: Path) -> None:
        results = run_ranks(2, lambda ranks: save(output_dir, 3, ranks=ranks))
        assert [saved.step for saved in results] == [3, 3]

    points, bad = find_unrecoverable_points(tmp_path, prepare_two, save_together)
    assert points > 50
    assert bad == []


def test_kill_points_find_a_saver_without_rename(tmp_path: Path) -> None:
    """The check of the checks: written in place, as many tools do, it is caught."""

    @contextlib.contextmanager
    def in_place(folder: Path, size_bytes: int = 0) -> Iterator[Path]:
        folder.mkdir()
        yield folder

    def broken(output_dir: Path) -> None:
        storage.publish_folder = in_place  # in the forked child only
        save_and_rotate(output_dir)

    _, bad = find_unrecoverable_points(tmp_path, prepare_two, broken)
    assert len(bad) > 5


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_every_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import errno

    output_dir = tmp_path / "run"
    prepare_two(output_dir)
    for point in range(1, 1000):
        count = 0
        with monkeypatch.context() as patch:

            def wrap(call: Callable[..., Any], stop: int = point) -> Callable[..., Any]:
                def counted(*arguments: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == stop:
                        number = getattr(errno, code)
                        raise OSError(number, os.strerror(number))
                    return call(*arguments, **options)

                return counted

            for name in SYSTEM_CALLS:
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                save(output_dir, 3)
            except PreflightError as error:
                assert error.code == ExitCode.STORAGE
                assert "checkpoint-3" in str(error) or "milestones" in str(error)
        if count < point:
            break
        steps = [c.step for c in store.list_checkpoints(output_dir)]
        assert steps in ([2, 1], [3, 2, 1])
        store.remove_leftovers(output_dir)
        shutil.rmtree(output_dir / "milestones" / "checkpoint-3", ignore_errors=True)
    assert point > 10
    load_all(save(output_dir, 3).path)


@pytest.mark.parametrize("limit", [0, 1, 100, 340, 400, 4096, 5000])
def test_file_size_limit_cuts_writes_short(tmp_path: Path, limit: int) -> None:
    """A short write, then EFBIG: the pattern of a disk that fills up in the middle of a file."""
    prepare_two(tmp_path / "run")

    def save_limited() -> None:
        storage.reserve_bytes = lambda file, size: None  # so that the write itself fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with refused(ExitCode.STORAGE, "File too large"):
            save(tmp_path / "run", 3)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            save_limited()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(os.listdir(tmp_path / "run" / "milestones")) == ["checkpoint-1", "checkpoint-2"]


def test_torch_never_hides_the_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fail(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        write = fail

    real = writing.HashingFile.__init__
    monkeypatch.setattr(writing.HashingFile, "__init__", lambda self, file: real(self, Full()))
    with refused(ExitCode.STORAGE, r"checkpoint-5: No space left on device\n.*bytes missing"):
        save(tmp_path, 5)
    with pytest.raises(Exception, match=r"No space|unexpected pos"):
        torch.save(make_state(1), Full())


def test_too_little_room_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with refused(ExitCode.STORAGE, r"checkpoint-5: No space left.*\n.*[\d,]{7,} bytes missing"):
        save(tmp_path, 5)
    assert os.listdir(tmp_path / "milestones") == ["checkpoint-4"]


@pytest.mark.parametrize("name", [*FILE_NAMES, "manifest.json", "vocab.txt"])
def test_disk_that_lies_is_caught_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, real_compare = writing.FolderWriter.read_back, TensorFile._is_written

    def change(path: Path) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    def read_back_changed(self: writing.FolderWriter) -> None:
        change(self.folder / name)
        real(self)

    def compare_changed(self: TensorFile, file: Any) -> bool:
        if self.name == name:
            change(Path(file.name))
        return real_compare(self, file)

    monkeypatch.setattr(writing.FolderWriter, "read_back", read_back_changed)
    monkeypatch.setattr(TensorFile, "_is_written", compare_changed)
    with refused(ExitCode.STORAGE, f"{name} differs from what was written"):
        save(tmp_path, 5, tokenizer=FakeTokenizer())
    assert os.listdir(tmp_path / "milestones") == []


def test_output_folder_that_vanished_or_became_a_link(tmp_path: Path) -> None:
    with refused(ExitCode.STORAGE, "is gone"):
        save(tmp_path / "gone", 5)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "milestones").symlink_to(tmp_path / "elsewhere")
    with refused(ExitCode.STORAGE, "milestones is a link"):
        save(tmp_path / "run", 5)
    assert os.listdir(tmp_path / "elsewhere") == []


AUDITED = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from checkpoints.samples import FakeTokenizer, save
from preflight.checkpoints import format as checkpoint_format, store
out = Path({out!r})
for step in (1, 2, 3, 3):
    new = save(out, step, tokenizer=FakeTokenizer())
    checkpoint_format.record_validation(new, 9.0 - step)
    store.retire_checkpoints(out, 1)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_rename_is_durable(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    code = AUDITED.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(output_dir))
    calls = "write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2"
    log = tmp_path / "log"
    subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "--seccomp-bpf",
            "-s",
            "8",
            "-o",
            log,
            "-e",
            f"trace={calls}",
            sys.executable,
            "-c",
            code,
        ],
        check=True,
        timeout=120,
    )
    lines = log.read_text(errors="replace").splitlines()
    renames, faults = find_durability_faults(lines, str(output_dir))
    assert renames >= 10  # three saves, a replacement, four validations, two retirements
    assert faults == []
    without = [line for line in lines if "fsync(" not in line]
    assert len(find_durability_faults(without, str(output_dir))[1]) > 10
