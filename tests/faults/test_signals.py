"""Signals at random times: the state is saved, the exit code right, and the end near."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from pathlib import Path

import pytest

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store

from .harness import (
    PREPARE_FLAGS,
    TRAIN_FLAGS,
    ForkServer,
    Process,
    find_message_faults,
    find_temporaries,
    hash_tree,
    make_text,
    read_rows,
    read_status,
    wait_until,
)

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
STEP_AND_TEN_SECONDS = 10.5
# Where most of the time goes, and so most signals fall.
PHASES = {
    "training": ["--checkpoint-every", "100000", "--eval-every", "100000"],
    "saving": ["--checkpoint-every", "1", "--eval-every", "100000"],
    "evaluation": ["--checkpoint-every", "100000", "--eval-every", "1", "--val-split", "0.5"],
}


@pytest.fixture
def flags(place: Path, server: ForkServer) -> list[str]:
    """Endless training, without a trial of compilation before it."""
    (place / "text.txt").write_text(make_text(20_000))
    return [
        *TRAIN_FLAGS,
        "--no-compile-model",
        "--max-steps",
        "1000000",
        "--log-every",
        "1",
        "--output-dir",
        str(place / "out"),
    ]


def begin(server: ForkServer, place: Path, flags: list[str], step: int = 1) -> Process:
    """A run that has done `step` updates."""
    process = server.start("main", flags, cwd=place)
    wait_until(lambda: f"\nstep {step}/" in process.said(), 30)
    return process


def check_saved(output_dir: Path) -> int:
    """The newest checkpoint is of the last step in the log and verifies; which step."""
    checkpoint_format.forget_verified()
    newest = store.find_newest(output_dir)
    assert newest is not None
    assert newest.step == max(row["step"] for row in read_rows(output_dir))
    assert not find_temporaries(output_dir)
    return newest.step


def test_stopped_at_random_times(
    server: ForkServer, place: Path, flags: list[str], full: bool
) -> None:
    draw = random.Random(0)
    longest = 0.0
    for number in range(45 if full else 6):
        phase = list(PHASES)[number % len(PHASES)]
        stop = list(CODES)[number // len(PHASES) % len(CODES)]
        shutil.rmtree(place / "out", ignore_errors=True)
        data = ["--data-dir", str(place / f"data-{phase}")]
        process = begin(server, place, [*flags, *data, *PHASES[phase]])
        time.sleep(draw.uniform(0, 0.4))
        os.kill(process.pid, stop)
        began = time.monotonic()
        assert process.wait(STEP_AND_TEN_SECONDS) == CODES[stop], process.said()
        longest = max(longest, time.monotonic() - began)
        assert f"stopped at step {check_saved(place / 'out'):,};" in process.said()
    print(f"longest wait {longest:.2f} s")


def test_a_run_that_leaves_without_saving_is_found(
    server: ForkServer, place: Path, flags: list[str]
) -> None:
    """The check of the check."""
    process = server.start("main", flags, cwd=place, breaks=["saving"])
    wait_until(lambda: "\nstep 3/" in process.said(), 30)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(STEP_AND_TEN_SECONDS) == 143
    with pytest.raises(AssertionError):
        check_saved(place / "out")


def test_stopped_while_preparing(server: ForkServer, place: Path, full: bool) -> None:
    (place / "text.txt").write_text(make_text(300_000))
    flags = [*PREPARE_FLAGS, "--data-dir"]
    began = time.monotonic()
    assert server.run("preparation", [*flags, str(place / "whole")], cwd=place)[0] == 0
    seconds = time.monotonic() - began
    expected = hash_tree(place / "whole")
    draw = random.Random(1)
    codes = []
    for number in range(15 if full else 2):
        stop = list(CODES)[number % len(CODES)]
        target = place / f"cut{number}"
        process = server.start("preparation", [*flags, str(target)], cwd=place)
        wait_until(lambda folder=target: (folder / ".lock").exists(), 10)
        time.sleep(draw.uniform(0, seconds * 0.8))
        os.kill(process.pid, stop)
        codes.append(process.wait(STEP_AND_TEN_SECONDS))
        assert codes[-1] in (0, CODES[stop]), process.said()  # 0: it was done before
        assert server.run("preparation", [*flags, str(target)], cwd=place)[0] == 0
        assert hash_tree(target) == expected
        assert not find_temporaries(target)
        shutil.rmtree(target)
    assert any(codes)


def test_interrupted_twice_leaves_at_once(
    server: ForkServer, place: Path, flags: list[str]
) -> None:
    process = begin(server, place, [*flags, "--checkpoint-every", "5"], step=6)
    began = time.monotonic()
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.001)
    assert process.wait(2) == 130
    assert time.monotonic() - began < 2
    store.remove_leftovers(place / "out")
    assert store.find_newest(place / "out") is not None


def test_saved_on_request_and_going_on(
    server: ForkServer, place: Path, flags: list[str], full: bool
) -> None:
    process = begin(server, place, [*flags, "--checkpoint-every", "1000000"])
    milestones = place / "out" / "milestones"
    for number in range(1, 4 if full else 3):
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(lambda count=number: len(list(milestones.glob("checkpoint-*"))) >= count, 10)
    os.kill(process.pid, signal.SIGSTOP)  # a pause is harmless
    os.kill(process.pid, signal.SIGCONT)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(STEP_AND_TEN_SECONDS) == 143
    steps = [row["step"] for row in read_rows(place / "out") if row["event"] == "step"]
    assert steps == list(range(1, check_saved(place / "out") + 1))


def test_ignored_signals_stay_ignored(server: ForkServer, place: Path, flags: list[str]) -> None:
    """As under nohup, or in the background of a script."""
    flags = ["40" if flag == "1000000" else flag for flag in flags]
    process = server.start("ignoring", flags, cwd=place)
    wait_until(lambda: "\nstep 1/" in process.said(), 30)
    for number in (*CODES, signal.SIGUSR1):
        os.kill(process.pid, number)
    assert process.wait() == 0, process.said()
    assert check_saved(place / "out") == 40


def test_a_stopped_run_keeps_its_lock(server: ForkServer, place: Path, flags: list[str]) -> None:
    """Ctrl-Z, another start meanwhile, and on again."""
    process = begin(server, place, flags, step=3)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: read_status(process.pid, "State") == "T", 10)
    code, said = server.run("main", flags, cwd=place)
    assert code == 7
    assert find_message_faults(said, f"pid {process.pid}") == ""
    n_told = process.said().count("\nstep ")
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: process.said().count("\nstep ") > n_told + 2, 30)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(STEP_AND_TEN_SECONDS) == 143
    check_saved(place / "out")


def test_reader_of_the_messages_leaves(server: ForkServer, place: Path, flags: list[str]) -> None:
    """As in `python main.py --train 2>&1 | head -1`: the run goes on."""
    os.mkfifo(place / "pipe")
    reader = os.open(place / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    flags = ["10" if flag == "1000000" else flag for flag in flags]
    process = server.start("main", flags, cwd=place, stderr=place / "pipe")
    wait_until(lambda: select.select([reader], [], [], 0)[0] and os.read(reader, 1), 30)
    os.close(reader)
    assert process.wait() == 0
    assert check_saved(place / "out") == 10
