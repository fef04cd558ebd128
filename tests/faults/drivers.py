"""What the fork server runs: Preflight's own command line, made light for thousands of starts.

A vocabulary of 257 ids (the bytes and an end-of-text id) stands in for GPT-2's 50,257, and the
loss curve is not drawn, though it is still published. All else is the product.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch._dynamo  # an optimizer loads it at its first use: once here, not in every case
from checkpoints.samples import CONFIG, FakeTokenizer
from matplotlib.figure import Figure

import main
import train_utils
from preflight.checkpoints.rows import Rows, split_rows
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import retire_checkpoints
from preflight.core import locks, storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus import build
from preflight.corpus.shard_reader import ShardReader
from preflight.device.ranks import JoinedRanks, Ranks, is_lost_rank
from preflight.modes import setup
from preflight.settings import RunConfig
from preflight.settings.kinds import SOURCES
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import GPT2_PATTERN
from preflight.training import saving
from trainer import Trainer

# Here, since a process without rights may not be able to read the files of Python.
for _name in SOURCES.names():
    SOURCES.load(_name)


@functools.cache
def build_byte_tokenizer() -> TiktokenTokenizer:
    """One id per byte."""
    return TiktokenTokenizer(
        tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    )


def lighten() -> None:
    """Make a forked process cheap; the calls on the disk stay those of the product."""
    torch.set_num_threads(1)
    tokenizer = build_byte_tokenizer()
    setup.choose_tokenizer = lambda settings: tokenizer
    train_utils._POLL_SECONDS = 0.01  # else closing a loader waits half a second
    train_utils._CHUNK_TOKENS = 4096  # so that reading ahead does not pass all epoch ends at once
    Figure.savefig = lambda self, file, **options: file.write(b"\x89PNG")  # type: ignore


def run_main(argv: list[str]) -> int:
    """The whole command line."""
    return main.main(argv)


def run_preparation(argv: list[str]) -> int:
    """The command line of `--train` up to the prepared data folder."""

    def prepare_only(mode: str, config: RunConfig) -> int:
        with StopFlag() as stop:
            build.prepare_data(config.data, build_byte_tokenizer(), stop)
        return ExitCode.DONE

    main.run_mode = prepare_only
    return main.main(argv)


def run_stopped(argv: list[str], step: int) -> int:
    """The whole command line; SIGTERM comes at the end of update `step`."""
    original = Trainer.train_step

    def stopping(self: Trainer, number: int, batches: Any) -> Any:
        result = original(self, number, batches)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Trainer.train_step = stopping  # type: ignore[method-assign]
    return main.main(argv)


def run_limited(argv: list[str], limit_bytes: int) -> int:
    """The whole command line, with files of at most `limit_bytes`: a short write, then EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    return main.main(argv)


def run_closed(argv: list[str], numbers: list[int]) -> int:
    """The whole command line without some of the standard streams, as after ``2>&-``."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    return main.main(argv)


def run_ignoring(argv: list[str]) -> int:
    """The whole command line with signals ignored from before its start, as after ``nohup``."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    return main.main(argv)


def run_cramped(argv: list[str]) -> int:
    """The whole command line with few open files, an odd umask, and neither home nor locale."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    os.umask(0o077)
    for name in ("HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR"):
        os.environ.pop(name, None)
    return main.main(argv)


def run_on_small_disk(argv: list[str], disk: str, size_kib: int, result: str) -> int:
    """The command line on a tmpfs of that size at `disk`, then once more on a larger one.

    What is there at the end is copied to `result`, since the file system ends with this process.
    """
    mount_privately(disk, f"size={size_kib}k")
    first = main.main(argv)
    print(f"first exit code {first}", file=sys.stderr)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    second = main.main(argv)
    shutil.copytree(disk, result)
    return second


def run_on_read_only_disk(argv: list[str], disk: str) -> int:
    """The command line with a read-only file system at `disk`."""
    mount_privately(disk, "ro")
    return main.main(argv)


def mount_privately(place: str, options: str) -> None:
    """A tmpfs that no other process sees; without root, in a user namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_namespace | (new_user if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)


def run_after_go(folder: str, go: str, release: str) -> int:
    """Take a run's lock in the way and order of `--train`, and hold it until `release`."""
    wait_for_file(go)

    def hold(mode: str, config: RunConfig) -> int:
        output_dir = Path(folder)
        storage.make_folder(output_dir)
        with StopFlag(), locks.FolderLock(output_dir):
            storage.check_writable(output_dir)
            wait_for_file(release)
        return ExitCode.DONE

    main.run_mode = hold
    return main.main(["--train"])


def save_as_rank(rank: int, world: int, port: int, output_dir: str, steps: list[int]) -> int:
    """With the others, save the checkpoints of `steps`, and retire all but the last."""
    torch.manual_seed(0)
    ranks: Ranks = Ranks()
    if world > 1:
        store = torch.distributed.TCPStore("127.0.0.1", port)
        ranks = JoinedRanks(store, rank, world)
    weights = {"wide": torch.randn(37, 11), "few": torch.randn(1, 400)}
    moments = {f"{name}.exp_avg": tensor * 2 for name, tensor in weights.items()}

    def take(tensors: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor | Rows]:
        mine = {name: split_rows(len(tensor), rank, world) for name, tensor in tensors.items()}
        return {
            name: Rows(tensor[mine[name]] * step, tuple(tensor.shape), mine[name].start)
            for name, tensor in tensors.items()
        }

    try:
        for step in steps:
            save_checkpoint(
                Path(output_dir),
                step,
                take(weights, step),
                {"step": step},
                CONFIG,
                {"val_loss": None},
                FakeTokenizer(),
                optimizer=take(moments, step),
                ranks=ranks,
            )
        ranks.decide(lambda: retire_checkpoints(Path(output_dir), 1))
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        return ExitCode.WORKER_LOST
    return ExitCode.DONE


