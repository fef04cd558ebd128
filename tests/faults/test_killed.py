"""Killed with SIGKILL at every system call that changes a folder, then run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from preflight.corpus.shards import BUILDING_NAME

from .harness import (
    ROOT,
    ForkServer,
    Point,
    find_temporaries,
    hash_tree,
    make_text,
    wait_until,
)
from .scenarios import (
    Scenario,
    build_preparation,
    build_training,
    is_same_outcome,
    sample,
)


def find_unrecoverable(scenario: Scenario, points: list[Point], expected: Any) -> list[str]:
    """The points after whose kill a second start does not come to the same end, with reasons."""
    faults = []
    for point in points:
        scenario.reset()
        code, said, lines = scenario.trace(point.inject("signal=SIGKILL"))
        assert code == -9, (point, said)
        assert any(point.paths[0] in line for line in lines[-6:]), (point, lines[-6:])
        code, said = scenario.run()
        try:
            if code != 0:
                faults.append(f"{point}: exit code {code}: {said[-600:]}")
            elif not is_same_outcome(scenario.outcome(), expected):
                faults.append(f"{point}: another outcome")
        except (AssertionError, OSError, KeyError, ValueError) as error:
            faults.append(f"{point}: {error}")
    return faults


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preparation_killed_anywhere(
    server: ForkServer, place: Path, full: bool, older: bool
) -> None:
    scenario = build_preparation(server, place, older)
    points, expected = scenario.record()
    assert len(points) > 50
    chosen = sample(points, full)
    assert find_unrecoverable(scenario, chosen, expected) == []
    print(f"{len(chosen)} of {len(points)} crash points, 0 unrecoverable")


@pytest.mark.slow
def test_saves_rotation_and_log_killed_anywhere(
    server: ForkServer, place: Path, full: bool
) -> None:
    scenario = build_training(server, place)
    points, expected = scenario.record()
    assert expected[0] == [3, 2]  # three saves, and the first one rotated away
    assert len(points) > 250
    chosen = sample(points, full)
    assert find_unrecoverable(scenario, chosen, expected) == []
    print(f"{len(chosen)} of {len(points)} crash points, 0 unrecoverable")


def test_a_writer_without_rename_is_found(server: ForkServer, place: Path) -> None:
    """The check of the checks: what writes in place leaves states that no second start mends."""
    scenario = build_training(server, place)
    _, expected = scenario.record()
    scenario.breaks = ("publishing",)
    points, _ = scenario.record()
    inside = [p for p in points if "checkpoint-" in p.text and p.call in ("write", "fsync")]
    faults = find_unrecoverable(scenario, inside[:: len(inside) // 6], expected)
    assert len(faults) >= 3


def test_a_killed_run_leaves_no_lock(server: ForkServer, place: Path) -> None:
    """The kernel frees the lock: the next start goes on at once."""
    scenario = build_training(server, place)
    points, _ = scenario.record()
    scenario.reset()
    assert scenario.trace(points[-1].inject("signal=SIGKILL"))[0] == -9
    assert (place / "out" / ".lock").exists()
    assert scenario.run()[0] == 0
    shutil.rmtree(place / "out")


_PREPARE = """
from preflight.core.log import configure_logging
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer
configure_logging("info")
settings = DataSettings(text_file=("text.txt",), data_dir="data", shard_size=20_000)
prepare_data(settings, load_tokenizer("gpt2"), block_bytes=2**14, n_workers=2)
"""


def start_preparation(place: Path) -> subprocess.Popen[str]:
    """With two worker processes."""
    return subprocess.Popen(
        [sys.executable, "-c", _PREPARE],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_preparation_stopped_or_its_parent_killed_alone(place: Path) -> None:
    """No worker stays, no lock stays, and the next run goes on; a stop changes nothing."""
    (place / "text.txt").write_text(make_text(2_000_000))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        parent = start_preparation(place)
        building = place / "data" / BUILDING_NAME
        # The third shard of a part: the journal knows of the first.
        wait_until(lambda path=building: list(path.rglob("shard_00002.npy")), 30)
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 3  # and Python's own helper
        os.kill(parent.pid, number)
        if number == signal.SIGSTOP:
            time.sleep(0.5)
            assert parent.poll() is None
            os.kill(parent.pid, signal.SIGCONT)
            said = parent.communicate(timeout=60)[1]
            assert parent.returncode == 0, said
            expected = hash_tree(place / "data")
            shutil.rmtree(place / "data")
    assert parent.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    again = start_preparation(place)
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 0, said
    assert "resuming at shard" in said
    assert hash_tree(place / "data") == expected
    assert not find_temporaries(place / "data")
