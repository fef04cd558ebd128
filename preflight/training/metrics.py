"""`metrics.jsonl`: the first of the trackers, and the one that the loss curve is drawn from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from preflight.core.log import log
from preflight.core.storage import publish_file
from preflight.training.trackers import Row

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """An append-only file of one JSON object a line: ``step``, ``eval``, ``sample``, ``resume``.

    A line is written by one call, so that a kill leaves at most a torn last line, which `trim`
    removes. A full disk causes one warning; training continues, and so does logging once there
    is space again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def resume(self, step: int) -> None:
        """Drop the rows that a run continued behind `step` will write again."""
        if step or self.path.exists():  # else: rows of a run that never reached a checkpoint
            self.trim(step or -1)

    def trim(self, last_step: int) -> None:
        """Keep rows up to the `step` row of `last_step`; a resumed run writes the rest again."""
        kept = []
        for row in read_metrics(self.path):
            step = row.get("step", 0)
            if step > last_step or (step == last_step and row.get("event") != "step"):
                continue
            kept.append(json.dumps(row))
        with publish_file(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def log(self, row: Row) -> None:
        """Append one row; numbers that are not finite become null, as JSON has none."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        line = json.dumps(finite).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, line) < len(line):
                    os.ftruncate(descriptor, before)  # a torn line would spoil the file
                    raise OSError("disk full")
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._warned:
                log.warning(f"{self.path}: {error}; training continues")
            self._warned = True
        else:
            self._warned = False


def open_metrics(output_dir: Path) -> MetricsLog:
    """The metrics of the run in `output_dir`."""
    return MetricsLog(output_dir / METRICS_NAME)


def read_metrics(path: Path) -> list[Row]:
    """All complete rows of a metrics file; other lines, such as a torn last one, are left out."""
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step", 0), int):
            rows.append(row)
    return rows
