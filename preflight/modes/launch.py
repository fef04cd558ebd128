"""Several processes for one run on this machine, started again when one of them is lost.

The parent has prepared the data and holds the locks. A rank that is lost takes the others with it:
then all are started again, and continue from the last checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

from preflight.checkpoints.store import list_checkpoints, remove_leftovers
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.processes import die_with_parent
from preflight.core.signals import StopFlag
from preflight.device.ranks import is_rank
from preflight.modes.rank_group import PARENT_VARIABLE, RankGroup, is_lost
from preflight.modes.trying import list_train_words
from preflight.settings import RunConfig

# Set by torch's launcher, which waits for the ranks that it has started.
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
_LOOK_SECONDS = 0.5


def count_ranks(config: RunConfig) -> int:
    """The processes of a run on this machine: `--ranks`, or one for each card."""
    if config.processes.ranks is not None:
        return config.processes.ranks
    may_use_all = config.system.device in ("auto", "cuda") and torch.cuda.is_available()
    return max(1, torch.cuda.device_count()) if may_use_all else 1


def is_prepared() -> bool:
    """Whether the parent of this rank has prepared its data and holds its locks."""
    return is_rank() and PARENT_VARIABLE in os.environ


def launch_ranks(config: RunConfig, n_ranks: int, stop: StopFlag) -> int:
    """Train on `n_ranks` processes to the end, and return the exit code.

    Raises:
        PreflightError: code WORKER_LOST, when ranks were lost twice without a step in between.
    """
    output_dir = Path(config.control.output_dir)
    reached = _find_step(output_dir)
    while True:
        with RankGroup(list_train_words(config), n_ranks, stop) as group:
            code = _choose_code(group.wait())
        remove_leftovers(output_dir)  # of a rank that was killed while it saved or deleted
        if code != ExitCode.WORKER_LOST:
            return code
        if stop.stopping:
            log.info(f"stopped; a rank was lost, the newest step is {_find_step(output_dir):,}")
            return stop.exit_code
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


def _choose_code(codes: list[int]) -> int:
    """The exit code of a run whose ranks have ended with `codes`.

    What a rank knows to be the end is the end. Otherwise one was killed (a negative code), which
    may have been an internal error to another.
    """
    failed = [code for code in codes if code]
    known = [code for code in failed if not is_lost(code)]
    final = [code for code in known if code != ExitCode.INTERNAL]
    if final or not failed:
        return final[0] if final else ExitCode.DONE
    return ExitCode.INTERNAL if len(known) == len(failed) else ExitCode.WORKER_LOST


def is_with_launcher() -> bool:
    """Whether the process that has started this one is torch's launcher."""
    return _TORCHRUN_VARIABLE in os.environ and not is_prepared()


def end_with_launcher() -> None:
    """Under torch's launcher: end this rank as soon as that has ended, even by SIGKILL.

    On Linux the system does so at once, also where the rank is stopped; elsewhere a thread. Other
    launchers may end before their ranks, which then go on.
    """
    if not is_with_launcher():
        return
    die_with_parent()
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_SECONDS)
        os._exit(int(ExitCode.WORKER_LOST))  # the main thread may be in a call that never returns

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()
