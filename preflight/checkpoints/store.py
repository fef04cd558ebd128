"""The checkpoints of an output folder: list, find, open and rotate."""

from __future__ import annotations

import math
import os
from pathlib import Path

from preflight.checkpoints.damage import damage_error, describe_path
from preflight.checkpoints.format import (
    MILESTONES_NAME,
    Checkpoint,
    read_checkpoint,
    restore_replaced,
    verify_checkpoint,
)
from preflight.checkpoints.manifest import (
    CONFIG_NAME,
    FOLDER_NAME,
    MANIFEST_NAME,
    REQUIRED_NAMES,
    WEIGHTS_NAME,
)
from preflight.core import storage
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints with a valid manifest, newest (highest step) first.

    Raises:
        PreflightError: code CHECKPOINT, when the milestones folder cannot be read.
    """
    return scan_checkpoints(output_dir)[0]


def scan_checkpoints(output_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The result of `list_checkpoints`, and the reason for each folder that it leaves out.

    Raises:
        PreflightError: code CHECKPOINT, when the milestones folder cannot be read.
    """
    milestones = output_dir / MILESTONES_NAME
    try:
        names = os.listdir(milestones)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise damage_error(milestones, error.strerror or str(error)) from None
    steps = {name: int(match[1]) for name in names if (match := FOLDER_NAME.fullmatch(name))}
    found, damaged = [], {}
    for name in sorted(steps, key=lambda name: (steps[name], name), reverse=True):
        try:
            if (milestones / name).is_symlink():
                raise damage_error(milestones / name, "a symbolic link, which is not followed")
            found.append(read_checkpoint(milestones / name))
        except PreflightError as error:
            damaged[milestones / name] = error.lines[0]
    return found, damaged


def find_newest(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies. A warning names each damaged newer one.

    A writer calls `remove_leftovers` first, under its lock. The result is None only when there is
    no checkpoint folder at all. A run with nothing but damaged checkpoints is therefore never
    started from the beginning by accident.

    Raises:
        PreflightError: code CHECKPOINT, when there are folders and none of them verifies.
    """
    found, damaged = scan_checkpoints(output_dir)
    if not found and not damaged:
        return None
    return _choose_verified(output_dir, found, damaged)


def find_best(output_dir: Path) -> Checkpoint:
    """The verified checkpoint with the lowest validation loss. Without any loss: the newest.

    Raises:
        PreflightError: code CHECKPOINT, when there is none.
    """
    found, damaged = scan_checkpoints(output_dir)
    if not found and not damaged:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"no checkpoint in {output_dir}",
            f"train first: {format_command('--train', '--output-dir', output_dir)}, or name one "
            "with --checkpoint-path",
        )
    return _choose_verified(output_dir, _sort_by_loss(found), damaged, needs_state=False)


def open_checkpoint(path: str) -> Checkpoint:
    """The verified checkpoint that a user names: its folder, a file in it, or an output folder.

    An output folder stands for its best checkpoint. A folder without ``checkpoint.pt`` is
    accepted here; `load_training_state` refuses it.

    Raises:
        PreflightError: code CHECKPOINT, also when the named checkpoint is damaged: no other one
            takes its place.
    """
    place = Path(path)
    if place.name == MILESTONES_NAME and place.is_dir():
        return find_best(place.parent)
    if (place / MILESTONES_NAME).is_dir():
        return find_best(place)
    folder = place if place.is_dir() else place.parent
    is_known_name = place.is_dir() or place.name in (*REQUIRED_NAMES, MANIFEST_NAME)
    if (
        not is_known_name
        or not os.path.lexists(place)
        or not os.path.lexists(folder / MANIFEST_NAME)
    ):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path} is not a Preflight checkpoint: {describe_path(place, MANIFEST_NAME)}",
            f"expected a folder with {WEIGHTS_NAME}, {CONFIG_NAME} and {MANIFEST_NAME}, "
            "or one of these files",
            "nothing was loaded from it; name such a folder, or train one: "
            + format_command("--train"),
        )
    checkpoint = read_checkpoint(folder)
    verify_checkpoint(checkpoint, needs_state=False)
    return checkpoint


def _choose_verified(
    output_dir: Path, ordered: list[Checkpoint], damaged: dict[Path, str], needs_state: bool = True
) -> Checkpoint:
    """The first of `ordered` that verifies. A warning names each one that is skipped."""
    skipped = dict(damaged)
    for checkpoint in ordered:
        try:
            verify_checkpoint(checkpoint, needs_state=needs_state)
        except PreflightError as error:
            skipped[checkpoint.path] = error.lines[0]
            continue
        for path, reason in skipped.items():
            log.warning(f"{path.name} is damaged, {checkpoint.path.name} is used: {reason}")
        return checkpoint
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"none of the {len(skipped)} checkpoints in {output_dir / MILESTONES_NAME} is intact",
        next(iter(skipped.values())),
        "nothing was changed, and no run was started from the beginning",
        "restore one from a copy, or start a new run: --output-dir NEW",
    )


def _sort_by_loss(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """By validation loss, lowest first. Of equal losses the newer is first; None is last."""
    return sorted(newest_first, key=lambda c: math.inf if c.val_loss is None else c.val_loss)


def retire_checkpoints(output_dir: Path, keep: int, protect: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep`, the best, and `protect`. Return the deleted folders.

    Call it only after a save, which reads the new checkpoint back. Damaged folders are kept.

    Raises:
        PreflightError: code STORAGE or CHECKPOINT, when a folder cannot be read or deleted.
    """
    found = list_checkpoints(output_dir)
    kept = {c.path for c in found[: max(keep, 1)] + _sort_by_loss(found)[:1]} | {protect}
    retired = [c.path for c in reversed(found) if c.path not in kept]
    for folder in retired:  # oldest first: after a kill the newer ones are left
        storage.retire_folder(folder)
    return retired


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left unfinished. The caller holds the lock of `output_dir`.

    Raises:
        PreflightError: code STORAGE.
    """
    milestones = output_dir / MILESTONES_NAME
    restore_replaced(milestones)
    storage.remove_leftovers(milestones)
    for checkpoint in list_checkpoints(output_dir):
        storage.remove_leftovers(checkpoint.path)
