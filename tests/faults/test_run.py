"""What goes wrong in the middle of a run: the right exit code, and the last state is safe."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store

from .harness import (
    TRAIN_FLAGS,
    ForkServer,
    find_message_faults,
    is_equal,
    make_text,
    read_rows,
    read_state,
    wait_until,
)


def build_flags(place: Path, steps: int = 12, checkpoint_every: int = 2) -> list[str]:
    """A run with many checkpoints, and without a trial of compilation."""
    (place / "text.txt").write_text(make_text(6000))
    return [
        *TRAIN_FLAGS,
        "--no-compile-model",
        "--data-dir",
        str(place / "data"),
        "--output-dir",
        str(place / "out"),
        "--max-steps",
        str(steps),
        "--checkpoint-every",
        str(checkpoint_every),
        "--eval-every",
        str(steps),
        "--log-every",
        "1",
    ]


@pytest.fixture(scope="module")
def unbroken(server: ForkServer, scratch: Path) -> Path:
    """The output folder of a run to its end, which a run that was broken must equal."""
    place = scratch / "unbroken"
    place.mkdir()
    assert server.run("main", build_flags(place, steps=30), cwd=place)[0] == 0
    return place / "out"


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("reading thread", 10, "the thread that reads the data"),
        ("reading thread's memory", 8, "out of memory"),
        ("gradients", 9, "last good checkpoint"),
        ("device memory", 8, "out of memory"),
        ("host memory", 8, "out of memory"),
    ],
)
def test_fault_ends_the_run_and_the_next_goes_on(
    server: ForkServer, place: Path, unbroken: Path, fault: str, code: int, words: str
) -> None:
    flags = build_flags(place, steps=30)
    found, said = server.run("main", flags, cwd=place, breaks=[fault])
    assert found == code, said
    assert find_message_faults(said, words) == ""
    newest = store.find_newest(place / "out")
    assert newest is not None
    assert newest.step >= 2
    for tensor in checkpoint_format.load_weights(newest).values():
        assert tensor.isfinite().all()
    assert server.run("main", flags, cwd=place)[0] == 0
    for compare in (lambda out: read_state(out, 30), read_rows):
        assert is_equal(compare(place / "out"), compare(unbroken))


@pytest.mark.parametrize("kind", ["removed", "replaced by a link"])
def test_output_folder_is_taken_away(server: ForkServer, place: Path, kind: str) -> None:
    process = server.start("main", build_flags(place, steps=1_000_000), cwd=place)
    wait_until(lambda: "\nstep 3/" in process.said(), 30)
    (place / "out").rename(place / "away")
    if kind == "replaced by a link":
        (place / "elsewhere").mkdir()
        (place / "out").symlink_to(place / "elsewhere")
    assert process.wait(20) == 6, process.said()
    assert find_message_faults(process.said(), str(place / "out")) == ""
    assert "loss_curve" not in process.said()  # which cannot be drawn either, and matters less
    if kind == "replaced by a link":
        assert not list((place / "elsewhere").glob("milestones/checkpoint-*"))
    assert store.find_newest(place / "away") is not None


def test_shard_is_edited_in_the_middle(server: ForkServer, place: Path) -> None:
    # Some hundred steps are made of what is read already.
    flags = build_flags(place, steps=1_000_000, checkpoint_every=10)
    process = server.start("main", flags, cwd=place)
    wait_until(lambda: "\nstep 3/" in process.said(), 30)
    shard = next((place / "data" / "train").glob("*.npy"))
    with open(shard, "r+b") as file:
        file.seek(200)
        file.write(b"\7")
    assert process.wait(30) == 4, process.said()
    assert find_message_faults(process.said(), shard.name, "changed") == ""
    assert store.find_newest(place / "out") is not None


def test_shard_is_deleted_in_the_middle(server: ForkServer, place: Path) -> None:
    """What is open stays readable: the run goes on to its end."""
    process = server.start("main", build_flags(place, steps=200), cwd=place)
    wait_until(lambda: "\nstep 3/" in process.said(), 30)
    shutil.rmtree(place / "data" / "train")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 143, process.said()


ODD_NAMES = ["a b", "new\nline", "-n", "\u6f22\U0001f600", "x" * 200, "\udcff"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_in_a_cramped_place(server: ForkServer, place: Path, name: str) -> None:
    (place / name).mkdir()
    (place / name / name).write_text(make_text(6000))
    flags = build_flags(place, steps=4)
    for old, new in (("text.txt", name), ("data", "data"), ("out", name + "o")):
        old = old if old == "text.txt" else str(place / old)
        flags[flags.index(old)] = str(place / name / new)
    code, said = server.run("cramped", flags, cwd=place)
    assert code == 0, said
    newest = store.find_newest(place / name / f"{name}o")
    assert newest is not None
    assert newest.step == 4


def test_clock_that_jumps(server: ForkServer, place: Path) -> None:
    flags = build_flags(place)
    assert server.run("main", [*flags, "--output-dir", str(place / "whole")], cwd=place)[0] == 0
    code, said = server.run("main", flags, cwd=place, breaks=["clock"])
    assert code == 0, said
    assert is_equal(read_state(place / "out", 12), read_state(place / "whole", 12))
    for number, folder in enumerate(sorted((place / "out" / "milestones").iterdir())):
        os.utime(folder, (time.time() - number * 10**8,) * 2)  # age decides nothing
    newest = store.find_newest(place / "out")
    assert newest is not None
    assert newest.step == 12
