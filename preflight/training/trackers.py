"""Where a run's figures go: `metrics.jsonl` first, and whatever else is registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from preflight.settings import ControlSettings
from preflight.settings.kinds import TRACKERS

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes the rows of a run: ``step``, ``eval``, ``sample`` and ``resume`` events."""

    def resume(self, step: int) -> None:
        """The run continues after `step` (0: it starts). Rows of later steps will come again."""

    def log(self, row: Row) -> None:
        """One row of plain JSON types. It must not end the run when it cannot be kept."""


def load_trackers(control: ControlSettings) -> list[Callable[[Path], Tracker]]:
    """What builds the trackers of a run; one whose name is a flag needs that flag.

    Raises:
        PreflightError: code FLAGS, when a library that a flag needs is missing.
    """
    return [TRACKERS.load(name) for name in TRACKERS.names() if getattr(control, name, True)]


class Trackers:
    """The trackers of a run, as one; of several ranks the first alone has any."""

    def __init__(
        self, output_dir: Path, control: ControlSettings, *, is_first_rank: bool = True
    ) -> None:
        kinds = load_trackers(control) if is_first_rank else []
        self._all = [build(output_dir) for build in kinds]

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
