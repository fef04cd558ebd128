"""The checkpoints of an output folder: list, find, open and rotate."""

from __future__ import annotations

import math
import os
from pathlib import Path

from preflight.checkpoints.format import (
    _FOLDER_NAME,
    CONFIG_NAME,
    DATA_NAMES,
    MANIFEST_NAME,
    MILESTONES_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    _damaged,
    _describe,
    _read_checkpoint,
    _restore_replaced,
    verify_checkpoint,
)
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints with a sound manifest, newest (highest step) first.

    Raises:
        PreflightError: code CHECKPOINT, when the milestones folder cannot be read.
    """
    return scan_checkpoints(output_dir)[0]


def scan_checkpoints(output_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """As `list_checkpoints`, and the folders without a sound manifest, each with the reason.

    Raises:
        PreflightError: code CHECKPOINT, when the milestones folder cannot be read.
    """
    milestones = output_dir / MILESTONES_NAME
    try:
        names = os.listdir(milestones)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise _damaged(milestones, error.strerror or str(error)) from None
    steps = {name: int(match[1]) for name in names if (match := _FOLDER_NAME.fullmatch(name))}
    found, damaged = [], {}
    for name in sorted(steps, key=lambda name: (steps[name], name), reverse=True):
        try:
            if (milestones / name).is_symlink():
                raise _damaged(milestones / name, "a symbolic link, which is not followed")
            found.append(_read_checkpoint(milestones / name))
        except PreflightError as error:
            damaged[milestones / name] = error.lines[0]
    return found, damaged


def find_newest(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged newer ones are named on stderr.

    Under the lock of a writer, call `remove_leftovers` first. None only when there is no
    checkpoint folder at all: a run whose every checkpoint is damaged never starts anew silently.

    Raises:
        PreflightError: code CHECKPOINT, when there are folders and none of them verifies.
    """
    found, damaged = scan_checkpoints(output_dir)
    if not found and not damaged:
        return None
    return _choose_verified(output_dir, found, damaged)


def find_best(output_dir: Path) -> Checkpoint:
    """The verified checkpoint of the lowest validation loss; without one, the newest.

    Raises:
        PreflightError: code CHECKPOINT, when there is none.
    """
    found, damaged = scan_checkpoints(output_dir)
    if not found and not damaged:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"no checkpoint in {output_dir}",
            "train first: python main.py --train, or name one with --checkpoint-path",
        )
    return _choose_verified(output_dir, _order_by_loss(found), damaged, lack_state=True)


def open_checkpoint(path: str) -> Checkpoint:
    """The verified checkpoint that a user names: its folder, a file in it, or an output folder.

    Of an output folder it is the best. A folder without ``checkpoint.pt`` is fine here, and
    refused by `load_training_state`.

    Raises:
        PreflightError: code CHECKPOINT; a damaged one is never exchanged for another.
    """
    place = Path(path)
    if place.name == MILESTONES_NAME and place.is_dir():
        return find_best(place.parent)
    if (place / MILESTONES_NAME).is_dir():
        return find_best(place)
    folder = place if place.is_dir() else place.parent
    ours = place.is_dir() or place.name in (*DATA_NAMES, MANIFEST_NAME)
    if not ours or not os.path.lexists(place) or not os.path.lexists(folder / MANIFEST_NAME):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path} is not a Preflight checkpoint: {_describe(place)}",
            f"expected a folder with {WEIGHTS_NAME}, {CONFIG_NAME} and {MANIFEST_NAME}, "
            "or one of these files",
            "nothing in it was loaded; name such a folder, or train one: python main.py --train",
        )
    checkpoint = _read_checkpoint(folder)
    verify_checkpoint(checkpoint, lack_state=True)
    return checkpoint


def _choose_verified(
    output_dir: Path, ordered: list[Checkpoint], damaged: dict[Path, str], lack_state: bool = False
) -> Checkpoint:
    """The first of `ordered` that verifies; what had to be passed over is said on stderr."""
    passed_over = dict(damaged)
    for checkpoint in ordered:
        try:
            verify_checkpoint(checkpoint, lack_state=lack_state)
        except PreflightError as error:
            passed_over[checkpoint.path] = error.lines[0]
            continue
        for path, reason in passed_over.items():
            log.warning(f"{path.name} is damaged, {checkpoint.path.name} is used: {reason}")
        return checkpoint
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"none of the {len(passed_over)} checkpoints in {output_dir / MILESTONES_NAME} is whole",
        next(iter(passed_over.values())),
        "nothing was changed, and no run was started from the beginning",
        "restore one from a copy, or begin anew: --output-dir NEW",
    )


def _order_by_loss(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """Lowest validation loss first, the newer of equals first, those without one last."""
    return sorted(newest_first, key=lambda c: math.inf if c.val_loss is None else c.val_loss)


def retire_checkpoints(output_dir: Path, keep: int, protect: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep`, the best, and `protect`; return what was deleted.

    Call it only after the newest was saved, which reads it back. Damaged folders stay.

    Raises:
        PreflightError: code STORAGE or CHECKPOINT, when a folder cannot be read or deleted.
    """
    found = list_checkpoints(output_dir)
    kept = {c.path for c in found[: max(keep, 1)] + _order_by_loss(found)[:1]} | {protect}
    doomed = [c.path for c in reversed(found) if c.path not in kept]
    for folder in doomed:  # oldest first: a cut leaves the newer ones
        storage.retire_folder(folder)
    return doomed


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left half done; call it under the exclusive lock of `output_dir`.

    Raises:
        PreflightError: code STORAGE.
    """
    milestones = output_dir / MILESTONES_NAME
    _restore_replaced(milestones)
    storage.remove_leftovers(milestones)
    for checkpoint in list_checkpoints(output_dir):
        storage.remove_leftovers(checkpoint.path)
