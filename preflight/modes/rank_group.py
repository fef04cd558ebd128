"""The ranks of one start: child processes, which meet at a store of this one, and their watch.

One loop sees all: signals that this process was sent, ranks that have ended, or that hang.
"""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from torch.distributed import TCPStore

from preflight.core.errors import ExitCode
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.hang_watch import RankWatch
from preflight.device.heartbeat import BEAT_SECONDS, read_signs
from preflight.device.ranks import separate_names
from preflight.modes.rank_process import start_rank

# Set for the ranks: the process id of their parent, which has prepared the data and holds the
# locks.
PARENT_VARIABLE = "PREFLIGHT_PARENT"
# What a rank may need to end, when another one tells that it was lost.
LOST_SECONDS = 5.0
# What a rank may need to tell of its own end, when another has told of one.
END_SECONDS = 120.0
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
        self._watch = RankWatch()
        self._looks = self._looks_since_end = 0

    def __enter__(self) -> RankGroup:
        with contextlib.ExitStack() as stack:
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
            self._end_hanging()
            self._end_left_behind(known)
            left = [process.sentinel for process in self._ranks if process.exitcode is None]
            wait(left, timeout=_LOOK_SECONDS)

    def _pass_signals_on(self) -> None:
        """A wish to stop to each rank once, a wish to save to one of them, which tells the rest."""
        if self._stop.received is not None and not self._has_told:
            self._has_told = True
            for process in self._ranks:
                _send(process, self._stop.received)
        if self._stop.save_requested:
            self._stop.save_requested = False
            _send(self._ranks[0], signal.SIGUSR1)

    def _end_hanging(self) -> None:
        """Kill what `RankWatch` finds."""
        self._looks += 1
        if self._looks * _LOOK_SECONDS < BEAT_SECONDS:
            return
        self._looks = 0
        pids = [process.pid or 0 for process in self._ranks]
        signs = read_signs(separate_names(self._store), self._n_ranks)
        hang = self._watch.look(pids, signs)
        if hang is not None:
            log.warning(hang.text)
            for process in self._ranks:
                if process.pid in hang.pids:
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


def is_lost(code: int) -> bool:
    """Whether an exit code says that a rank was killed, or that another one was lost to it."""
    return code < 0 or code in (ExitCode.WORKER_LOST, _SERVER_LOST)


def _send(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid or 0, number)
