"""In a trace of a real preparation every rename has its fsyncs (saves: tests/checkpoints)."""

from __future__ import annotations

from pathlib import Path

from checkpoints.samples import find_durability_faults

from .harness import ForkServer
from .scenarios import build_preparation


def test_every_rename_of_a_preparation_is_durable(server: ForkServer, place: Path) -> None:
    scenario = build_preparation(server, place, older=True)
    scenario.reset()
    code, said, lines = scenario.trace()
    assert code == 0, said
    renames, faults = find_durability_faults(lines, str(place / "data"))
    assert renames >= 10  # three shards, three journals, metadata, and the swap
    assert faults == []
    without = [line for line in lines if "fsync(" not in line]
    assert len(find_durability_faults(without, str(place / "data"))[1]) > 6
