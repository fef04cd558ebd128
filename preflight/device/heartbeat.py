"""What a rank tells of itself while it works: whether it is within a step, and how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

# Between two signs of a rank, and between two looks at them.
BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Sign:
    """Where a rank is.

    Attributes:
        pid: its process.
        steps: rises where a step begins and where it ends: odd within a step.
        calls: collectives that it has begun. All ranks begin the same ones in the same order, so
            that the others wait for the rank with the fewest. -1: not known, or the run is still
            prepared; then nobody counts as hanging within it.
        may_compile: whether its first step may take minutes.
    """

    pid: int = 0
    steps: int = 0
    calls: int = 0
    may_compile: bool = False

    def describe(self) -> str:
        """What `read` reads."""
        return f"{self.pid} {self.steps} {self.calls} {int(self.may_compile)}"

    @classmethod
    def read(cls, described: bytes) -> Sign:
        """The sign that `describe` has described."""
        pid, steps, calls, may_compile = map(int, described.split())
        return cls(pid, steps, calls, bool(may_compile))


class Heartbeat:
    """Puts the sign of a rank into a store while it is entered as a context.

    A thread does so, at each `BEAT_SECONDS`: what the main thread does is never known beforehand.

    Args:
        store: of the ranks' meeting.
        rank: of this process.
        is_prepared: whether the ranks may join at once; otherwise `begin` says when.
        look: called by the thread after each sign with its connection to the store, if given.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        *,
        is_prepared: bool,
        look: Callable[[dist.Store], None] | None = None,
    ) -> None:
        self._store, self._rank, self._look = store, rank, look
        self._sign = Sign(os.getpid(), calls=0 if is_prepared else -1)
        self._groups: list[dist.ProcessGroup] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Tell nothing more."""
        # Joined, since a thread within torch cannot be left behind when Python ends.
        self._ended.set()
        self._thread.join()

    def begin(self) -> None:
        """The run is prepared: from here on a rank that does nothing is waited for in vain."""
        self._sign = dataclasses.replace(self._sign, calls=0)

    def count_calls(self, groups: list[dist.ProcessGroup]) -> None:
        """Tell of the collectives of these groups, until the heartbeat ends."""
        self._groups = groups

    @contextlib.contextmanager
    def step(self, may_compile: bool) -> Iterator[None]:
        """One step of training."""
        self._note_step(may_compile)
        try:
            yield
        finally:
            self._note_step(may_compile)

    def _note_step(self, may_compile: bool) -> None:
        steps = self._sign.steps + 1
        self._sign = dataclasses.replace(self._sign, steps=steps, may_compile=may_compile)

    def _beat(self) -> None:
        """Go on also where the store does not answer: whoever keeps it may have been stopped."""
        store: dist.Store | None = None
        while not self._ended.is_set():
            try:
                # The main thread may wait in the connection that it has.
                store = store or self._store.clone()  # type: ignore[attr-defined]
                store.set(_name_sign(self._rank), self.read().describe())
                if self._look is not None:
                    self._look(store)
            except dist.DistError:
                store = None
            self._ended.wait(BEAT_SECONDS)

    def read(self) -> Sign:
        """The sign as it is now."""
        try:
            calls = sum(
                group._get_sequence_number_for_group()  # type: ignore[attr-defined]
                for group in self._groups
            )
        except (AttributeError, RuntimeError):  # another version of torch, or another backend
            return dataclasses.replace(self._sign, calls=-1)
        return dataclasses.replace(self._sign, calls=self._sign.calls + calls)


def read_signs(store: dist.Store, world: int) -> list[Sign]:
    """The newest sign of each rank; one of zeros of a rank that has not begun.

    Raises:
        torch.distributed.DistError: the store does not answer.
    """
    names = [_name_sign(rank) for rank in range(world)]
    there = names if store.check(names) else [name for name in names if store.check([name])]
    found = dict(zip(there, store.multi_get(there) if there else [], strict=True))
    return [Sign.read(found[name]) if name in found else Sign() for name in names]


def _name_sign(rank: int) -> str:
    return f"sign/{rank}"
