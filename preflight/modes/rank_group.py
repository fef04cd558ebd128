"""The ranks of one start: child processes, which meet at a store of this one, and their watch.

One loop sees all: signals that this process was sent, ranks that have ended, that are stopped, or
that come no further.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from preflight.core.errors import ExitCode
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.heartbeat import read_heartbeat
from preflight.modes.rank_process import start_rank

# Set for the ranks: the process id of their parent, which has prepared the data and holds the
# locks, and the file of their heartbeat.
PARENT_VARIABLE, HEARTBEAT_VARIABLE = "PREFLIGHT_PARENT", "PREFLIGHT_HEARTBEAT"
# What a rank may be stopped for (SIGSTOP, a debugger), while the others wait for it.
STOPPED_SECONDS = 30.0
# What a rank may need to end, when another one tells that it was lost.
LOST_SECONDS = 5.0
# What a rank may need to tell of its own end, when another has told of one.
END_SECONDS = 120.0
# What a step may take: this, or so many times the longest until then.
STEP_SECONDS, STEP_FACTOR = 60.0, 20
# The exit code, to multiprocessing, of a process whose fork server was killed.
_SERVER_LOST = 255
_LOOK_SECONDS = 0.1
_HOST = "localhost"


class RankGroup:
    """Ranks from their start to their end. On exit none of them is left.

    Args:
        words: the command line of each.
        n_ranks: their number.
        stop: signals to this process, which are passed on.
    """

    def __init__(self, words: list[str], n_ranks: int, stop: StopFlag) -> None:
        self._words, self._n_ranks, self._stop = words, n_ranks, stop
        self._ranks: list[BaseProcess] = []
        self._has_told = False
        self._hang = HangWatch()
        self._looks_stopped = [0] * n_ranks
        self._looks_since_end = 0

    def __enter__(self) -> RankGroup:
        with contextlib.ExitStack() as stack:
            prefix = "preflight-ranks-"
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            # A new start has a new store: in an old one are the addresses of lost ranks.
            self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
            stack.callback(self._end)
            for rank in range(self._n_ranks):
                self._ranks.append(self._start(rank))
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *unused: object) -> None:
        self._resources.close()

    def _start(self, rank: int) -> BaseProcess:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._n_ranks),
            "LOCAL_WORLD_SIZE": str(self._n_ranks),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # or rank 0 opens a store of its own
            PARENT_VARIABLE: str(os.getpid()),
            HEARTBEAT_VARIABLE: str(self._folder / str(rank)),
        }
        return start_rank(rank, self._words, environment)

    def _end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()

    def wait(self) -> list[int]:
        """The exit codes of all ranks, in their order; that of a killed one is negative."""
        while True:
            codes = [process.exitcode for process in self._ranks]
            known = [code for code in codes if code is not None]
            if len(known) == len(codes):
                return known
            self._pass_signals_on()
            self._end_stopped()
            self._end_hanging()
            self._end_left_behind(known)
            left = [process.sentinel for process in self._ranks if process.exitcode is None]
            wait(left, timeout=_LOOK_SECONDS)

    def _read_heartbeats(self) -> list[int]:
        return [read_heartbeat(self._folder / str(rank)) for rank in range(self._n_ranks)]

    def _pass_signals_on(self) -> None:
        """A wish to stop to each rank once, a wish to save to one of them, which tells the rest."""
        if self._stop.received is not None and not self._has_told:
            self._has_told = True
            for process in self._ranks:
                _send(process, self._stop.received)
        if self._stop.save_requested:
            self._stop.save_requested = False
            _send(self._ranks[0], signal.SIGUSR1)

    def _end_stopped(self) -> None:
        """Kill each rank that has been stopped for `STOPPED_SECONDS`.

        The system tells a stopped process from one that is busy. Looks are counted and not
        seconds, since this process may have been stopped as well.
        """
        for rank, process in enumerate(self._ranks):
            self._looks_stopped[rank] = self._looks_stopped[rank] + 1 if _is_stopped(process) else 0
            if self._looks_stopped[rank] * _LOOK_SECONDS >= STOPPED_SECONDS:
                self._looks_stopped[rank] = 0
                log.warning(f"rank {rank} (process {process.pid}) has been stopped: it is ended")
                process.kill()

    def _end_hanging(self) -> None:
        """Kill all ranks when none of them comes further; see `HangWatch`."""
        if self._hang.look(self._read_heartbeats()):
            log.warning(
                f"a step has not ended for {self._hang.seconds:.0f} s, "
                f"the longest before took {self._hang.longest_seconds:.1f} s: all ranks are ended"
            )
            self._hang = HangWatch()
            for process in self._ranks:
                process.kill()

    def _end_left_behind(self, codes: list[int]) -> None:
        """Kill the ranks that are left some time after the first, of these `codes`, has ended.

        At once where it was killed: what the others do now is of no use, and always safe to leave.
        """
        if not codes:
            return
        self._looks_since_end += 1
        limit = LOST_SECONDS if any(map(is_lost, codes)) else END_SECONDS
        if min(codes) < 0 or self._looks_since_end * _LOOK_SECONDS >= limit:
            for process in self._ranks:
                process.kill()


class HangWatch:
    """Tells a step that never ends from a long one.

    A rank that hangs within a step keeps the others waiting in the same step. So a step hangs when
    all ranks are within it for longer than `STEP_SECONDS`, and than `STEP_FACTOR` times the longest
    before it. While any rank saves, evaluates or reads data, none is in a step. The first step,
    which may compile, is not watched, but counts as one before. Looks are counted and not seconds,
    since this process may have been stopped as well.
    """

    def __init__(self) -> None:
        self._before: list[int] = []
        self._looks = self._longest = 0

    @property
    def seconds(self) -> float:
        """For which nothing has changed."""
        return self._looks * _LOOK_SECONDS

    @property
    def longest_seconds(self) -> float:
        """Of the longest step that has ended."""
        return self._longest * _LOOK_SECONDS

    def look(self, heartbeats: list[int]) -> bool:
        """Whether a step hangs, from the heartbeat of each rank, at one more look."""
        within = [count for count in heartbeats if count % 2]
        if heartbeats != self._before or len(within) < len(heartbeats):
            self._longest = max(self._longest, self._looks)
            self._before, self._looks = heartbeats, 0
            return False
        self._looks += 1
        limit = max(STEP_SECONDS, STEP_FACTOR * self.longest_seconds)
        return min(within) > 1 and self.seconds >= limit


def is_lost(code: int) -> bool:
    """Whether an exit code says that a rank was killed, or that another one was lost to it."""
    return code < 0 or code in (ExitCode.WORKER_LOST, _SERVER_LOST)


def _send(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid or 0, number)


def _is_stopped(process: BaseProcess) -> bool:
    try:
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:  # it has just ended
        return False
