"""A checkpoint takes the place of an older one of its step, and never loses what was there."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from pathlib import Path

from preflight.checkpoints.manifest import FOLDER_NAME, read_manifest
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log

REPLACED_PREFIX = f"{storage.TEMPORARY_PREFIX}replaced-"


def set_aside(folder: Path) -> None:
    """Rename what has a checkpoint's name and no manifest: it may be somebody else's."""
    if not os.path.lexists(folder):
        return
    try:
        read_manifest(folder)
    except PreflightError:
        names = (folder.with_name(f"{folder.name}.unknown-{n}") for n in itertools.count(1))
        free = next(name for name in names if not os.path.lexists(name))
        log.warning(f"{folder} is no checkpoint; it is kept as {free.name}")
        os.rename(folder, free)


def prepare_parent(folder: Path, needed_bytes: int) -> None:
    """Make the milestones folder and check the free space before anything is written."""
    milestones = folder.parent
    if not milestones.parent.is_dir() or milestones.is_symlink():
        raise PreflightError(
            ExitCode.STORAGE,
            f"cannot save {folder}: {milestones.parent} is gone, or milestones is a link",
            "put the folder back (is the disk mounted?), then run the same command again",
        )
    storage.make_folder(milestones)
    if storage.free_bytes(milestones) < needed_bytes:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise storage.storage_error(folder, error, needed_bytes)


def restore_replaced(milestones: Path) -> None:
    """Finish a replacement that was cut: restore the old checkpoint unless the new one exists."""
    for aside in milestones.glob(f"{REPLACED_PREFIX}*"):
        folder = milestones / aside.name.removeprefix(REPLACED_PREFIX)
        if aside.is_symlink() or not FOLDER_NAME.fullmatch(folder.name):
            continue  # somebody else's
        with contextlib.suppress(OSError):  # the next start tries again
            if os.path.lexists(folder):
                storage.remove_tree(aside)
            else:
                os.rename(aside, folder)
                storage.fsync_folder(milestones)
