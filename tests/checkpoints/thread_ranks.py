"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from preflight.checkpoints.ranks import Ranks


class _Meeting:
    """Where the threads of a run hand over their values."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)


class ThreadRanks:
    """One rank of several, each a thread. A wait without an end is an error after 20 seconds."""

    def __init__(self, rank: int, world: int, meeting: _Meeting) -> None:
        self.rank, self.world, self._meeting = rank, world, meeting

    def gather(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        values = list(self._meeting.values)
        self._meeting.barrier.wait()
        return values

    def barrier(self) -> None:
        self.gather(None)


def run_ranks(world: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """What `action` returned or raised on each of `world` ranks."""
    meeting, results = _Meeting(world), [None] * world

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadRanks(rank, world, meeting))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results
