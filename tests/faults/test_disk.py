"""A disk that is full, failing, or not there: exit 6, a message that helps, nothing harmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .harness import ForkServer, Point, find_message_faults, read_message
from .scenarios import (
    Scenario,
    build_preparation,
    build_training,
    is_same_outcome,
    sample,
)

ERRORS = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}
# What may fail without ending the run: the log warns and goes on, the lock's text only informs.
TOLERATED = ("metrics.jsonl", ".lock", ".tmp-retired-")


def find_faults(scenario: Scenario, points: list[Point], error: str, expected: Any) -> list[str]:
    """The points at which `error` was not met as it should be, with reasons."""
    faults = []
    for point in points:
        scenario.reset()
        code, said, lines = scenario.trace(point.inject(f"error={error}"))
        where = f"{point.call} {point.number} {point.paths}: "
        assert any("INJECTED" in line and point.paths[0] in line for line in lines), where
        in_log = any("metrics.jsonl" in path and ".tmp" not in path for path in point.paths)
        tolerated = code == 0 and any(name in point.text for name in TOLERATED)
        if not tolerated:
            words = ["bytes"] if error == "ENOSPC" and "delete" not in said else []
            fault = find_message_faults(said, ERRORS[error], *words)
            named = any(str(folder) in line for folder in scenario.watched
                        for line in read_message(said)[:1])
            if code != 6 or fault or not named:
                faults.append(f"{where}exit {code}, path named: {named}, {fault or said[-300:]}")
        elif in_log and "warning:" not in said:
            faults.append(f"{where}no warning")
        code, said = scenario.run()
        try:
            found = scenario.outcome()
            if in_log:  # the row that could not be written is missing, and only that
                assert len(expected[-1]) - len(found[-1]) <= 1
                found, wanted = found[:-1], expected[:-1]
            else:
                wanted = expected
            if code != 0 or not is_same_outcome(found, wanted):
                faults.append(f"{where}rerun: exit {code}, {said[-300:]}")
        except (AssertionError, OSError, KeyError, ValueError) as trouble:
            faults.append(f"{where}rerun: exit {code}, {trouble}, {said[-300:]}")
    return faults


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["preparation", "rebuild", "training"])
def test_every_call_may_fail(
    server: ForkServer, place: Path, full: bool, name: str, error: str
) -> None:
    if name == "training":
        scenario = build_training(server, place)
    else:
        scenario = build_preparation(server, place, older=name == "rebuild")
    points, expected = scenario.record(opening=True)
    chosen = sample(points, full, seed=len(error))
    assert find_faults(scenario, chosen, error, expected) == []
    print(f"{error} in {name}: {len(chosen)} of {len(points)} calls")
