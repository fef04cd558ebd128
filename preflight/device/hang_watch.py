"""Ranks of one host that will never come further, told from those that only take long.

Whoever watches looks at each `BEAT_SECONDS`. Looks are counted and not seconds, since the watching
process may have been stopped as well.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from preflight.device.heartbeat import BEAT_SECONDS, Sign

# What a rank may be stopped for (SIGSTOP), while the others wait for it.
STOPPED_SECONDS = 30.0
# What ranks that the others wait for may do nothing for.
IDLE_SECONDS = 60.0
# What a step may take: this, or so many times the longest until then.
STEP_SECONDS, STEP_FACTOR = 60.0, 20
# Threads that only look whether there is anything to do use less of a CPU than this.
_IDLE_SHARE, _IDLE_START_SECONDS = 0.01, 0.05


@dataclass(frozen=True)
class Hang:
    """What is wrong, and the processes that have to end."""

    text: str
    pids: list[int]


class RankWatch:
    """Tells what hangs, from one look to the next.

    Three things count as hanging: a process that is stopped, ranks that do nothing while the
    others wait for them (`IdleWatch`), and a step that takes far too long (`StepWatch`).

    Args:
        first: the number of this host's first rank.
    """

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._looks_stopped: Counter[int] = Counter()
        self._watches = (IdleWatch(first), StepWatch())

    def look(self, pids: list[int], signs: list[Sign]) -> Hang | None:
        """One more look.

        Args:
            pids: the processes of this host's ranks, in their order.
            signs: of the ranks of all hosts.
        """
        for rank, pid in enumerate(pids, self._first):
            self._looks_stopped[pid] = self._looks_stopped[pid] + 1 if is_stopped(pid) else 0
            if self._looks_stopped[pid] * BEAT_SECONDS >= STOPPED_SECONDS:
                self._looks_stopped[pid] = 0
                return Hang(f"rank {rank} (process {pid}) has been stopped: it is ended", [pid])
        if any(sign.calls < 0 for sign in signs):  # a preparation may wait for a network
            return None
        for watch in self._watches:
            if text := watch.look(pids, signs):
                return Hang(f"{text}: all ranks are ended", pids)
        return None


class IdleWatch:
    """Tells ranks that sleep, or wait for what never comes, whatever the run does.

    The others wait for the ranks that have begun the fewest collectives. These wait for none,
    unless all have begun the same one, which then never ends. So the run hangs when they do
    nothing: no thread of theirs, nor of a process that they have started (a compiler), runs, waits
    for a CPU or for a disk. A rank that spins is not told from one that works; see `StepWatch`.
    Only Linux tells all this; elsewhere nothing is found. Nor is it where the slowest ranks are on
    other hosts, which look themselves.
    """

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._before: list[Sign] = []
        self._looks, self._used = 0, 0.0

    def look(self, pids: list[int], signs: list[Sign]) -> str:
        """What hangs, at one more look; empty: nothing."""
        fewest = min(sign.calls for sign in signs)
        ranks = [rank for rank, sign in enumerate(signs) if sign.calls == fewest]
        here = {rank: pid for rank, pid in enumerate(pids, self._first) if rank in ranks}
        if signs != self._before or len(here) < len(ranks):
            return self._start_anew(signs, 0.0)
        try:
            threads = [thread for pid in here.values() for thread in _list_threads(pid)]
        except OSError:  # one has just ended
            return self._start_anew(signs, 0.0)
        used = sum(seconds for _, seconds in threads)
        share = _IDLE_SHARE * self._looks * BEAT_SECONDS
        if abs(used - self._used) > len(ranks) * (_IDLE_START_SECONDS + share):
            return self._start_anew(signs, used)
        self._looks += not any(state in "RD" for state, _ in threads)
        if self._looks * BEAT_SECONDS < IDLE_SECONDS:
            return ""
        if len(ranks) == len(signs):
            return f"no rank did anything for {IDLE_SECONDS:.0f} s"
        who = "rank " + ", ".join(map(str, ranks))
        return f"{who}, for which the others wait, did nothing for {IDLE_SECONDS:.0f} s"

    def _start_anew(self, signs: list[Sign], used: float) -> str:
        self._before, self._looks, self._used = signs, 0, used
        return ""


class StepWatch:
    """Tells a step that never ends from a long one.

    A rank that hangs within a step keeps the others waiting in the same step. So a step hangs when
    all ranks are within it for longer than `STEP_SECONDS`, and than `STEP_FACTOR` times the longest
    before it. While any rank saves, evaluates or reads data, none is in a step.

    Before the first step of a start nothing is known of their length, but ranks have the same to
    do in it: one that is behind in the collectives, with nobody coming further, may take as long,
    and `STEP_FACTOR` times as long as the others needed for all of the step until then. Where it
    may compile this is not so, since one rank may find in a cache what another compiles.
    """

    def __init__(self) -> None:
        self._before: list[Sign] = []
        self._looks = self._quiet = self._longest = 0

    def look(self, pids: list[int], signs: list[Sign]) -> str:
        """What hangs, at one more look; empty: nothing."""
        before, self._before = self._before, signs
        steps = [sign.steps for sign in signs]
        if not all(n % 2 for n in steps) or steps != [sign.steps for sign in before]:
            self._longest = max(self._longest, self._looks)
            self._looks = self._quiet = 0
            return ""
        self._looks += 1
        self._quiet = self._quiet + 1 if signs == before else 0
        if min(steps) > 1:
            seconds, longest = self._looks * BEAT_SECONDS, self._longest * BEAT_SECONDS
            told = f"a step has not ended for {seconds:.0f} s, the longest took {longest:.1f} s"
        else:
            calls = [sign.calls for sign in signs]
            if min(calls) == max(calls) or any(sign.may_compile for sign in signs):
                return ""
            seconds = self._quiet * BEAT_SECONDS
            longest = (self._looks - self._quiet) * BEAT_SECONDS
            rank = calls.index(min(calls))
            told = f"rank {rank} has kept the others waiting in the first step for {seconds:.0f} s"
        return told if seconds >= max(STEP_SECONDS, STEP_FACTOR * longest) else ""


def is_stopped(pid: int) -> bool:
    """Whether the system tells that a process is stopped; false where there is no such process."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _list_threads(pid: int) -> list[tuple[str, float]]:
    """State and CPU seconds of the threads of a process and of all that it has started.

    The thread that asks is left out.

    Raises:
        OSError: one of them has ended meanwhile, or the system is not Linux.
    """
    found: list[tuple[str, float]] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        if task.name == str(threading.get_native_id()):
            continue
        fields = (task / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # in its own code, and in the system's
        found.append((fields[0], ticks / os.sysconf("SC_CLK_TCK")))
        for child in (task / "children").read_text("utf-8").split():
            found += _list_threads(int(child))
    return found
