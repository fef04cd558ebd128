"""`metrics.jsonl`: the first of the trackers, and the one that the loss curve is drawn from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from preflight.core.log import log
from preflight.core.storage import foreign_error, open_regular, publish_file, refuse_other_kind
from preflight.training.trackers import Row

METRICS_NAME = "metrics.jsonl"
_BEGINNING = b'{"event": "'  # of every row that was ever written
_MAX_LINE_BYTES = 2**20


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
        """Keep rows up to the `step` row of `last_step`; a resumed run writes the rest again.

        Lines that are no rows are kept as they are, but for a torn last one.
        """
        refuse_foreign_log(self.path)
        with publish_file(self.path) as file:
            for line in _read_lines(self.path):
                row = _parse(line)
                step = row["step"] if row else -1
                is_later = step > last_step or (step == last_step and row["event"] != "step")
                is_torn = not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES
                if not (row and is_later) and not is_torn:
                    file.write(line)

    def log(self, row: Row) -> None:
        """Append one row; numbers that are not finite become null, as JSON has none."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        line = json.dumps(finite).encode() + b"\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(self.path, flags, 0o644)
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


def refuse_foreign_log(path: Path) -> None:
    """Refuse a link, or a file that does not begin with a row of ours.

    Raises:
        PreflightError: code STORAGE.
    """
    if refuse_other_kind(path):
        with open_regular(path) as file:
            if file.read(len(_BEGINNING)) not in (b"", _BEGINNING):
                raise foreign_error(path, "is another program's file")


def read_metrics(path: Path) -> Iterator[Row]:
    """The complete rows of a metrics file; every other line is left out.

    Each has an ``event`` and a ``step``; what else it has was perhaps written by another version.
    """
    for line in _read_lines(path):
        row = _parse(line)
        if row:
            yield row


def _read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; those of more than a mebibyte in pieces."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MAX_LINE_BYTES):
            yield line


def _parse(line: bytes) -> Row:
    """The row of a line; empty for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return {}
    return row if isinstance(row.get("event"), str) else {}
