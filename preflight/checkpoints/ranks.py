"""What a checkpoint needs to know of the processes (ranks) that write or read it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from preflight.core.errors import ExitCode, PreflightError

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def world(self) -> int:
        """The number of processes."""

    def gather(self, value: T) -> list[T]:
        """A small plain value of each rank, in the order of the ranks, on every rank."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class _OneRank:
    """One process."""

    rank, world = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        return None


ONE_RANK: Ranks = _OneRank()


def do_together(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on this rank; or its first error, in the order of ranks, on every rank.

    No rank waits for one that has failed, and none goes on without it.

    Raises:
        PreflightError: that of the first rank that failed; code INTERNAL where that failed in any
            other way. The rank itself raises what it met.
    """
    if ranks.world == 1:
        return action()
    failure: BaseException | None = None
    told: PreflightError | None = None
    result: Any = None
    try:
        result = action()
    except BaseException as error:
        failure = error
        told = error if isinstance(error, PreflightError) else _describe_failure(ranks.rank, error)
    for rank, error_there in enumerate(ranks.gather(told)):
        if error_there is not None:
            raise failure if failure is not None and rank == ranks.rank else error_there
    return result


def _describe_failure(rank: int, error: BaseException) -> PreflightError:
    lines = (str(error) or "no reason given").splitlines()
    told = f"rank {rank} failed: {type(error).__name__}: {lines[0][:200]}"
    return PreflightError(ExitCode.INTERNAL, told)


def do_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, which alone calls it, or its error, on every rank.

    Raises:
        PreflightError: as `do_together`.
    """
    nothing: Any = None
    return ranks.gather(do_together(ranks, action if ranks.rank == 0 else lambda: nothing))[0]
