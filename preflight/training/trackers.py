"""Where a run's figures go: `metrics.jsonl` first, and whatever else is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from preflight.settings.kinds import TRACKERS

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes the rows of a run: ``step``, ``eval``, ``sample`` and ``resume`` events."""

    def resume(self, step: int) -> None:
        """The run continues after `step` (0: it starts). Rows of later steps will come again."""

    def log(self, row: Row) -> None:
        """One row of plain JSON types. It must not end the run when it cannot be kept."""


class Trackers:
    """Every registered tracker, as one."""

    def __init__(self, output_dir: Path) -> None:
        self._all: list[Tracker] = [TRACKERS.load(name)(output_dir) for name in TRACKERS.names()]

    def add(self, tracker: Tracker) -> None:
        """One more, for this run."""
        self._all.append(tracker)

    def resume(self, step: int) -> None:
        """See `Tracker.resume`."""
        for tracker in self._all:
            tracker.resume(step)

    def log(self, row: Row) -> None:
        """See `Tracker.log`."""
        for tracker in self._all:
            tracker.log(row)
