"""When a run is evaluated: the validation loss, a sample of text, the loss curve."""

from __future__ import annotations

import time
from collections.abc import Callable

from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.training.curve import CURVE_EVERY_SECONDS
from preflight.training.plan import TrainingPlan
from preflight.training.recording import StepRecorder
from preflight.training.saving import CheckpointSaver
from preflight.training.state import Evaluation, TrainState


class Evaluator:
    """Evaluates at the plan's interval, and at the end.

    Args:
        evaluate: the validation figures of the model as it is; ``None`` when a signal came.
        sample: a text that the model generates.
        draw: draws the loss curve.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        state: TrainState,
        recorder: StepRecorder,
        saver: CheckpointSaver,
        stop: StopFlag,
        *,
        evaluate: Callable[[], Evaluation | None],
        sample: Callable[[], str],
        draw: Callable[[], None],
    ) -> None:
        self.plan, self.state, self.recorder, self.saver = plan, state, recorder, saver
        self.stop, self.evaluate, self.sample, self.draw = stop, evaluate, sample, draw
        self._drawn = time.monotonic()

    def evaluate_if_due(self) -> None:
        """Evaluate this step, once. The last step is saved first: then nothing can be lost."""
        step = self.state.step
        due = step % self.plan.eval_every == 0 or step == self.plan.total_steps
        if not due or step == 0 or self.state.evaluated_step == step or self.stop.stopping:
            return
        if step == self.plan.total_steps:
            self.saver.save()
        self.recorder.flush()
        began = time.monotonic()
        with self.recorder.paused("evaluation", self.plan.eval_every):
            result = self.evaluate()
            if result is None:
                return
            self._tell(result)
            self._sample()
            if time.monotonic() - self._drawn > CURVE_EVERY_SECONDS:
                self._drawn = time.monotonic()
                self.draw()
        log.debug(f"  evaluation and sample took {time.monotonic() - began:.2f} s")

    def _tell(self, result: Evaluation) -> None:
        state = self.state
        is_best = state.best_val_loss is None or result.loss < state.best_val_loss
        state.best_val_loss = result.loss if is_best else state.best_val_loss
        state.stale_evaluations = 0 if is_best else state.stale_evaluations + 1
        state.evaluated_step = state.step
        if is_best and self.plan.patience:
            self.saver.save()  # the best model is what the run is stopped for
        self.saver.record_validation(result.loss)
        self.recorder.trackers.log(
            {
                "event": "eval",
                "step": state.step,
                "val_loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "tokens": state.tokens,
                "windows": self.plan.eval_windows,
            }
        )
        log.info(
            f"step {state.step:,}: validation loss {result.loss:.4f}, perplexity "
            f"{result.perplexity:,.1f}, {result.bits_per_byte:.3f} bits per byte"
            + (" (best so far)" if is_best else "")
        )
        if state.stale_evaluations == self.plan.patience:
            log.info(
                f"stopping early: {self.plan.patience} evaluations without a validation loss "
                f"below {state.best_val_loss:.4f}"
            )

    def _sample(self) -> None:
        """Generate a little text, so that a person sees what the model has learned."""
        text = self.sample()
        self.recorder.trackers.log({"event": "sample", "step": self.state.step, "text": text})
        log.info("  sample: " + " ".join(text.split())[:300])
