"""What can go wrong while `--evaluate` scores: kills, full disks, signals. What it has is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from preflight.core import storage
from preflight.core.errors import ExitCode

from .harness import (
    TRAIN_FLAGS,
    ForkServer,
    Point,
    find_message_faults,
    find_points,
    find_temporaries,
    make_text,
    wait_until,
)

FLAGS = [
    *("--evaluate", "all", "--tasks", "words.jsonl", "choices.jsonl"),
    *("--output-dir", "out", "--data-dir", "data", "--device", "cpu"),
    *("--evaluation-batch-tokens", "200"),
]
# What may fail without ending the evaluation: the lock's text only informs, and filelock probes
# the folder with O_TMPFILE.
TOLERATED = (".lock", "O_TMPFILE")


@pytest.fixture
def folder(server: ForkServer, place: Path) -> Path:
    """A place with a tiny run and two files of tasks."""
    text = make_text(9_000)
    (place / "text.txt").write_text(text)
    flags = [*TRAIN_FLAGS, "--max-steps", "2", "--output-dir", "out", "--data-dir", "data"]
    code, said = server.run("main", flags, cwd=place)
    assert code == 0, said
    lines = [line[:24] for line in text.splitlines()[:12]]
    words = "".join(json.dumps({"text": f"{line} end"}) + "\n" for line in lines)
    (place / "words.jsonl").write_text(words)
    choices = [{"question": line, "choices": ["fox", "dog"], "answer": 1} for line in lines]
    (place / "choices.jsonl").write_text("".join(json.dumps(c) + "\n" for c in choices))
    return place


def evaluate(server: ForkServer, folder: Path) -> Any:
    """The tasks of a result, after a run that must end well."""
    code, said = server.run("main", FLAGS, cwd=folder)
    assert code == 0, said
    results = folder / "out/evaluation"
    newest = max(results.glob("*.json"))
    assert not list(results.glob("*.journal"))
    assert find_temporaries(results) == []
    return json.loads(newest.read_text())["tasks"]


def list_points(server: ForkServer, folder: Path, *, opening: bool, full: bool) -> list[Point]:
    code, said, lines = server.trace("main", FLAGS, cwd=folder)
    assert code == 0, said
    points = find_points(lines, [folder / "out/evaluation"], opening=opening)
    assert len(points) > 20
    return points if full else points[:: max(1, len(points) // 5)]


@pytest.mark.slow
def test_a_kill_at_any_write_loses_nothing_that_was_kept(
    server: ForkServer, folder: Path, full: bool
) -> None:
    expected = evaluate(server, folder)
    storage.remove_tree(folder / "out/evaluation")
    for point in list_points(server, folder, opening=False, full=full):
        storage.remove_tree(folder / "out/evaluation")
        code, _, _ = server.trace("main", FLAGS, cwd=folder, inject=point.inject("signal=SIGKILL"))
        assert code == -signal.SIGKILL, point
        assert evaluate(server, folder) == expected, point


@pytest.mark.slow
def test_a_full_disk_ends_with_a_message_and_keeps_what_was_scored(
    server: ForkServer, folder: Path, full: bool
) -> None:
    expected = evaluate(server, folder)
    storage.remove_tree(folder / "out/evaluation")
    for point in list_points(server, folder, opening=True, full=full):
        if any(name in point.text for name in TOLERATED):
            continue
        storage.remove_tree(folder / "out/evaluation")
        code, said, _ = server.trace("main", FLAGS, cwd=folder, inject=point.inject("error=ENOSPC"))
        assert code == ExitCode.STORAGE, (point, said[-500:])
        assert find_message_faults(said, "No space left on device") == "", point
        assert evaluate(server, folder) == expected, point


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_between_two_batches(
    server: ForkServer, folder: Path, number: int
) -> None:
    expected = evaluate(server, folder)
    storage.remove_tree(folder / "out/evaluation")
    process = server.start("main", FLAGS, cwd=folder)
    wait_until(lambda: list(folder.glob("out/evaluation/*.journal")), 30)
    os.kill(process.pid, number)
    assert process.wait() == (130 if number == signal.SIGINT else 143)
    assert find_message_faults(process.said(), "what was scored is kept") == ""
    assert evaluate(server, folder) == expected


def test_two_at_once_do_not_disturb_each_other(server: ForkServer, folder: Path) -> None:
    expected = evaluate(server, folder)
    first = server.start("main", FLAGS, cwd=folder, stopped=False)
    codes = [server.run("main", FLAGS, cwd=folder)[0] for _ in range(2)]
    codes.append(first.wait())
    assert set(codes) <= {0, int(ExitCode.LOCKED)}
    assert evaluate(server, folder) == expected
