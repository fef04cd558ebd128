"""What a run tells of each step: rows for the trackers, the progress bar or plain lines."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator

from tqdm import tqdm

from preflight.core.log import is_progress_shown, log
from preflight.core.units import format_seconds
from preflight.device.runtime import Runtime
from preflight.training.divergence import DivergenceGuard
from preflight.training.plan import TrainingPlan
from preflight.training.smoothing import MovingAverage
from preflight.training.state import StepResult, TrainState, convert_to_bits_per_byte
from preflight.training.time_left import TimeLeft
from preflight.training.trackers import Trackers

# Without tqdm's own rate and time left, which count pauses as steps' time.
_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

_BAR_SMOOTHING = 0.98  # of the loss in the bar: an average over some fifty steps


class StepRecorder:
    """Reads finished steps from the device and tells of them.

    On CUDA a step's figures are read while the next step runs, so that nothing waits for them.

    Args:
        tokens_per_byte: of the text that is trained on, for bits per byte.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        runtime: Runtime,
        state: TrainState,
        trackers: Trackers,
        guard: DivergenceGuard,
        tokens_per_byte: float,
    ) -> None:
        self.plan, self.runtime, self.state = plan, runtime, state
        self.trackers, self.guard, self.tokens_per_byte = trackers, guard, tokens_per_byte
        self._smoothed = MovingAverage(_BAR_SMOOTHING)
        self._pending: deque[tuple[StepResult, int]] = deque()  # and the tokens of all steps
        self._lag = 1 if runtime.device.type == "cuda" else 0
        self._last_row = time.monotonic()
        self._time_left = TimeLeft(plan.total_steps)
        self.bar = tqdm(
            total=plan.total_steps,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not is_progress_shown(),
            bar_format=_BAR_FORMAT,
        )

    def record(self, result: StepResult) -> None:
        """Take in one more step.

        Raises:
            PreflightError: code DIVERGED; see `DivergenceGuard`.
        """
        self._pending.append((result, self.state.tokens))
        self.bar.update()
        self._write(self._lag)

    def flush(self) -> None:
        """Read and log every step that is still on the device."""
        self._write(0)

    @contextlib.contextmanager
    def paused(self, kind: str, every: int) -> Iterator[None]:
        """What happens within, every so many steps, is not counted as a step's time.

        A pause within a pause, as the save of the best model in an evaluation, counts once.
        """
        began, row = time.monotonic(), self._last_row
        yield
        seconds = time.monotonic() - began - (self._last_row - row)
        self._last_row += seconds
        self._time_left.add_pause(kind, every, seconds)

    def _write(self, keep: int) -> None:
        """Log all pending steps but the newest `keep`."""
        while len(self._pending) > keep:
            result, tokens = self._pending.popleft()
            loss, norm = float(result.loss), float(result.grad_norm)  # waits for the device
            now = time.monotonic()
            seconds, self._last_row = now - self._last_row, now
            self._time_left.add_step(seconds)
            tokens_per_second = result.tokens / max(seconds, 1e-9)
            finite = math.isfinite(loss) and math.isfinite(norm)
            row = {
                "event": "step",
                "step": result.step,
                "loss": loss,
                "bits_per_byte": convert_to_bits_per_byte(loss, self.tokens_per_byte),
                "learning_rate": result.learning_rate,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": round(tokens_per_second, 1),
                "peak_memory_bytes": self.runtime.peak_memory_bytes(),
            }
            self.trackers.log(row if finite else row | {"skipped": True})
            self._show(result, loss, tokens_per_second)
            self.guard.check(result, finite, norm)

    def _show(self, result: StepResult, loss: float, tokens_per_second: float) -> None:
        parts = [f"{tokens_per_second:,.0f} tokens/s"]
        left = self._time_left.estimate(result.step)
        if left is not None:
            parts.append(f"ETA {format_seconds(left)}")
        smoothed = self._smoothed.add(loss)
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join([f"loss {smoothed:.3f}", *parts]), refresh=False)
        elif result.step % self.plan.log_every == 0 or result.step == 1:
            parts.insert(0, f"learning rate {result.learning_rate:.2e}")
            step = f"step {result.step:,}/{self.plan.total_steps:,}"
            bits = convert_to_bits_per_byte(loss, self.tokens_per_byte)
            log.info("  ".join([step, f"loss {loss:.4f}", f"{bits:.3f} bits per byte", *parts]))
