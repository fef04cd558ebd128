"""`--train`: the loop around `Trainer` that logs, saves, evaluates, resumes and loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.core.storage import check_writable, make_folder
from preflight.core.units import format_bytes, format_seconds
from preflight.corpus.build import prepare_data
from preflight.corpus.shards import DataFolder
from preflight.corpus.sources import find_inputs
from preflight.device.host_memory import available_host_bytes, reachable_host_bytes
from preflight.device.runtime import Runtime, build_runtime, is_out_of_memory
from preflight.foresight.memory import (
    CUDA_CONTEXT_BYTES,
    MemoryEstimate,
    MemoryOptions,
    build_batch_curve,
    estimate_least_bytes,
    estimate_memory,
    estimate_savings,
)
from preflight.models.cost import count_parameters
from preflight.settings import ModelConfig, RunConfig, SamplingConfig, describe_choices
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer
from preflight.training.curve import CURVE_EVERY_SECONDS, CURVE_NAME, save_loss_curve
from preflight.training.metrics import METRICS_NAME, MetricsLog, read_metrics
from preflight.training.plan import TrainState, build_plan
from preflight.training.resume import adopt_settings, find_origin, resolve_model
from train_utils import BatchLoader, count_windows, iterate_windows
from trainer import StepResult, build_trainer

# Updates in a row that may be skipped for a loss or gradient that is not finite. A gradient
# scaler starts at 2^16 and halves at each overflow, so fp16 may need more of them.
MAX_SKIPPED_IN_A_ROW = 10
MAX_SKIPPED_IN_A_ROW_FP16 = 40
_ROOMY = 64  # a step needs less than this many times what it needs at least


def run(config: RunConfig) -> int:
    """Prepare the text, train, and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    find_inputs(config.data)  # a misspelt file is told before any folder is made
    output_dir = Path(config.control.output_dir)
    make_folder(output_dir)
    with StopFlag() as stop, FolderLock(output_dir):
        check_writable(output_dir)  # under the lock: two probes at once would disturb each other
        store.remove_leftovers(output_dir)
        origin = find_origin(config, output_dir)
        if origin is not None:
            config = adopt_settings(config, origin)
        tokenizer = load_tokenizer(config.model.tokenizer)
        model_config = resolve_model(config, tokenizer, origin)
        data = prepare_data(config.data, tokenizer, model_config.context_length, stop)
        # Readers share the data folder; a preparation that would replace it is locked out.
        with FolderLock(Path(config.data.data_dir), shared=True):
            return TrainingRun(config, model_config, tokenizer, data, origin, stop).run()


