"""`--train`: prepare the text where needed, then train, losing nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints.store import find_best
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes, format_seconds
from preflight.corpus.sources import find_sources
from preflight.device.ranks import is_lost_rank
from preflight.device.runtime import is_out_of_memory
from preflight.foresight.fits import explain_out_of_memory, explain_rank_out_of_memory
from preflight.foresight.learnability import find_short_text
from preflight.models.cost import count_parameters
from preflight.modes.continuing import describe_run_changes
from preflight.modes.forecast import compare_with_forecast
from preflight.modes.ranked import RunKind, run_on_ranks
from preflight.modes.run_memory import describe_memory
from preflight.modes.run_plan import save_plan
from preflight.modes.setup import RunSetup
from preflight.modes.trying import list_train_words
from preflight.settings import (
    RunConfig,
    SamplingConfig,
    describe_choices,
    model_config_to_dict,
)
from preflight.training.curve import CURVE_NAME, LossCurve
from preflight.training.divergence import DivergenceGuard
from preflight.training.evaluating import Evaluator
from preflight.training.metrics import METRICS_NAME, read_metrics
from preflight.training.plan import describe_windows
from preflight.training.recording import StepRecorder
from preflight.training.saving import CheckpointSaver
from preflight.training.sharing import describe_sharing
from preflight.training.state import Evaluation, convert_to_bits_per_byte
from preflight.training.trackers import Trackers


def run(config: RunConfig) -> int:
    """Prepare the text, train, and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    find_sources(config.data)  # a misspelt file is told before any folder is made
    return run_on_ranks(config, RunKind(RunSetup, lambda setup: TrainingRun(setup).run()))


