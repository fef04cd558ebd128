"""A two-step choice of checkpoints: first the run, then the checkpoint in it."""

from __future__ import annotations

from pathlib import Path

from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.modes.asking import Asker, Choice, open_asker
from preflight.modes.folder_state import CheckpointState, RunState, find_runs, show


def pick_checkpoints(root: Path, asker: Asker | None = None) -> list[Path]:
    """Ask which checkpoints in `root` are meant; their folders, and none if nothing was chosen.

    The best of a run is green, the newest blue. "all" stands for all checkpoints of a run, or for
    the best of every run.

    Raises:
        PreflightError: code CHECKPOINT, when there are none.
    """
    runs = [run for run in find_runs(root) if run.checkpoints]
    if not runs:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"no run with a checkpoint in {root}",
            f"train one first: {format_command('--train')}",
        )
    asker = asker or open_asker()
    picked = pick_runs(runs, asker, all_text="all: the best checkpoint of every run")
    if len(picked) == 1:
        return _pick_in_run(picked[0], asker)
    return [run.best.path for run in picked if run.best]


def pick_runs(runs: list[RunState], asker: Asker, all_text: str = "") -> list[RunState]:
    """The run that is chosen, or all, which is offered with `all_text`; none for no answer."""
    if len(runs) == 1:
        return runs
    choices = [Choice(run.describe()) for run in runs]
    choices += [Choice(all_text)] if all_text else []
    index = asker.choose("Which run?", choices)
    if index is None:
        return []
    return [runs[index]] if index < len(runs) else runs


def _pick_in_run(run: RunState, asker: Asker) -> list[Path]:
    newest, best = run.checkpoints[0], run.best
    choices = [_describe_checkpoint(c, newest, best) for c in run.checkpoints]
    if len(choices) == 1:
        return [newest.path]
    index = asker.choose(
        f"Which checkpoint of {show(run.folder)}?", [*choices, Choice("all of them")]
    )
    if index is None:
        return []
    if index == len(choices):
        return [checkpoint.path for checkpoint in run.checkpoints]
    return [run.checkpoints[index].path]


def _describe_checkpoint(
    checkpoint: CheckpointState, newest: CheckpointState, best: CheckpointState | None
) -> Choice:
    loss = checkpoint.val_loss
    text = f"step {checkpoint.step:,}"
    text += "" if loss is None else f", validation loss {loss:.4f}"
    words = [w for w, c in (("best", best), ("newest", newest)) if c == checkpoint]
    colour = {"best": "green", "newest": "blue"}.get(words[0] if words else "", "")
    return Choice(f"{text} ({' and '.join(words)})" if words else text, colour)
