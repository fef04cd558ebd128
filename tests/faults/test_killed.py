"""Killed with SIGKILL at every system call that changes a folder, then run again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from .harness import ForkServer, Point
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


@pytest.mark.parametrize("older", [False, True])
def test_preparation_killed_anywhere(
    server: ForkServer, place: Path, full: bool, older: bool
) -> None:
    scenario = build_preparation(server, place, older)
    points, expected = scenario.record()
    assert len(points) > 50
    chosen = sample(points, full)
    assert find_unrecoverable(scenario, chosen, expected) == []
    print(f"{len(chosen)} of {len(points)} crash points, 0 unrecoverable")


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
