"""Ranks that watch each other, where no parent does."""

from __future__ import annotations

import contextlib
import os
import signal

import torch.distributed as dist

from preflight.core.errors import ExitCode
from preflight.core.log import log
from preflight.device.hang_watch import RankWatch, is_stopped
from preflight.device.heartbeat import Heartbeat, read_signs
from preflight.device.ranks import Meeting
from preflight.modes.launch import is_prepared, is_with_launcher


def build_heartbeat(meeting: Meeting) -> Heartbeat:
    """What whoever watches this rank sees: its parent, or under torch's launcher the others."""
    look = Neighbours(meeting).look if is_with_launcher() else None
    return Heartbeat(meeting.store, meeting.rank, is_prepared=is_prepared(), look=look)


class Neighbours:
    """The ranks of this host, which torch's launcher has started.

    The first of them that is not stopped watches all, as the parent of `--ranks` does, and ends
    those that hang, itself included. Then the launcher ends the others or starts all again. Another
    launcher may give each rank processes numbers of its own: there nobody watches.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._rank, self._world, self._n_here = meeting.rank, meeting.world, meeting.ranks_here
        self._first = self._rank - self._rank % self._n_here
        self._watch = RankWatch(self._first)

    def look(self, store: dist.Store) -> None:
        """One more look; ends this process where it hangs.

        Raises:
            torch.distributed.DistError: the store does not answer.
        """
        signs = read_signs(store, self._world)
        pids = [sign.pid for sign in signs[self._first : self._first + self._n_here]]
        if not all(sign.pid for sign in signs):  # one has not begun
            return
        if not all(is_stopped(pid) for pid in pids[: self._rank - self._first]):
            self._watch = RankWatch(self._first)
            return
        hang = self._watch.look(pids, signs)
        if hang is None:
            return
        log.error(hang.text)
        for pid in hang.pids:
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
        if os.getpid() in hang.pids:
            os._exit(int(ExitCode.WORKER_LOST))