class TrainingRun:
    """One run from its first or its resumed step to its end."""

    def __init__(self, setup: RunSetup) -> None:
        self.setup, self.ranks, self.output_dir = setup, setup.ranks, setup.output_dir
        self.stop = self.ranks.share_signals(setup.stop)
        self.config, self.plan, self.state = setup.config, setup.plan, setup.state
        self.state.eval_windows = self.plan.eval_windows
        self.runtime = setup.runtime
        self.trackers = Trackers(
            self.output_dir, self.config.control, is_first_rank=self.ranks.is_first
        )
        self.trainer = setup.build_trainer()
        guard = DivergenceGuard(self.output_dir, fp16=self.runtime.needs_scaler)
        self.recorder = StepRecorder(
            self.plan,
            self.runtime,
            self.state,
            self.trackers,
            guard,
            tokens_per_byte=setup.measure_tokens_per_byte("train"),
        )
        self.saver = CheckpointSaver(
            self.output_dir,
            self.plan,
            self.config.control,
            self.state,
            self.recorder,
            self.stop,
            setup.origin,
            self._take_snapshot,
            self.ranks,
        )
        self.evaluator = Evaluator(
            self.plan,
            self.state,
            self.recorder,
            self.saver,
            self.stop,
            evaluate=self._evaluate,
            sample=self._sample,
            draw=self._draw_curve,
        )

    def run(self) -> int:
        """Train to the end of the plan, or until a signal; the exit code."""
        announce(self.setup)
        if self.state.step > self.plan.total_steps or self.ranks.decide(self._is_finished):
            log.info(
                f"this run is finished: {self.state.step:,} steps trained; "
                f"to train longer: --max-steps {2 * self.state.step}"
            )
            return ExitCode.DONE
        self.ranks.decide(lambda: save_plan(self.setup))
        self.trackers.resume(self.state.step)
        self.curve = LossCurve(read_metrics(self.output_dir / METRICS_NAME))
        self.trackers.add(self.curve)
        if self.state.step:
            self.trackers.log({"event": "resume", "step": self.state.step})
        began = time.monotonic()
        with (
            self.setup.open_loader(self.state.cursor) as loader,
            self.recorder.bar,
            self._drawing_at_the_end(),
        ):
            try:
                self.trainer.train(
                    self.state, loader, self.recorder, self.saver, self.evaluator, self.stop
                )
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure: BaseException | None = error.with_traceback(None)
                del self.trainer  # room for the picture and the explanation
            else:
                failure = None
        if failure is not None:
            raise self._explain_out_of_memory(failure)
        return self._conclude(time.monotonic() - began)

    def _explain_out_of_memory(self, failure: BaseException) -> PreflightError:
        newest = self.saver.newest_path or "none yet"
        if self.ranks.world > 1:
            words = ["--ranks", self.ranks.world, "--hosts", self.ranks.hosts]
            words += [w for w in list_train_words(self.setup.given) if w != "--train"]
            command = format_command("--check", *words)
            training, rank = self.config.training, self.ranks.rank
            return explain_rank_out_of_memory(
                failure, training, self.runtime, rank, command, newest
            )
        case = describe_memory(self.setup, self.runtime, self.plan.window_tokens)
        return explain_out_of_memory(failure, **case | {"last_checkpoint": newest})

    def _take_snapshot(self) -> dict[str, Any]:
        """What a checkpoint of this moment holds."""
        return {
            "weights": self.trainer.list_weights(),
            "optimizer": self.trainer.list_optimizer_tensors(),
            "training_state": {
                "state": dataclasses.asdict(self.state),
                "trainer": self.trainer.state_dict(),
                "data_fingerprint": self.setup.data.fingerprint,
                "tokens_per_step": self.plan.tokens_per_step,
            },
            "config": describe_run(self.setup),
            "losses": {"val_loss": None},
            "tokenizer": self.setup.tokenizer,
            "adapter": self.config.training.adapter,
            "extra_files": self.setup.list_extra_files(),
        }

    def _evaluate(self) -> Evaluation | None:
        windows = self.setup.list_validation(self.plan.eval_windows)
        tokens_per_byte = self.setup.measure_tokens_per_byte("val")
        return self.trainer.evaluate(windows, tokens_per_byte, self.stop)

    def _sample(self) -> str:
        sampling = SamplingConfig(max_new_tokens=SAMPLE_TOKENS, seed=self.config.training.seed)
        self.trainer.model.eval()
        with self.runtime.autocast(), self.ranks.open_root(self.trainer.model):
            text = generate_text(self.trainer.model, self.setup.tokenizer, "", sampling)
        self.trainer.model.train()
        return text

    @contextlib.contextmanager
    def _drawing_at_the_end(self) -> Iterator[None]:
        """Draw the loss curve, however the run ends. The first error is the one that is told.

        After the loss of another rank the next start is not kept waiting for a picture.
        """
        try:
            yield
        except BaseException as error:
            if not is_lost_rank(error):
                with contextlib.suppress(PreflightError):
                    self._draw_curve()
            raise
        self._draw_curve()

    def _draw_curve(self) -> None:
        if not self.ranks.is_first:
            return
        model = self.setup.model_config
        title = (
            f"{model.label}, {count_parameters(model) / 1e6:,.1f}M parameters, "
            f"{self.plan.tokens_per_step:,} tokens per step"
        )
        self.curve.save(self.output_dir / CURVE_NAME, title)

    def _is_finished(self) -> bool:
        """Whether the last step is evaluated too: a run may be cut between save and evaluation."""
        if self.state.step != self.plan.total_steps:
            return False
        rows = read_metrics(self.output_dir / METRICS_NAME)
        sampled = any((row["event"], row["step"]) == ("sample", self.state.step) for row in rows)
        drawn = (self.output_dir / CURVE_NAME).exists()
        return sampled and drawn

    def _conclude(self, seconds: float) -> int:
        step = self.state.step
        if not self.ranks.is_first:
            return self.stop.exit_code
        if self.stop.stopping:
            newest = self.saver.newest_path or "no checkpoint yet"
            log.info(f"stopped at step {step:,}; newest checkpoint: {newest}")
            log.info("run the same command again to continue exactly from there")
            return self.stop.exit_code
        best = find_best(self.output_dir)
        log.info(
            f"done: {step:,} steps, {self.state.tokens:,} tokens in {format_seconds(seconds)}; "
            f"peak memory {format_bytes(self.runtime.peak_memory_bytes())}"
        )
        if best.val_loss is not None:
            tokens_per_byte = self.setup.measure_tokens_per_byte("val")
            bits = convert_to_bits_per_byte(best.val_loss, tokens_per_byte)
            log.info(
                f"best: {best.path} (step {best.step:,}, validation loss {best.val_loss:.4f}, "
                f"{bits:.3f} bits per byte)"
            )
        compared = compare_with_forecast(self.setup)
        if compared:
            log.info(compared)
        log.info(f"loss curve: {self.output_dir / CURVE_NAME}")
        self._suggest()
        return ExitCode.DONE

    def _suggest(self) -> None:
        """What to do with the model."""
        command = format_command("--generate", "--output-dir", self.output_dir)
        log.info(f"generate text: {command}")


