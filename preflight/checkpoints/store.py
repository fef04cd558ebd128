"""The checkpoints of an output folder: list, find, open and rotate."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from preflight.checkpoints.damage import damage_error, describe_path
from preflight.checkpoints.format import (
    MILESTONES_NAME,
    Checkpoint,
    WeightsOnlyError,
    read_checkpoint,
    verify_checkpoint,
)
from preflight.checkpoints.manifest import (
    CONFIG_NAME,
    FOLDER_NAME,
    MANIFEST_NAME,
    OWN_NAMES,
    WEIGHTS_NAME,
)
from preflight.checkpoints.ranks import ONE_RANK, Ranks, do_first, do_together
from preflight.checkpoints.replacing import restore_replaced
from preflight.core import storage
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.tokenization import MissingLibraryError

# What the modes write in an output folder under temporary names.
_SCRATCH_NAMES = (
    r"metrics\.jsonl|loss_curve\.png|\w+_report\.json|run_plan\.json|base|"
    r"(?:trial|check|probe)(?:-.+)?"
)
Check = Callable[[Checkpoint], None]


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
            if os.path.lexists(milestones / name):  # else a run has just deleted it
                damaged[milestones / name] = error.lines[0]
    return found, damaged


def find_newest(
    output_dir: Path, check: Check | None = None, ranks: Ranks = ONE_RANK
) -> Checkpoint | None:
    """The newest checkpoint that verifies. A warning names each damaged newer one.

    A writer calls `remove_leftovers` first, under its lock. The result is None only when there is
    no checkpoint folder at all. A run with nothing but damaged checkpoints is therefore never
    started from the beginning by accident.

    Args:
        output_dir: the run's folder.
        check: raises PreflightError for a checkpoint that verifies and yet cannot be used.
        ranks: all of them call this and share the hashing. What one refuses, none uses.

    Raises:
        PreflightError: code CHECKPOINT, when there are folders and none of them verifies.
    """
    return _find(output_dir, list, check=check, ranks=ranks)


def find_best(output_dir: Path, ranks: Ranks = ONE_RANK) -> Checkpoint:
    """The verified checkpoint with the lowest validation loss. Without any loss: the newest.

    Args:
        output_dir: the run's folder.
        ranks: as in `find_newest`.

    Raises:
        PreflightError: code CHECKPOINT, when there is none.
    """
    best = _find(output_dir, _sort_by_loss, needs_state=False, ranks=ranks)
    if best is None:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"no checkpoint in {output_dir}",
            f"train first: {format_command('--train', '--output-dir', output_dir)}, or name one "
            "with --checkpoint-path",
        )
    return best


def open_checkpoint(path: str, ranks: Ranks = ONE_RANK) -> Checkpoint:
    """The verified checkpoint that a user names: its folder, a file in it, or an output folder.

    An output folder stands for its best checkpoint. A folder without ``checkpoint.pt`` is
    accepted here; `load_training_state` refuses it.

    Args:
        path: as the user gives it.
        ranks: as in `find_newest`.

    Raises:
        PreflightError: code CHECKPOINT, also when the named checkpoint is damaged: no other one
            takes its place.
    """
    place = Path(path)
    if place.name == MILESTONES_NAME and os.path.isdir(place):
        return find_best(place.parent, ranks)
    if os.path.isdir(place / MILESTONES_NAME):
        return find_best(place, ranks)
    folder = place if os.path.isdir(place) else place.parent
    is_known_name = os.path.isdir(place) or place.name in OWN_NAMES
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
    verify_checkpoint(checkpoint, needs_state=False, ranks=ranks)
    return checkpoint


def _find(
    output_dir: Path,
    order: Callable[[list[Checkpoint]], list[Checkpoint]],
    *,
    needs_state: bool = True,
    check: Check | None = None,
    ranks: Ranks = ONE_RANK,
) -> Checkpoint | None:
    """The first in `order` that can be used; None where there is no checkpoint folder at all.

    A warning names each one that is skipped. One that a run deleted meanwhile is not skipped:
    newer ones have taken its place.
    """
    found, skipped = scan_checkpoints(output_dir)
    if not found and not skipped:
        return None
    for checkpoint in order(found):
        try:
            verify_checkpoint(checkpoint, needs_state=needs_state, ranks=ranks)
            do_together(ranks, functools.partial(_check_usable, checkpoint, check))
        except (MissingLibraryError, WeightsOnlyError):
            raise
        except PreflightError as error:
            if not do_first(ranks, functools.partial(os.path.lexists, checkpoint.path)):
                return _find(output_dir, order, needs_state=needs_state, check=check, ranks=ranks)
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


def _check_usable(checkpoint: Checkpoint, check: Check | None) -> None:
    _ = checkpoint.config  # its hash does not say that it describes a possible model
    if check is not None:
        check(checkpoint)


def _sort_by_loss(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """By validation loss, lowest first. Of equal losses the newer is first; None is last.

    Losses on other data than that of the newest checkpoint count as None: they say nothing here.
    """
    data = {c.path: _find_fingerprint(c) for c in newest_first}

    def rank(checkpoint: Checkpoint) -> float:
        is_comparable = data[checkpoint.path] == data[newest_first[0].path]
        loss = checkpoint.val_loss
        return loss if loss is not None and is_comparable else math.inf

    return sorted(newest_first, key=rank)


def _find_fingerprint(checkpoint: Checkpoint) -> Any:
    """Of the data that it was trained on, as its ``config.json`` has it; None where it has none."""
    with contextlib.suppress(PreflightError):
        data = checkpoint.config.get("data")
        return data.get("fingerprint") if isinstance(data, dict) else None
    return None


def _find_bests(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """The best checkpoint on each data folder that the run has seen."""
    groups: dict[str, list[Checkpoint]] = {}
    for checkpoint in newest_first:
        groups.setdefault(str(_find_fingerprint(checkpoint)), []).append(checkpoint)
    return [_sort_by_loss(group)[0] for group in groups.values()]


def retire_checkpoints(output_dir: Path, keep: int, protect: Collection[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep`, the best, and `protect`. Return the deleted folders.

    Where a run has changed its data, the best on each of them stays. Call it only after a save,
    which reads the new checkpoint back. Damaged folders are kept.

    Raises:
        PreflightError: code STORAGE or CHECKPOINT, when a folder cannot be read or deleted.
    """
    found = list_checkpoints(output_dir)
    kept = {c.path for c in found[: max(keep, 1)] + _find_bests(found)} | set(protect)
    retired = [c.path for c in reversed(found) if c.path not in kept]
    for folder in retired:  # oldest first: after a kill the newer ones are left
        try:
            storage.retire_folder(folder)
        except PreflightError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            log.warning(f"{folder.name} was deleted by someone else")
    return retired


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left unfinished. The caller holds the lock of `output_dir`.

    Raises:
        PreflightError: code STORAGE.
    """
    milestones = output_dir / MILESTONES_NAME
    storage.remove_leftovers(output_dir, _SCRATCH_NAMES)
    if storage.refuse_other_kind(milestones, folder=True):
        restore_replaced(milestones)
        storage.remove_leftovers(milestones, rf"(?:retired-|replaced-)?{FOLDER_NAME.pattern}")
        for checkpoint in list_checkpoints(output_dir):
            storage.remove_leftovers(checkpoint.path, re.escape(MANIFEST_NAME))
