"""Worker processes leave the signals of a terminal to their parent, at every moment."""

from __future__ import annotations

import os
import signal
import time

import pytest

from preflight.corpus.blocks import Block
from preflight.corpus.workers import Encoders
from preflight.tokenization import load_tokenizer


def test_a_worker_is_shielded_while_it_starts(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("gpt2")
    encoders = Encoders(tokenizer, 1)
    try:
        future = encoders._submit(Block(0, 0, [(b"one two", True)], 7, False))
        assert future is not None
        assert encoders._pool is not None
        [pid] = encoders._pool._processes
        while not future.done():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
            time.sleep(0.001)
        assert future.result()
    finally:
        encoders.close()
    assert capfd.readouterr().err == ""
