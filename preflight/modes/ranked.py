"""The processes of a run: this one alone, ranks that it starts, or those of torch's launcher.

Whoever prepares a run checks all of it before the ranks join each other. Some of it cannot be asked
for afterwards: a rank's memory is traced in a group of ranks that do not exist, and a process can
be in one group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.checkpoints.store import list_checkpoints, remove_leftovers
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log, muted
from preflight.core.processes import accept_signals, name_process
from preflight.core.signals import StopFlag
from preflight.core.storage import check_writable, foreign_error, make_folder, refuse_other_kind
from preflight.device.heartbeat import Heartbeat
from preflight.device.ranks import Meeting, is_lost_rank, is_rank, plan_ranks
from preflight.device.runtime import choose_device
from preflight.modes.launch import (
    count_ranks,
    end_with_launcher,
    is_prepared,
    launch_ranks,
)
from preflight.modes.neighbours import build_heartbeat
from preflight.modes.run_memory import check_memory
from preflight.modes.setup import RunSetup
from preflight.modes.start import check_machine, check_start
from preflight.settings import RunConfig
from preflight.training.curve import CURVE_NAME
from preflight.training.metrics import METRICS_NAME, refuse_foreign_log
from preflight.training.trackers import load_trackers
from trainer import refuse_unshared


@dataclass(frozen=True)
class RunKind:
    """How a run is made: from a text, or from chats.

    Attributes:
        setup: builds its parts, as `RunSetup` does.
        train: trains to the end, and returns the exit code.
    """

    setup: Callable[..., RunSetup]
    train: Callable[[Any], int]


def run_on_ranks(config: RunConfig, kind: RunKind) -> int:
    """Prepare and train on the processes that the flags or torch's launcher ask for.

    Returns:
        The exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    with StopFlag() as stop:
        if is_rank():
            return _run_as_rank(config, kind, stop)
        n_ranks = count_ranks(config)
        if n_ranks == 1:
            return _prepare(kind.setup(config, stop, resumes=True, measures=True), kind.train)
        setup = kind.setup(config, stop, resumes=True, ranks=plan_ranks(n_ranks))
        return _prepare(setup, lambda setup: launch_ranks(setup.given, n_ranks, stop))


def _run_as_rank(config: RunConfig, kind: RunKind, stop: StopFlag) -> int:
    """What one of several processes does that torch's launcher has started.

    Unless the parent has prepared and locked everything, rank 0 does, while the others wait.
    """
    name_process(f"rank {os.environ['RANK']}")
    if is_prepared():
        accept_signals()
    end_with_launcher()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_with_others())
        meeting = Meeting()
        heartbeat = stack.enter_context(build_heartbeat(meeting))
        if not is_prepared() and meeting.rank == 0:
            planned = plan_ranks(meeting.world, meeting.hosts)

            def begin(_: RunSetup) -> int:
                meeting.announce_prepared()
                return _join(config, kind, stop, meeting, heartbeat)

            return _prepare(kind.setup(config, stop, resumes=True, ranks=planned), begin)
        if not is_prepared():
            meeting.wait_for_preparation(stop)
        return _join(config, kind, stop, meeting, heartbeat)


@contextlib.contextmanager
def _ending_with_others() -> Iterator[None]:
    """Turn what torch says where another rank or the launcher has gone into the end of this one.

    Raises:
        PreflightError: code WORKER_LOST.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise PreflightError(ExitCode.WORKER_LOST) from error


def _join(
    config: RunConfig,
    kind: RunKind,
    stop: StopFlag,
    meeting: Meeting,
    heartbeat: Heartbeat,
) -> int:
    """Train together with the other ranks. What ends them all is told by one."""
    if meeting.rank:
        log.setLevel("ERROR")
    stop.is_quiet = bool(meeting.rank) or is_prepared()  # the parent tells of a signal
    heartbeat.begin()
    ranks = meeting.join(choose_device(config.system.device).type, heartbeat)
    try:
        setup = kind.setup(config, stop, resumes=True, ranks=ranks)
        with muted():  # whoever has prepared it has told of it
            setup.data  # noqa: B018
        code = kind.train(setup)
        ranks.barrier()
    except PreflightError as error:
        if meeting.is_first_to("tell an error"):
            raise
        raise PreflightError(error.code) from None
    ranks.close()
    return code


def _prepare(setup: RunSetup, begin: Callable[[RunSetup], int]) -> int:
    """Lock the output folder, check whatever can be checked, prepare the data, and `begin`."""
    config, output_dir = setup.given, setup.output_dir
    check_machine(config.system)
    load_trackers(config.control)  # a missing library is told before any folder is made
    with contextlib.ExitStack() as stack:
        if config.control.resume_from:  # the newest checkpoint is asked for under the lock
            setup.config  # noqa: B018
        refuse_foreign_output(output_dir)
        make_folder(output_dir)
        stack.enter_context(FolderLock(output_dir))
        check_writable(output_dir)  # under the lock: two probes at once would disturb each other
        remove_leftovers(output_dir)
        check_start(setup)
        setup.check_before_data()
        refuse_unshared(setup.config.training, setup.ranks)
        setup.data  # noqa: B018
        with setup.lock_data():
            _check_memory(setup)
            return begin(setup)


def _check_memory(setup: RunSetup) -> None:
    """Refuse a run that cannot fit. A card is left alone: its memory is the ranks'."""
    with muted() if setup.ranks.world > 1 else contextlib.nullcontext():  # the ranks tell of it
        if choose_device(setup.given.system.device).type == "cpu":
            check_memory(setup, setup.runtime, setup.plan.window_tokens)


def refuse_foreign_output(output_dir: Path) -> None:
    """Refuse to write to another program's log, or to replace its picture.

    Raises:
        PreflightError: code STORAGE.
    """
    log_path, curve_path = output_dir / METRICS_NAME, output_dir / CURVE_NAME
    refuse_foreign_log(log_path)
    drawn = refuse_other_kind(curve_path)
    if drawn and not log_path.exists() and not list_checkpoints(output_dir):
        raise foreign_error(curve_path, "is another program's file")