class TrainingRun:
    """One run from its first or its resumed step to its end."""

    def __init__(
        self,
        config: RunConfig,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        data: DataFolder,
        origin: Checkpoint | None,
        stop: StopFlag,
    ) -> None:
        self.config, self.tokenizer, self.data, self.stop = config, tokenizer, data, stop
        self.model_config = model_config
        self.output_dir = Path(config.control.output_dir)
        self._place = self.output_dir.stat()
        self.log = MetricsLog(self.output_dir / METRICS_NAME)
        self.state, saved = self._read_state(origin)
        context = model_config.context_length
        self.plan = build_plan(
            config.resolve_training(),
            config.control,
            context,
            count_windows(data.train.n_tokens, context),
            count_windows(data.val.n_tokens, context),
            self.state,
        )
        self.state.eval_windows = self.plan.eval_windows
        self._check_batch(saved)
        self.runtime: Runtime = build_runtime(
            config.system, self.plan.total_steps - self.state.step
        )
        self._saved_step = self.state.step if origin is not None else -1
        # Evaluated only now, it still gets its validation loss; one of another run never does.
        own = self.output_dir / checkpoint_format.MILESTONES_NAME
        self._saved = origin if origin is not None and origin.path.parent == own else None
        self._origin_path = origin.path if origin is not None else None
        self._check_memory()
        self.trainer = build_trainer(
            model_config,
            config.training,
            self.plan,
            self.runtime,
            gradient_checkpointing=config.system.gradient_checkpointing,
        )
        if origin is not None:
            shapes = {n: tuple(p.shape) for n, p in self.trainer.model.named_parameters()}
            self.trainer.load_state_dict(
                checkpoint_format.load_weights(origin, shapes), saved["trainer"]
            )
        self._skipped_in_a_row = 0
        self._pending: deque[StepResult] = deque()
        # On CUDA a step's figures are read when the next one is under way: no waiting.
        self._lag = 1 if self.runtime.device.type == "cuda" else 0
        self._curve_drawn = self._last_save = self._last_row = time.monotonic()
        self._bar = tqdm(
            total=self.plan.total_steps,
            initial=self.state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not is_progress_shown(),
            smoothing=0.1,
        )

    def _read_state(self, origin: Checkpoint | None) -> tuple[TrainState, dict[str, Any]]:
        if origin is None:
            return TrainState(), {}
        saved = checkpoint_format.load_training_state(origin)
        try:
            state = TrainState(**saved["state"])
            fingerprint = saved["data_fingerprint"]
        except (KeyError, TypeError) as error:
            raise PreflightError(
                ExitCode.CHECKPOINT, f"{origin.path}/checkpoint.pt lacks a field: {error}"
            ) from None
        if fingerprint != self.data.fingerprint:
            if not self.config.control.resume_from:
                raise PreflightError(
                    ExitCode.DATA,
                    f"{self.config.data.data_dir} is not the data that {origin.path} was trained "
                    f"on (fingerprint {fingerprint[:12]}, now {self.data.fingerprint[:12]})",
                    "start anew with another --output-dir, or go on with the new data: "
                    f"--resume-from {origin.path}",
                )
            log.info("the data is new to this checkpoint: it is read from its beginning")
            state = dataclasses.replace(state, cursor=0, eval_windows=0, best_val_loss=None)
        return state, saved

    def _check_batch(self, saved: dict[str, Any]) -> None:
        before = saved.get("tokens_per_step", self.plan.tokens_per_step)
        if before == self.plan.tokens_per_step:
            return
        if not self.config.control.allow_batch_change:
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"the checkpoint has {before:,} tokens per step, the flags ask for "
                f"{self.plan.tokens_per_step:,}",
                "keep --batch-size x --gradient-accumulation-steps, or give --allow-batch-change",
            )
        log.info(f"tokens per step change from {before:,} to {self.plan.tokens_per_step:,}")

    def _check_memory(self) -> None:
        """On the CPU what does not fit would not fail but thrash for hours: said before it starts.

        Raises:
            PreflightError: code OUT_OF_MEMORY.
        """
        least = estimate_least_bytes(self.model_config, self.config.training)
        reachable = _measure_reachable_bytes(self.runtime)
        if self.runtime.device.type != "cpu" or _ROOMY * least < reachable:
            return  # the prediction would take seconds, and its answer is clear
        needed = estimate_memory(
            self.model_config, self.config.training, self._memory_options()
        ).host_bytes
        if needed > reachable:
            raise self._explain_out_of_memory(
                MemoryError(
                    f"{format_bytes(needed)} are needed, {format_bytes(reachable)} can be had"
                )
            )

    def _memory_options(self) -> MemoryOptions:
        return MemoryOptions.of(self.runtime, self.config.system.gradient_checkpointing)

    def run(self) -> int:
        """Train to the end of the plan, or until a signal; the exit code."""
        self._announce()
        if self.state.step > self.plan.total_steps or self._is_finished():
            log.info(
                f"this run is finished: {self.state.step:,} steps trained; "
                f"to train longer: --max-steps {2 * self.state.step}"
            )
            return ExitCode.DONE
        self._start_log()
        loader = BatchLoader(
            self.data,
            "train",
            batch_size=self.config.training.batch_size,
            context_length=self.model_config.context_length,
            seed=self.config.training.seed,
            device=self.runtime.device,
            cursor=self.state.cursor,
        )
        started = time.monotonic()
        with loader, self._bar:
            try:
                self._loop(loader)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure: BaseException | None = error.with_traceback(None)
                del self.trainer  # room for the picture and the explanation
            else:
                failure = None
            finally:
                self._draw_curve()
        if failure is not None:
            raise self._explain_out_of_memory(failure)
        return self._conclude(time.monotonic() - started)

    def _loop(self, loader: BatchLoader) -> None:
        accumulation = self.config.training.gradient_accumulation_steps
        if self._saved is not None:  # a run cut between a save and its rotation
            self._retire(self._saved)
        self._evaluate_if_due()  # or between a save and its evaluation
        while self.state.step < self.plan.total_steps and not self.stop.stopping:
            batches = (loader.next_batch() for _ in range(accumulation))
            result = self.trainer.train_step(self.state.step, batches)
            self._advance(result, loader)
            self._write_rows(self._lag)
            self._save_if_due()
            self._evaluate_if_due()
        self._write_rows(0)
        self._save()

    def _advance(self, result: StepResult, loader: BatchLoader) -> None:
        self.state.step = result.step
        self.state.cursor = loader.cursor
        self.state.tokens += result.tokens
        self._pending.append(result)
        self._bar.update()

    def _write_rows(self, keep: int) -> None:
        """Read and log finished steps, all but the newest `keep`; stop a run that diverges."""
        while len(self._pending) > keep:
            result = self._pending.popleft()
            loss, norm = float(result.loss), float(result.grad_norm)
            now = time.monotonic()
            seconds, self._last_row = now - self._last_row, now
            self.state.train_seconds += seconds
            rate = result.tokens / max(seconds, 1e-9)
            finite = math.isfinite(loss) and math.isfinite(norm)
            self.log.append(
                {
                    "event": "step",
                    "step": result.step,
                    "loss": loss,
                    "learning_rate": result.learning_rate,
                    "grad_norm": norm,
                    "tokens": result.step * result.tokens,
                    "tokens_per_second": round(rate, 1),
                    "peak_memory_bytes": self.runtime.peak_memory_bytes(),
                }
                | ({} if finite else {"skipped": True})
            )
            self._show_step(result, loss, rate)
            self._count_skipped(result, finite, norm)

    def _show_step(self, result: StepResult, loss: float, rate: float) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        elif result.step % self.plan.log_every == 0 or result.step == 1:
            left = (self.plan.total_steps - result.step) * result.tokens / rate
            log.info(
                f"step {result.step:,}/{self.plan.total_steps:,}  loss {loss:.4f}  "
                f"rate {result.learning_rate:.2e}  {rate:,.0f} tokens/s  "
                f"ETA {format_seconds(left)}"
            )

    def _count_skipped(self, result: StepResult, finite: bool, norm: float) -> None:
        if finite:
            self._skipped_in_a_row = 0
            return
        self.state.skipped_steps += 1
        self._skipped_in_a_row += 1
        fp16 = self.runtime.needs_scaler
        limit = MAX_SKIPPED_IN_A_ROW_FP16 if fp16 else MAX_SKIPPED_IN_A_ROW
        if self._skipped_in_a_row < limit:
            return
        safe = store.list_checkpoints(self.output_dir)
        raise PreflightError(
            ExitCode.DIVERGED,
            f"diverged: loss or gradient not finite in {limit} steps up to step {result.step:,} "
            f"(rate {result.learning_rate:.2e}, gradient norm {norm}); no such update was applied",
            f"last good checkpoint: {safe[0].path if safe else 'none yet'}",
            "lower --learning-rate" + (", or use --no-mixed-precision" if fp16 else ""),
        )

    def _save_if_due(self) -> None:
        minutes = (time.monotonic() - self._last_save) / 60
        due = (
            self.state.step % self.plan.checkpoint_every == 0
            or minutes >= self.config.control.checkpoint_minutes
            or self.stop.save_requested
        )
        if due and self.state.step < self.plan.total_steps:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint of this step, once, and never of a run that is diverging."""
        self._write_rows(0)
        if self._saved_step == self.state.step or self._skipped_in_a_row:
            return
        self._check_place()
        began = time.monotonic()
        self.stop.save_requested = False
        self._saved = checkpoint_format.save_checkpoint(
            self.output_dir,
            self.state.step,
            self.trainer.model.state_dict(),
            {
                "state": dataclasses.asdict(self.state),
                "trainer": self.trainer.state_dict(),
                "data_fingerprint": self.data.fingerprint,
                "tokens_per_step": self.plan.tokens_per_step,
            },
            self._describe_run(),
            {"val_loss": None},
        )
        self._retire(self._saved)
        self._saved_step = self.state.step
        self._last_save = time.monotonic()
        self._last_row += self._last_save - began  # not part of a step's time
        log.debug(f"step {self.state.step:,}: saved in {self._last_save - began:.2f} s")

    def _is_finished(self) -> bool:
        """Whether the last step is evaluated too: a run may be cut between save and evaluation."""
        told = any(
            row.get("event") == "sample" and row.get("step") == self.state.step
            for row in reversed(read_metrics(self.log.path))
        )
        drawn = (self.output_dir / CURVE_NAME).exists()
        return self.state.step == self.plan.total_steps and told and drawn

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

    def _retire(self, newest: Checkpoint) -> None:
        store.retire_checkpoints(
            self.output_dir, self.config.control.max_checkpoints, protect=newest.path
        )

    def _describe_run(self) -> dict[str, Any]:
        """What ``config.json`` says: enough to generate and to resume without any flag."""
        training = dataclasses.asdict(self.config.training)
        training["learning_rate"] = self.config.peak_learning_rate
        return {
            "model": dataclasses.asdict(self.model_config),
            "tokenizer": {
                "name": self.tokenizer.name,
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "training": training,
            "data": {
                "fingerprint": self.data.fingerprint,
                "train_tokens": self.data.train.n_tokens,
                "val_tokens": self.data.val.n_tokens,
            },
        }

    def _evaluate_if_due(self) -> None:
        step = self.state.step
        due = step % self.plan.eval_every == 0 or step == self.plan.total_steps
        if not due or step == 0 or self.state.evaluated_step == step or self.stop.stopping:
            return
        if step == self.plan.total_steps:
            self._save()  # before anything else can fail
        self._evaluate()

    def _evaluate(self) -> None:
        began = time.monotonic()
        self._write_rows(0)
        val = self.data.val
        windows = iterate_windows(
            self.data,
            "val",
            batch_size=self.config.training.batch_size,
            context_length=self.model_config.context_length,
            n_windows=self.plan.eval_windows,
            device=self.runtime.device,
        )
        result = self.trainer.evaluate(windows, val.n_tokens / val.n_bytes, self.stop)
        if result is None:
            return
        best = self.state.best_val_loss
        better = best is None or result.loss < best
        self.state.best_val_loss = result.loss if better else best
        self.state.evaluated_step = self.state.step
        if self._saved is not None and self._saved_step == self.state.step:
            self._saved = checkpoint_format.record_validation(self._saved, result.loss)
        self.log.append(
            {
                "event": "eval",
                "step": self.state.step,
                "val_loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "tokens": self.state.tokens,
                "windows": self.plan.eval_windows,
            }
        )
        log.info(
            f"step {self.state.step:,}: validation loss {result.loss:.4f}, perplexity "
            f"{result.perplexity:,.1f}, {result.bits_per_byte:.3f} bits per byte"
            + (" (best so far)" if better else "")
        )
        self._sample()
        if time.monotonic() - self._curve_drawn > CURVE_EVERY_SECONDS:
            self._draw_curve()
        seconds = time.monotonic() - began
        self._last_row += seconds
        log.debug(f"  evaluation and sample took {seconds:.2f} s")

    def _sample(self) -> None:
        """Let the model write a little, so that a person sees what it has learned."""
        config = SamplingConfig(max_new_tokens=SAMPLE_TOKENS, seed=self.config.training.seed)
        self.trainer.model.eval()
        with self.runtime.autocast():
            text = generate_text(self.trainer.model, self.tokenizer, "", config)
        self.trainer.model.train()
        self.log.append({"event": "sample", "step": self.state.step, "text": text})
        log.info("  it writes: " + " ".join(text.split())[:300])

    def _draw_curve(self) -> None:
        self._curve_drawn = time.monotonic()
        title = (
            f"{self.model_config.label}, {count_parameters(self.model_config) / 1e6:,.1f}M "
            f"parameters, {self.plan.tokens_per_step:,} tokens per step"
        )
        save_loss_curve(self.output_dir / CURVE_NAME, read_metrics(self.log.path), title)

    def _announce(self) -> None:
        plan, data, training = self.plan, self.data, self.config.training
        parameters = count_parameters(self.model_config)
        for line in describe_choices(self.config):
            log.info(f"set: {line}")
        for note in self.runtime.notes:
            log.info(note)
        log.info(
            f"model: {self.model_config.label}, {parameters:,} parameters, context "
            f"{self.model_config.context_length:,}, vocabulary {self.model_config.vocab_size:,}"
        )
        log.info(
            f"data: {data.train.n_tokens:,} tokens to train on, {data.val.n_tokens:,} to validate "
            f"({plan.eval_windows} windows each time)"
        )
        epochs = plan.total_steps / plan.steps_per_epoch
        tokens = plan.total_steps * plan.tokens_per_step
        log.info(
            f"plan: {plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens, "
            f"{epochs:.2f} epochs, {tokens / parameters:.2f} tokens per parameter"
        )
        log.info(
            f"plan: {training.optimizer}, peak rate {self.config.peak_learning_rate:.1e}, "
            f"{training.scheduler} after {plan.warmup_steps:,} steps of warm-up; evaluation every "
            f"{plan.eval_every:,}, checkpoint every {plan.checkpoint_every:,} steps or "
            f"{self.config.control.checkpoint_minutes:g} minutes"
        )
        if self.state.step:
            log.info(
                f"continuing from {self._origin_path} (step {self.state.step:,}, "
                f"{self.state.tokens:,} tokens, sample {self.state.cursor:,})"
            )

    def _start_log(self) -> None:
        if self.state.step:
            self.log.trim(self.state.step)
            self.log.append({"event": "resume", "step": self.state.step})
        elif self.log.path.exists():
            self.log.trim(-1)  # rows of a run that never reached a checkpoint

    def _conclude(self, seconds: float) -> int:
        if self.stop.stopping:
            log.info(f"stopped at step {self.state.step:,}; saved in {self._newest_path()}")
            log.info("run the same command again to continue exactly from there")
            return self.stop.exit_code
        best = store.find_best(self.output_dir)
        log.info(
            f"done: {self.state.step:,} steps, {self.state.tokens:,} tokens in "
            f"{format_seconds(seconds)}; peak memory "
            f"{format_bytes(self.runtime.peak_memory_bytes())}"
        )
        if best.val_loss is not None:
            log.info(f"best: {best.path} (step {best.step:,}, validation loss {best.val_loss:.4f})")
        log.info(f"loss curve: {self.output_dir / CURVE_NAME}")
        log.info(f"write with it: python main.py --generate --output-dir {self.output_dir}")
        return ExitCode.DONE

    def _newest_path(self) -> Path | str:
        return self._saved.path if self._saved else self._origin_path or "nothing yet"

    def _explain_out_of_memory(self, error: BaseException) -> PreflightError:
        """What was tried, what to set to keep the tokens per step, and what is safe."""
        training, checkpointing = self.config.training, self.config.system.gradient_checkpointing
        options = self._memory_options()
        batch, n_sequences = training.batch_size, self.plan.samples_per_step
        lines = [
            f"out of memory with {batch} sequences of {self.model_config.context_length} tokens: "
            + _describe_shortage(error, self.runtime),
        ]
        size = self._find_fitting_batch(options)
        if size:
            lines.append(
                f"try --batch-size {size} --gradient-accumulation-steps "
                f"{n_sequences // size}: the same update, {n_sequences} sequences, in "
                "less memory"
            )
        saved = (
            0
            if checkpointing
            else estimate_savings(self.model_config, training, options).get(
                "--gradient-checkpointing", 0
            )
        )
        if not checkpointing:
            lines.append(
                f"--gradient-checkpointing would save {format_bytes(saved)}"
                if saved
                else "--gradient-checkpointing would save nothing here: the peak is elsewhere"
            )
        lines.append(f"last checkpoint, safe: {self._newest_path()}")
        return PreflightError(ExitCode.OUT_OF_MEMORY, *lines)

    def _find_fitting_batch(self, options: MemoryOptions) -> int | None:
        """The largest micro-batch below the present one that divides the update and should fit."""
        training, on_cuda = self.config.training, options.device_type == "cuda"
        two_steps = dataclasses.replace(training, gradient_accumulation_steps=2)
        now = build_batch_curve(self.model_config, training, options)
        later = build_batch_curve(self.model_config, two_steps, options)

        def needed(estimate: MemoryEstimate) -> int:
            return estimate.needed_bytes if on_cuda else estimate.host_bytes

        limit = _measure_reachable_bytes(self.runtime)
        below = training.batch_size
        if needed(now(below)) <= limit:
            below = below // 2 + 1  # the prediction says that it fits: trust it by half
        sizes = (n for n in range(below - 1, 0, -1) if self.plan.samples_per_step % n == 0)
        return next((n for n in sizes if n == 1 or needed(later(n)) <= limit), None)


def _measure_reachable_bytes(runtime: Runtime) -> int:
    """Memory that this process could have: what it holds, and what is free."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory - max(
            0, _count_foreign_bytes(runtime)
        )
    return reachable_host_bytes()


def _count_foreign_bytes(runtime: Runtime) -> int:
    """On the card, beside our allocator and a context of ours."""
    free, total = torch.cuda.mem_get_info(runtime.device)
    return total - free - torch.cuda.memory_reserved(runtime.device) - CUDA_CONTEXT_BYTES


def _describe_shortage(error: BaseException, runtime: Runtime) -> str:
    """Torch's message in few words: what was tried and what was free."""
    text = " ".join(str(error).split())
    tried = re.search(r"tried to allocate ([\d.]+ ?(?:[KMGT]iB|bytes))", text, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+ (?:[KMGT]iB|bytes)) is free", text)
    if not tried:
        return text[:150] or "there is none left"
    amount = tried[1]
    if amount.endswith("bytes"):
        amount = format_bytes(int(float(amount.removesuffix("bytes"))))
    if free:
        return f"tried to allocate {amount}, {free[1]} were free"
    if runtime.device.type != "cuda":
        free_now = format_bytes(available_host_bytes())
        return f"tried to allocate {amount}, {free_now} are available"
    return f"tried to allocate {amount}"
