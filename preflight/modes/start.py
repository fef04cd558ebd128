"""What a run would fail at later and can be known at its start, before any text is read."""

from __future__ import annotations

import errno
import os

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.storage import check_access, storage_error
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.ownership import refuse_foreign
from preflight.device.runtime import build_runtime, find_missing_compiler
from preflight.foresight.fits import check_disk
from preflight.foresight.memory import estimate_checkpoint_bytes
from preflight.modes.setup import RunSetup
from preflight.settings import SystemSettings


def check_machine(system: SystemSettings) -> None:
    """The device is there, and so is the compiler that `--compile-model` needs.

    Raises:
        PreflightError: code FLAGS.
    """
    device = build_runtime(system).device
    missing = find_missing_compiler(device) if system.compile_model else ""
    if missing:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--compile-model on {device}: {missing}",
            "install it, or leave out --compile-model",
        )


def check_start(setup: RunSetup) -> None:
    """Everything that can refuse a run of `--train` and does not need the text.

    Args:
        setup: of the run; its output folder is locked and can be written to.

    Raises:
        PreflightError: with the code of the first thing that stands in the way.
    """
    config, model_config = setup.config, setup.least_model_config
    disk = check_disk(
        setup.output_dir, model_config, config.training, config.control, config.training.max_steps
    )
    one = estimate_checkpoint_bytes(model_config, config.training)
    if one > disk.free_bytes:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise storage_error(setup.output_dir / "milestones", full, one)
    if disk.fault:
        log.warning("; ".join(disk.fault))
    data_dir = setup.data_dir
    if not os.path.exists(data_dir / METADATA_NAME):  # else it may serve as it is
        refuse_foreign(data_dir)
        check_access(data_dir)
        if os.path.isdir(data_dir):
            FolderLock(data_dir).release()
