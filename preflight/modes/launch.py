"""Several processes for one run on this machine, started by torch's own launcher.

The parent has prepared the data and holds the locks. A rank that is lost takes the others with it:
then all are started again, and continue from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.processes import die_with_parent
from preflight.device.ranks import is_rank
from preflight.modes.trying import list_train_words
from preflight.settings import RunConfig

# Set for the ranks of a parent that has prepared the data and holds the locks; its process id.
_PARENT_VARIABLE = "PREFLIGHT_PARENT"
# The folder in which each of these ranks leaves its process id, as soon as it handles signals.
_READY_VARIABLE, _READY_NAME = "PREFLIGHT_READY", "ready"
# What a rank may need to save after a signal, before it is killed.
SHUTDOWN_SECONDS = 120
# What a rank may be stopped for (SIGSTOP, a debugger), while the others wait for it.
STOPPED_SECONDS = 30
_LOOK_SECONDS = 0.5
_PROGRAM = Path(__file__).resolve().parents[2] / "main.py"


def count_ranks(config: RunConfig) -> int:
    """The processes of a run on this machine: `--ranks`, or one for each card."""
    if config.processes.ranks is not None:
        return config.processes.ranks
    may_use_all = config.system.device in ("auto", "cuda") and torch.cuda.is_available()
    return max(1, torch.cuda.device_count()) if may_use_all else 1


def is_prepared() -> bool:
    """Whether the parent of this rank has prepared its data and holds its locks."""
    return is_rank() and _PARENT_VARIABLE in os.environ


def launch_ranks(config: RunConfig, n_ranks: int) -> int:
    """Train on `n_ranks` processes to the end, and return the exit code.

    Raises:
        PreflightError: code WORKER_LOST, when ranks were lost twice without a step in between.
    """
    output_dir = Path(config.control.output_dir)
    reached = _find_step(output_dir)
    while True:
        code = _run_once(config, n_ranks)
        if code != ExitCode.WORKER_LOST:
            return code
        before, reached = reached, _find_step(output_dir)
        if reached == before:
            raise PreflightError(
                ExitCode.WORKER_LOST,
                f"a rank was lost, and no checkpoint was made since step {before:,}",
                "checkpoints are kept; run the same command to continue",
                "to lose less: a smaller --checkpoint-minutes",
            )
        log.warning(f"a rank was lost; continuing from step {reached:,} on {n_ranks} ranks")


def _find_step(output_dir: Path) -> int:
    found = list_checkpoints(output_dir)
    return found[0].step if found else 0


def _run_once(config: RunConfig, n_ranks: int) -> int:
    """Start the ranks and wait for their end: the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="preflight-ranks-") as folder:
        return _launch(config, n_ranks, folder)


def _launch(config: RunConfig, n_ranks: int, folder: str) -> int:
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id=f"preflight-{os.getpid()}-{time.monotonic_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        max_restarts=0,  # a new start has a new store: torch's own restart reuses the old one
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    # Of ranks that end it tells much; what matters is told here and by them.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[_PARENT_VARIABLE] = str(os.getpid())
    try:
        with _killing_stopped_ranks(), _forwarding_saves(Path(folder)):
            elastic_launch(launch, sys.executable)(str(_PROGRAM), *list_train_words(config))
    except ChildFailedError as error:
        return _choose_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return ExitCode.SIGINT if error.sigval.name == "SIGINT" else ExitCode.SIGTERM
    finally:
        del os.environ[_PARENT_VARIABLE]
    return ExitCode.DONE


@contextlib.contextmanager
def _forwarding_saves(folder: Path) -> Iterator[None]:
    """Pass SIGUSR1 on to one rank, which makes all of them save once.

    Only to one that has announced itself: before, the signal would end it.
    """
    if not hasattr(signal, "SIGUSR1"):  # Windows
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        for process_id in sorted(int(path.name) for path in (folder / _READY_NAME).iterdir()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, number)
                return

    (folder / _READY_NAME).mkdir()
    os.environ[_READY_VARIABLE] = str(folder / _READY_NAME)
    before = signal.signal(signal.SIGUSR1, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        del os.environ[_READY_VARIABLE]


def announce_signals() -> None:
    """Tell the parent that this rank's own handlers take its signals from now on."""
    if _READY_VARIABLE in os.environ:
        Path(os.environ[_READY_VARIABLE], str(os.getpid())).touch()


def _choose_code(codes: list[int]) -> int:
    """The exit code of a run whose ranks ended so at the same moment.

    What a rank knows to be the end is the end. Otherwise one was killed (a negative code), which
    may have been an internal error to another.
    """
    known = [code for code in codes if code > 0 and code != ExitCode.WORKER_LOST]
    final = [code for code in known if code != ExitCode.INTERNAL]
    if final:
        return final[0]
    return ExitCode.INTERNAL if len(known) == len(codes) else ExitCode.WORKER_LOST


@contextlib.contextmanager
def _killing_stopped_ranks() -> Iterator[None]:
    """Kill each rank that has been stopped for `STOPPED_SECONDS`: it then counts as lost.

    The system tells a stopped process from one that is busy, however long a compilation or a save
    takes. Looks are counted and not seconds, since this process may have been stopped as well.
    """
    ended = threading.Event()

    def watch() -> None:
        looks: Counter[psutil.Process] = Counter()
        while not ended.wait(_LOOK_SECONDS):
            stopped = filter(_is_stopped_rank, psutil.Process().children())
            looks = Counter({process: looks[process] + 1 for process in stopped})
            for process, count in looks.items():
                if count * _LOOK_SECONDS >= STOPPED_SECONDS:
                    log.warning(f"a rank (process {process.pid}) has been stopped: it is ended")
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    watcher = threading.Thread(target=watch, name="stopped-ranks", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _is_stopped_rank(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED and "RANK" in process.environ()
    except psutil.Error:  # it has just ended
        return False


def end_with_launcher() -> None:
    """End this rank as soon as its parent has ended, even by SIGKILL.

    On Linux the system does so at once, also where the rank is stopped; elsewhere a thread.
    """
    die_with_parent()
    parent = int(os.environ[_PARENT_VARIABLE])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(int(ExitCode.WORKER_LOST))  # the main thread may be in a call that never returns

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()
