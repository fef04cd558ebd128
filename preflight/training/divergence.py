"""When a run has diverged, or learns nothing: gradients that are not finite, or all zero."""

from __future__ import annotations

from pathlib import Path

from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log_once
from preflight.training.state import StepResult

# A gradient scaler starts at 2^16 and halves at each overflow, so fp16 may need more of them.
MAX_SKIPPED_IN_A_ROW = 10
MAX_SKIPPED_IN_A_ROW_FP16 = 40


class DivergenceGuard:
    """Counts skipped updates, and ends the run when there are too many in a row."""

    def __init__(self, output_dir: Path, *, fp16: bool) -> None:
        self.output_dir, self.fp16 = output_dir, fp16
        self.limit = MAX_SKIPPED_IN_A_ROW_FP16 if fp16 else MAX_SKIPPED_IN_A_ROW
        self.skipped_in_a_row = 0

    def check(self, result: StepResult, finite: bool, norm: float) -> None:
        """Count one step.

        Raises:
            PreflightError: code DIVERGED, with the last good checkpoint.
        """
        if norm == 0.0:
            log_once(
                "warning: all gradients are zero in a step, so that nothing is learned from it; "
                "if the loss does not fall, try --no-compile-model"
            )
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row < self.limit:
            return
        good = list_checkpoints(self.output_dir)
        raise PreflightError(
            ExitCode.DIVERGED,
            f"diverged: loss or gradient not finite in {self.limit} steps up to step "
            f"{result.step:,} (learning rate {result.learning_rate:.2e}, gradient norm {norm}); "
            "no such update was applied",
            f"last good checkpoint: {good[0].path if good else 'none yet'}",
            "lower --learning-rate" + (", or use --no-mixed-precision" if self.fp16 else ""),
        )
