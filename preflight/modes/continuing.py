"""A run that continues from a checkpoint: what may differ from before, and what is told of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from preflight.checkpoints.format import Checkpoint
from preflight.core.commands import join_words
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import choose_window
from preflight.device.runtime import build_runtime
from preflight.device.token_store import measure_free_bytes
from preflight.modes.run_memory import check_memory
from preflight.training.changes import describe_changes, describe_schedule
from preflight.training.resume import read_saved_settings, resolve_model
from preflight.training.state import TrainState

if TYPE_CHECKING:
    from preflight.modes.setup import RunSetup


def check_replacement(
    setup: RunSetup, reason: str, old_fingerprint: str | None, built: DataFolder | None
) -> None:
    """Keep a data folder from being replaced for a run that is refused afterwards.

    See `preflight.corpus.build.MayReplace`.
    """
    if built is not None and setup.resumes:
        window = choose_window(built.train.n_tokens, setup.window_length)
        model = resolve_model(setup.known_config, built.load_tokenizer(), setup.known_source)
        runtime = build_runtime(setup.given.system)
        device = runtime.device
        place = setup.place_data(built, device.type, measure_free_bytes(device))
        check_memory(setup, runtime, window, model, place.n_bytes)
    origin, flags = setup.known_origin, setup.given
    if origin is None or flags.control.resume_from:
        return
    trained_on = (origin.config.get("data") or {}).get("fingerprint")
    if trained_on is None or trained_on == (built and built.fingerprint):
        return
    if built is None and trained_on != old_fingerprint:
        return  # the old one is of another run; the new one may be this run's
    raise PreflightError(
        ExitCode.DATA,
        f"{flags.data.data_dir} would be rebuilt because {reason}, and the result is not what "
        f"{origin.path} was trained on",
        "nothing was changed; restore the text, or leave out --text-file, to continue exactly",
        "to train a new model on the new text: another --data-dir and --output-dir",
        f"to continue on the new text: {join_words('--resume-from', origin.path)}",
    )


def restore_state(setup: RunSetup, origin: Checkpoint) -> TrainState:
    """Where the origin's run stood; at the beginning of its data, where that is new.

    Raises:
        PreflightError: code DATA, when the data is new and `--resume-from` does not name the
            origin.
    """
    state = TrainState.restore(setup.saved["state"])
    fingerprint = setup.saved["data_fingerprint"]
    if fingerprint == setup.data.fingerprint:
        return state
    if not setup.given.control.resume_from:
        raise PreflightError(
            ExitCode.DATA,
            f"{setup.given.data.data_dir} is not the data that {origin.path} was trained on "
            f"(fingerprint {fingerprint[:12]}, now {setup.data.fingerprint[:12]})",
            "start anew with another --output-dir, or continue on the new data: "
            + join_words("--resume-from", origin.path),
        )
    log.info("the data is new to this checkpoint: training starts at its beginning")
    return dataclasses.replace(
        state, cursor=0, eval_windows=0, best_val_loss=None, stale_evaluations=0
    )


def check_tokens_per_step(setup: RunSetup, before: int, now: int) -> None:
    """Refuse another number of tokens per step than the origin's, unless flags allow it.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    if before != now and not setup.given.control.allow_batch_change:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"the checkpoint has {before:,} tokens per step, this run would have {now:,}",
            "keep --batch-size x --gradient-accumulation-steps, or give --allow-batch-change",
        )


def describe_run_changes(setup: RunSetup) -> list[str]:
    """What a run does otherwise than the one before it, besides the settings."""
    if setup.origin is None or not setup.state.step:
        return []
    lines = describe_changes(setup.origin.config.get("runtime"), setup.describe_machine())
    dropouts = [{"dropout": m.dropout} for m in (setup.origin.model_config, setup.model_config)]
    lines += describe_changes(*dropouts)
    before = dataclasses.replace(setup.config.training, **read_saved_settings(setup.origin))
    schedule = describe_schedule(setup.state.step, setup.build_plan_of(before), setup.plan)
    return [*lines, *([schedule] if schedule else [])]
