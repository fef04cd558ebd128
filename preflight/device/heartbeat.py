"""What a rank tells its parent while it works: when it is within a step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_N_BYTES = 8


class Heartbeat:
    """A count in a file, which rises where a step begins and where it ends: odd within a step."""

    def __init__(self, path: Path) -> None:
        self._count = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step of training."""
        self._beat()
        try:
            yield
        finally:
            self._beat()

    def _beat(self) -> None:
        self._count += 1
        os.lseek(self._descriptor, 0, os.SEEK_SET)  # Windows has no pwrite
        os.write(self._descriptor, self._count.to_bytes(_N_BYTES, "little"))


def read_heartbeat(path: Path) -> int:
    """The count of a `Heartbeat`; 0 before the first step."""
    try:
        return int.from_bytes(path.read_bytes(), "little")
    except FileNotFoundError:
        return 0
