"""How several processes share an update: its samples stay, whatever their number."""

from __future__ import annotations

import dataclasses
from typing import Any

from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import CONFIG_NAME
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import RunConfig, TrainingSettings
from preflight.settings.options import MAX_COUNT
from preflight.training.resume import read_saved_settings


def choose_samples_per_step(config: RunConfig, origin: Checkpoint | None, world: int) -> int:
    """The samples of an update, over all ranks.

    Those of the checkpoint, unless a flag changes the accumulation, or the batch size on as many
    ranks as before.

    Args:
        config: with the checkpoint's settings where no flag says otherwise.
        origin: that the run continues from, if any.
        world: the number of ranks.

    Raises:
        PreflightError: code FLAGS, for more ranks than samples.
    """
    training = config.training
    samples = training.batch_size * training.gradient_accumulation_steps * world
    if origin is None:
        return samples
    before, saved = read_samples_per_step(origin), read_saved_settings(origin)
    names = ["gradient_accumulation_steps"]
    if _read_count(origin, "ranks", 1) == world:
        names.append("batch_size")
    changed = [name for name in names if name in saved and getattr(training, name) != saved[name]]
    if any(name in config.sources for name in changed):
        return samples
    if world > before:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--ranks {world}: more than the {before:,} sequences of an update of {origin.path}",
            f"use --ranks {before} or less, or start a new run in another --output-dir",
        )
    return before


def count_micro_steps(samples_per_step: int, training: TrainingSettings, world: int) -> int:
    """Micro-steps of an update, in which no rank has more than the batch size."""
    return -(-samples_per_step // (training.batch_size * world))


def read_samples_per_step(origin: Checkpoint) -> int:
    """The samples of an update of the checkpoint's run, over all its ranks."""
    training = dataclasses.replace(TrainingSettings(), **read_saved_settings(origin))
    own = training.batch_size * training.gradient_accumulation_steps
    return _read_count(origin, "samples_per_step", own)


def describe_sharing(samples_per_step: int, world: int) -> dict[str, Any]:
    """What ``config.json`` says of it."""
    return {"samples_per_step": samples_per_step, "ranks": world}


def _read_count(origin: Checkpoint, name: str, default: int) -> int:
    found = origin.config.get(name, default)
    if type(found) is not int or not 1 <= found <= MAX_COUNT:
        raise damage_error(origin.path / CONFIG_NAME, f"{name} is {str(found)[:40]!r}")
    return found
