"""Every mode without stdin, stdout or stderr, on a full disk, and without a reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preflight.checkpoints import store
from preflight.corpus.builder import IN_PROCESS_BYTES

from .harness import ROOT, TRAIN_FLAGS, ForkServer, make_text, wait_until

CLOSED = [[1], [2], [0, 1, 2]]
MODEL_FLAGS = TRAIN_FLAGS[1:]
MODES = {
    "train": [*TRAIN_FLAGS, "--max-steps", "2", "--output-dir", "out"],
    "validate-only": ["--validate-only", *MODEL_FLAGS, "--output-dir", "fresh"],
    "generate": [
        *("--generate", "--output-dir", "trained", "--output-file", "said.txt"),
        *("--prompts", "the", "--max-new-tokens", "3", "--device", "cpu"),
    ],
}


@pytest.fixture
def trained(server: ForkServer, place: Path) -> Path:
    """A folder with a text, its data, and a trained model."""
    (place / "text.txt").write_text(make_text(6000))
    flags = [*TRAIN_FLAGS, "--max-steps", "1", "--output-dir", "trained"]
    code, said = server.run("main", flags, cwd=place)
    assert code == 0, said
    return place


@pytest.mark.parametrize("mode", MODES)
def test_without_streams(server: ForkServer, trained: Path, mode: str) -> None:
    """It works, and says nothing there. No file gets the number of a missing stream."""
    for numbers in CLOSED:
        shutil.rmtree(trained / "out", ignore_errors=True)
        process = server.start("closed", MODES[mode], numbers, cwd=trained)
        assert process.wait() == 0, process.said()
        assert not (process.said() and 2 in numbers)
        assert not list(trained.rglob("crash.log"))
        if mode == "train":
            newest = store.find_newest(trained / "out")
            assert newest is not None
            assert newest.step == 2
        if mode == "generate":
            assert (trained / "said.txt").read_text().startswith("the")
            (trained / "said.txt").unlink()


@pytest.mark.parametrize("mode", MODES)
def test_on_a_full_disk(server: ForkServer, trained: Path, mode: str) -> None:
    """A message that is lost stops nothing; a report or a completion that is lost is told."""
    full = Path("/dev/full")
    flags = [f for f in MODES[mode] if f not in ("--output-file", "said.txt")]
    process = server.start("main", flags, cwd=trained, stdout=full)
    assert process.wait() == (0 if mode == "train" else 6), process.said()
    assert mode == "train" or "No space left on device" in process.said()
    assert "Traceback" not in process.said()
    assert not list(trained.rglob("crash.log"))
    shutil.rmtree(trained / "out", ignore_errors=True)
    assert server.run("main", flags, cwd=trained, stderr=full)[0] == 0


CHILDREN = {
    "workers": ["--train", *MODEL_FLAGS, "--max-steps", "1", "--val-split", "0.001"],
    "trial": ["--get-optimal-bs", *MODEL_FLAGS, "--test-batch-sizes", "1"],
}


@pytest.mark.parametrize("kind", ["workers", "trial"])
@pytest.mark.slow
def test_children_without_streams(tmp_path: Path, kind: str) -> None:
    """Child processes inherit what is missing."""
    (tmp_path / "text.txt").write_text(make_text(IN_PROCESS_BYTES + 1000))
    command = [sys.executable, str(ROOT / "main.py"), *CHILDREN[kind]]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    output_dir = tmp_path / "training_output"
    made = store.find_newest(output_dir) if kind == "workers" else None
    assert made or (output_dir / "batch_size_report.json").is_file()
    assert not list(tmp_path.rglob("crash.log"))


def test_reader_of_a_report_leaves(server: ForkServer, trained: Path) -> None:
    os.mkfifo(trained / "pipe")
    reader = os.open(trained / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = server.start("main", MODES["validate-only"], cwd=trained, stdout=trained / "pipe")
    wait_until(process.said, 30)  # it has the pipe open by then
    os.close(reader)
    assert process.wait() == 141, process.said()
    assert "Traceback" not in process.said()
