"""Runs on several processes, of which some are killed, or get a signal."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import ROOT
from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode

pytestmark = pytest.mark.slow
FLAGS = [
    *("--model-size", "custom", "--n-layers", "2", "--n-heads", "2", "--n-embeddings", "32"),
    *("--context-length", "32", "--batch-size", "2", "--device", "cpu", "--no-mixed-precision"),
    *("--tokenizer", "char", "--num-workers", "1", "--max-steps", "60", "--dropout", "0.1"),
    *("--checkpoint-every", "10", "--eval-every", "30", "--max-checkpoints", "10"),
]
PATIENCE_SECONDS = 240


class Run:
    """`main.py --train --ranks N` in a folder of its own, watched from outside."""

    def __init__(self, folder: Path, text: Path, name: str, *flags: str) -> None:
        self.output_dir = folder / name
        argv = [sys.executable, str(ROOT / "main.py"), "--train", "--text-file", str(text)]
        argv += [*FLAGS, "--output-dir", name, *flags]
        self.log = folder / f"{name}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stderr=log, env=environment
            )
        self.parent = psutil.Process(self.process.pid)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in their order."""
        found = [p for p in self.parent.children() if "RANK" in p.environ()]
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(c.step >= step for c in list_checkpoints(self.output_dir)):
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < deadline, self.read_log()
            time.sleep(0.05)

    def finish(self) -> int:
        """Its exit code; none of its processes is left."""
        family = [self.parent, *self.parent.children(recursive=True)]
        code = self.process.wait(PATIENCE_SECONDS)
        _, left = psutil.wait_procs(family, timeout=5)
        assert not left
        return code

    def read_log(self) -> str:
        return self.log.read_text("utf-8")

    def hash_end(self) -> str:
        newest = list_checkpoints(self.output_dir)[0]
        assert newest.step == 60
        return hashlib.sha256((newest.path / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 800, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """The hash of the weights that two ranks reach undisturbed."""
    run = Run(tmp_path_factory.mktemp("unbroken"), text, "out", "--ranks", "2")
    assert run.finish() == ExitCode.DONE, run.read_log()
    return run.hash_end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_nothing(rank: int, tmp_path: Path, text: Path, unbroken: str) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(20)
    run.ranks()[rank].kill()
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("a rank was lost") == 1
    assert run.hash_end() == unbroken


@pytest.mark.parametrize("target", ["parent", "rank 0", "rank 1"])
def test_a_signal_saves_once(target: str, tmp_path: Path, text: Path, unbroken: str) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "step 2/" not in run.read_log():
        assert time.monotonic() < deadline, run.read_log()
        time.sleep(0.05)
    told = run.parent if target == "parent" else run.ranks()[int(target[-1])]
    told.send_signal(signal.SIGTERM)
    assert run.finish() == ExitCode.SIGTERM, run.read_log()
    assert len(list_checkpoints(run.output_dir)) == 1
    assert run.read_log().count("stopped at step") == 1
    again = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.hash_end() == unbroken


def test_ranks_that_are_lost_without_a_step_end_the_run(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "step 1/" not in run.read_log():
        assert time.monotonic() < deadline, run.read_log()
        time.sleep(0.05)
    run.ranks()[1].kill()
    assert run.finish() == ExitCode.WORKER_LOST, run.read_log()
    assert "no checkpoint was made" in run.read_log()


def test_no_rank_outlives_its_parent(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(10)
    ranks = run.ranks()
    run.parent.kill()
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert not left
