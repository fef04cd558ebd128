"""What `--compare` compares: checkpoints under names of their own, and their models in memory."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from generate import load_model, stream_text
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.checkpoints.manifest import FOLDER_NAME
from preflight.checkpoints.naming import name_checkpoints
from preflight.checkpoints.store import open_checkpoint
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.streams import is_on_terminal
from preflight.core.units import format_bytes
from preflight.device.runtime import Runtime
from preflight.models.base import TokenModel
from preflight.models.cost import count_parameters
from preflight.modes.picking import pick_checkpoints
from preflight.settings import RunConfig, SamplingConfig
from preflight.tokenization import Tokenizer

ALL, ASK = "all", "ask"


@dataclass(frozen=True)
class Entry:
    """A checkpoint of the comparison, by its name in tables."""

    name: str
    checkpoint: Checkpoint

    @property
    def n_parameters(self) -> int:
        """Those of its model, whether its file holds all of them or adapters."""
        return count_parameters(self.checkpoint.model_config)


def find_entries(config: RunConfig) -> list[Entry]:
    """The checkpoints to compare, each once, verified, under names of their own.

    Raises:
        PreflightError: code FLAGS, for fewer than two; code CHECKPOINT, for what is none.
    """
    named: list[str] = []
    for value in config.comparison.compare:
        is_word = value in (ALL, ASK) and not os.path.lexists(value)
        choose = {ALL: _find_runs, ASK: _ask_for_checkpoints}[value] if is_word else None
        named += choose(config) if choose else [value]
    found = [open_checkpoint(path) for path in named]
    checkpoints = list({c.path.resolve(): c for c in found}.values())
    if len(checkpoints) < 2:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--compare needs at least two checkpoints, found {len(checkpoints)}",
            f"for example: {format_command('--compare', 'run_a', 'run_b')}",
        )
    names = name_checkpoints(checkpoints, lambda folder, each: f"{folder}, step {each.step:,}")
    return [Entry(*pair) for pair in zip(names, checkpoints, strict=True)]


def _find_runs(config: RunConfig) -> list[str]:
    """Every run below `--output-dir`, or below this folder where it is not given."""
    found = []
    for folder, names, _ in os.walk(_find_root(config)):
        if MILESTONES_NAME in names and _has_checkpoint(Path(folder)):
            found.append(folder)
        names[:] = sorted(n for n in names if n != MILESTONES_NAME and not n.startswith("."))
    return found


def _ask_for_checkpoints(config: RunConfig) -> list[str]:
    """Those that a person chooses: "all", or one after another until there are two."""
    if not is_on_terminal():
        raise PreflightError(
            ExitCode.FLAGS,
            "--compare ask: there is no terminal to ask on",
            f"name them: {format_command('--compare', 'run_a', 'run_b')}",
        )
    found: list[str] = []
    while len(found) < 2:
        picked = [str(path) for path in pick_checkpoints(Path(_find_root(config)))]
        if not picked:
            break
        found += [path for path in picked if path not in found]
    return found


def _find_root(config: RunConfig) -> str:
    return config.control.output_dir if "output_dir" in config.sources else "."


def _has_checkpoint(run_folder: Path) -> bool:
    return any(FOLDER_NAME.fullmatch(name) for name in os.listdir(run_folder / MILESTONES_NAME))


def find_best_entry(entries: Sequence[Entry]) -> Entry | None:
    """The one with the lowest validation loss; None where losses are missing or of other data."""
    losses = {e.name: e.checkpoint.val_loss for e in entries}
    data = {json.dumps(_find_data(e.checkpoint)) for e in entries}
    if None in losses.values() or len(data) > 1 or data == {"null"}:
        log.info("best: unknown, since not all have a validation loss on the same data")
        return None
    return min(entries, key=lambda entry: cast(float, losses[entry.name]))


def _find_data(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of its data folder; it changes with the tokenizer, too."""
    data = checkpoint.config.get("data")
    return data.get("fingerprint") if isinstance(data, dict) else None


# ---- memory -------------------------------------------------------------------------------------


def choose_loading(entries: Sequence[Entry], dtype_bytes: int, free_bytes: int) -> bool:
    """Whether all are kept loaded; else one after the other is. Told before anything is loaded.

    Raises:
        PreflightError: code OUT_OF_MEMORY, when the largest does not fit alone.
    """
    sizes = [entry.n_parameters * dtype_bytes for entry in entries]
    largest, total = max(sizes), sum(sizes)
    if largest > free_bytes:
        raise PreflightError(
            ExitCode.OUT_OF_MEMORY,
            f"{entries[sizes.index(largest)].name} needs {format_bytes(largest)} for its weights, "
            f"{format_bytes(free_bytes)} are free",
            "nothing was loaded; end other programs, or choose another --device",
        )
    # Beside the weights of all, one is read a second time while it goes to the device.
    fits = total + largest <= free_bytes
    how = "all are loaded at once" if fits else "one is loaded after the other, for each prompt"
    log.info(
        f"{len(entries)} checkpoints: {format_bytes(total)} of weights, "
        f"{format_bytes(free_bytes)} free: {how}"
    )
    return fits


class Models:
    """The models of the entries: all of them loaded, or one at a time where memory is short."""

    def __init__(self, entries: Sequence[Entry], runtime: Runtime, free_bytes: int) -> None:
        self.entries, self._runtime = entries, runtime
        self.keeps_all = choose_loading(entries, runtime.dtype.itemsize, free_bytes)
        self._loaded: dict[str, tuple[TokenModel, Tokenizer]] = {}

    def open(self, entry: Entry) -> tuple[TokenModel, Tokenizer]:
        """The model and its tokenizer; another one is freed first where not all fit.

        Raises:
            PreflightError: code CHECKPOINT.
        """
        if entry.name not in self._loaded:
            if not self.keeps_all:
                self._loaded.clear()
                gc.collect()
            loaded = load_model(entry.checkpoint, self._runtime.device, self._runtime.dtype)
            _warm_up(*loaded)
            self._loaded[entry.name] = loaded
        return self._loaded[entry.name]


def _warm_up(model: TokenModel, tokenizer: Tokenizer) -> None:
    """Two tokens that nobody sees: the first ones of a process take longer."""
    list(stream_text(model, tokenizer, "", SamplingConfig(max_new_tokens=2)))