def wait_for_file(path: str) -> None:
    """Until there is one."""
    while not os.path.exists(path):
        time.sleep(0.001)


# ---- what goes wrong in the middle of a run -----------------------------------------------------


def fail_at_step(step: int, error: BaseException) -> None:
    """A training step that raises."""
    original = Trainer.train_step

    def failing(self: Trainer, number: int, batches: Any) -> Any:
        if number == step:
            raise error
        return original(self, number, batches)

    Trainer.train_step = failing  # type: ignore[method-assign]


def end_reading_thread(error: type[BaseException] = SystemExit) -> None:
    """The thread that reads the data ends in the middle, by default without a word."""
    original = ShardReader.read
    count = 0

    def read(self: Any, starts: Any, length: int) -> Any:
        nonlocal count
        count += 1
        if threading.current_thread() is not threading.main_thread() and count > 2:
            raise error
        return original(self, starts, length)

    ShardReader.read = read  # type: ignore[method-assign]
    train_utils._CHUNK_TOKENS = 128


def cut_shard_after_check() -> None:
    """A shard of the training part is cut short right after it was found unchanged."""
    original = ShardReader.check_unchanged
    count = 0

    def check(self: Any, indices: Any) -> None:
        nonlocal count
        count += 1
        original(self, indices)
        if threading.current_thread() is not threading.main_thread() and count > 12:
            os.truncate(self._shards[0].path, 1000)

    ShardReader.check_unchanged = check  # type: ignore[method-assign]
    train_utils._CHUNK_TOKENS = 128


def make_clock_jump() -> None:
    """Ten years back and forth at each look at the clock."""
    real, jumps = time.time, itertools.cycle((-1, 1))
    time.time = lambda: real() + next(jumps) * 10 * 365 * 86400  # type: ignore[assignment]


def make_gradients_infinite() -> None:
    """From update 3 on the gradient's norm is not finite."""
    original = torch.nn.utils.get_total_norm
    count = 0

    def measure(gradients: Any) -> Any:
        nonlocal count
        count += 1
        norm = original(gradients)
        return norm * math.nan if count > 3 else norm

    torch.nn.utils.get_total_norm = measure  # type: ignore[assignment]


# ---- deliberately broken products, for the checks of the checks ---------------------------------


def break_publishing() -> None:
    """Writers that put their content under the final name at once, as many tools do."""

    @contextlib.contextmanager
    def in_place(path: Path, size_bytes: int = 0) -> Iterator[Any]:
        with open(path, "wb") as file:
            yield file

    @contextlib.contextmanager
    def folder_in_place(folder: Path, size_bytes: int = 0) -> Iterator[Path]:
        folder.mkdir()
        yield folder

    storage.publish_folder = folder_in_place
    for module in list(sys.modules.values()):
        if getattr(module, "publish_file", None) is storage.publish_file and module is not storage:
            module.publish_file = in_place  # type: ignore[attr-defined]
    storage.publish_file = in_place


def break_locks() -> None:
    """A lock that is a file with a process id, looked for and then written."""

    class PidFile:
        def __init__(self, folder: Path, *, shared: bool = False) -> None:
            path = folder / "pid"
            if path.exists():
                raise PreflightError(ExitCode.LOCKED, "in use")
            time.sleep(0.002)
            path.write_text(str(os.getpid()))

        def __enter__(self) -> PidFile:
            return self

        def __exit__(self, *unused: object) -> None:
            return None

    locks.FolderLock = PidFile  # type: ignore[assignment,misc]


def break_resuming() -> None:
    """A trainer that forgets the optimizer's state."""
    torch.optim.AdamW.load_state_dict = lambda self, state: None  # type: ignore


def break_saving() -> None:
    """A run that leaves on a signal, with the right code, and without what it was to save."""
    saving.CheckpointSaver.save = lambda self: None  # type: ignore[method-assign]


BREAKS = {
    "saving": break_saving,
    "publishing": break_publishing,
    "locks": break_locks,
    "resuming": break_resuming,
    "reading thread": end_reading_thread,
    "reading thread's memory": functools.partial(end_reading_thread, MemoryError),
    "shard": cut_shard_after_check,
    "clock": make_clock_jump,
    "gradients": make_gradients_infinite,
    "device memory": lambda: fail_at_step(
        3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    ),
    "host memory": lambda: fail_at_step(3, MemoryError()),
}
DRIVERS = {
    "main": run_main,
    "preparation": run_preparation,
    "stopped": run_stopped,
    "limited": run_limited,
    "closed": run_closed,
    "ignoring": run_ignoring,
    "cramped": run_cramped,
    "small disk": run_on_small_disk,
    "read-only disk": run_on_read_only_disk,
    "lock": run_after_go,
    "rank save": save_as_rank,
}
