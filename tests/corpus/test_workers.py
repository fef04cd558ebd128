"""Worker processes: shielded from a terminal's signals, and done without where there are none."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest

from preflight.corpus import workers
from preflight.corpus.blocks import Block, Piece
from preflight.corpus.workers import Encoders
from preflight.tokenization import load_tokenizer

GPT2 = load_tokenizer("gpt2")


def build_item() -> tuple[int, Block]:
    return 0, Block([Piece(b"one two", "train", 7, ends=True)], (1, 0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the files of GPT2."""
    GPT2.save(tmp_path)
    return tmp_path


def test_a_worker_is_shielded_while_it_starts(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoders = Encoders(GPT2, 1, saved)
    try:
        future = encoders._submit(build_item())
        assert future is not None
        assert encoders._pool is not None
        [pid] = encoders._pool._processes
        while not future.done():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
            time.sleep(0.001)
        assert len(future.result()) == 1
    finally:
        encoders.close()
    assert capfd.readouterr().err == ""


def encode(encoders: Encoders) -> list[int]:
    items = [build_item() for _ in range(3)]
    return [int(i) for _, encoded, _ in encoders.encode(iter(items)) for i in encoded.ids]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), ImportError("no sem_open")])
def test_without_semaphores_this_process_does_the_work(
    error: Exception, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is one file in /dev/shm, which may be full, or not be there."""

    def fail(*unused: object, **also: object) -> NoReturn:
        raise error

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)
    monkeypatch.setattr(workers.log, "propagate", True)
    with caplog.at_level("INFO", logger="preflight"):
        encoders = Encoders(GPT2, 2, saved)
    assert encode(encoders) == encode(Encoders(GPT2, 0, saved))
    assert "/dev/shm" in caplog.text
    encoders.close()


def test_a_worker_that_cannot_be_started(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a limit of processes."""
    encoders = Encoders(GPT2, 2, saved)

    def fail(self: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", fail)
    assert encode(encoders) == encode(Encoders(GPT2, 0, saved))
    encoders.close()
