"""When a run saves a checkpoint, and how."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preflight.checkpoints.format import (
    MILESTONES_NAME,
    Checkpoint,
    record_validation,
)
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import retire_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import explain_errors
from preflight.device.ranks import Ranks, local_ranks
from preflight.settings import ControlSettings
from preflight.training.plan import TrainingPlan
from preflight.training.recording import StepRecorder
from preflight.training.schedules import find_extension_step
from preflight.training.state import TrainState


class CheckpointSaver:
    """Saves the run's state, once a step, and never that of a run that is diverging.

    Args:
        output_dir: the run's folder; it must stay the one that is locked.
        origin: the checkpoint that the run continues from.
        snapshot: what `save_checkpoint` stores besides the step, made when all ranks call it.
        ranks: the processes of the run, which save together; unset: one.

    Raises:
        PreflightError: code STORAGE, when the folder is gone.
    """

    def __init__(
        self,
        output_dir: Path,
        plan: TrainingPlan,
        control: ControlSettings,
        state: TrainState,
        recorder: StepRecorder,
        stop: StopFlag,
        origin: Checkpoint | None,
        snapshot: Callable[[], dict[str, Any]],
        ranks: Ranks | None = None,
    ) -> None:
        self.output_dir, self.plan, self.control, self.state = output_dir, plan, control, state
        self.recorder, self.stop, self.origin, self.snapshot = recorder, stop, origin, snapshot
        self.ranks = ranks or local_ranks()
        # A checkpoint of this run that was not evaluated yet still gets its validation loss.
        is_own = origin is not None and origin.path.parent == output_dir / MILESTONES_NAME
        self.saved = origin if is_own else None
        self._saved_step = state.step if origin is not None else -1
        self._last_save = time.monotonic()
        with explain_errors(output_dir):
            self._place = output_dir.stat()
        self._extension_step = find_extension_step(plan)

    @property
    def newest_path(self) -> Path | None:
        """The newest checkpoint of the run, or the one that it continues from."""
        newest = self.saved or self.origin
        return newest.path if newest else None

    def save_if_due(self) -> None:
        """Save at the plan's interval, after the minutes of the flags, or on SIGUSR1.

        Also where the learning rate begins to fall, if the run can be made longer from there.
        """
        minutes = (time.monotonic() - self._last_save) / 60
        due = (
            self.state.step % self.plan.checkpoint_every == 0
            or minutes >= self.control.checkpoint_minutes
            or self.stop.save_requested
            or self.state.step == self._extension_step
        )
        if self.ranks.any(due) and self.state.step < self.plan.total_steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one.

        Raises:
            PreflightError: code STORAGE.
        """
        self.recorder.flush()
        if self._saved_step == self.state.step or self.recorder.guard.skipped_in_a_row:
            return
        began = time.monotonic()
        with self.recorder.paused("save", self.plan.checkpoint_every):
            self.stop.save_requested = False
            self.ranks.decide(self._check_place)
            self.saved = save_checkpoint(
                self.output_dir, self.state.step, **self.snapshot(), ranks=self.ranks
            )
            self.ranks.decide(self.retire)
        self._saved_step, self._last_save = self.state.step, time.monotonic()
        log.debug(f"step {self.state.step:,}: saved in {self._last_save - began:.2f} s")

    def retire(self) -> None:
        """Delete the checkpoints that are neither among the newest nor the best.

        The one that the run can be made longer from stays as well.
        """
        if self.saved is not None:
            keep = self.control.max_checkpoints
            start = self.output_dir / MILESTONES_NAME / f"checkpoint-{self._extension_step}"
            retire_checkpoints(self.output_dir, keep, protect=(self.saved.path, start))

    def record_validation(self, loss: float) -> None:
        """Give the checkpoint of this step, if there is one, its validation loss."""
        if self.saved is None or self._saved_step != self.state.step:
            return
        saved = self.saved
        if self.ranks.decide(lambda: not os.path.lexists(saved.path)):
            log.warning(f"{saved.path.name} was deleted by someone else: it is saved again")
            self._saved_step = -1
            self.save()
        if self._saved_step == self.state.step:
            saved = self.saved
            self.saved = self.ranks.decide(lambda: record_validation(saved, loss))

    def _check_place(self) -> None:
        """Never follow what has been put in the place of the folder that is locked."""
        with contextlib.suppress(FileNotFoundError):  # the save says that it is gone
            if os.path.samestat(self.output_dir.stat(), self._place):
                return
            raise PreflightError(
                ExitCode.STORAGE,
                f"cannot save step {self.state.step:,}: {self.output_dir} is no longer the folder "
                "that this run began in",
                "put that folder back, then run the same command again",
            )