def describe_run(setup: RunSetup) -> dict[str, Any]:
    """What ``config.json`` says: enough to generate and to resume without any flag."""
    data = setup.data
    return {
        "model": model_config_to_dict(setup.model_config),
        "tokenizer": setup.tokenizer.describe(),
        "training": dataclasses.asdict(setup.config.training),
        "data": {
            "fingerprint": data.fingerprint,
            "train_tokens": data.train.n_tokens,
            "val_tokens": data.val.n_tokens,
        },
        "runtime": setup.describe_machine(),
        **describe_sharing(setup.samples_per_step, setup.ranks.world),
        **setup.describe_extra(),
    }


def announce(setup: RunSetup) -> None:
    """Log every choice that was made for this run."""
    if not setup.given.finetuning.finetune:
        for advice in find_short_text(setup.model_config, setup.plan, setup.data):
            log.warning(advice.text)
    config, plan, state, data = setup.config, setup.plan, setup.state, setup.data
    model, parameters = setup.model_config, count_parameters(setup.model_config)
    for line in describe_choices(setup.adopted):
        log.info(f"set: {line}")
    for note in setup.runtime.notes:
        log.info(note)
    log.info(
        f"model: {model.label}, {parameters:,} parameters, context "
        f"{model.context_length:,}, vocabulary {model.vocab_size:,}"
    )
    log.info(
        f"data: {data.train.n_tokens:,} tokens to train on, {data.val.n_tokens:,} to validate "
        f"({plan.eval_windows} {'chats' if config.finetuning.finetune else 'windows'} each time)"
    )
    log.info(setup.data_place.note)
    windows = describe_windows(config.training, plan, model.context_length)
    if windows:
        log.info(f"windows: {windows}")
    if setup.ranks.world > 1:
        log.info(
            f"ranks: {setup.ranks.world}, each with up to {config.training.batch_size} sequences "
            f"in a micro-step; {plan.samples_per_step} sequences in an update, in "
            f"{plan.accumulation_steps} micro-steps"
        )
    tokens = plan.total_steps * plan.tokens_per_step
    log.info(
        f"plan: {plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{plan.epochs:.2f} epochs, "
        f"{tokens / parameters:.2f} tokens per parameter"
    )
    log.info(
        f"plan: {config.training.optimizer}, peak learning rate {plan.peak_learning_rate:.1e}, "
        f"{plan.scheduler} after {plan.warmup_steps:,} steps of warm-up; evaluation every "
        f"{plan.eval_every:,}, checkpoint every {plan.checkpoint_every:,} steps or "
        f"{config.control.checkpoint_minutes:g} minutes"
    )
    if setup.origin is None and setup.base is not None:
        log.info(f"beginning with the weights of {setup.base.path} (step {setup.base.step:,})")
    if setup.origin is not None and state.step:
        log.info(
            f"continuing from {setup.origin.path} (step {state.step:,}, "
            f"{state.tokens:,} tokens, sample {state.cursor:,})"
        )
    for line in describe_run_changes(setup):
        log.info(line)
