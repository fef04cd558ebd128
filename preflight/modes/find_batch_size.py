"""`--get-optimal-bs`: the largest batch size that fits, the fastest, and the recommended one.

Every size is measured by one trial in a process of its own (`foresight/trials.py`). Which sizes
are tried is decided in `foresight/batch_search.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.units import format_bytes
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.corpus.windows import count_run_windows
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import Runtime, describe_device
from preflight.foresight.batch_search import FAST_SHARE, MAX_SIZE, SearchResult, search
from preflight.foresight.critical_batch import estimate_learning_needs
from preflight.foresight.fits import format_batch_flags
from preflight.foresight.memory import (
    MemoryEstimate,
    MemoryOptions,
    build_batch_curve,
    estimate_memory,
    estimate_savings,
)
from preflight.foresight.trials import TrialResult, TrialSpec, run_trial
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.modes.setup import RunSetup
from preflight.modes.trying import format_train_command, open_output
from preflight.settings import MODEL_PRESETS, RunConfig
from train_utils import measure_target_share

REPORT_NAME = "batch_size_report.json"
FORMAT = "preflight-batch-size"
MAX_STEP_SECONDS = 20.0  # sizes whose micro-step would take longer are not tried
FIRST_SIZE = 8  # on a CPU, to learn how long a step takes


def run(config: RunConfig) -> int:
    """Search, print the table or JSON, write the report, and return the exit code.

    Raises:
        PreflightError: code OUT_OF_MEMORY when not even one sequence fits, with what would help;
            otherwise the code of whatever keeps a trial from running.
    """
    if config.search.test_batch_sizes and config.search.target_batch_size:
        raise PreflightError(
            ExitCode.FLAGS, "--test-batch-sizes and --target-batch-size: give one of them"
        )
    if (config.processes.ranks or 1) > 1:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--ranks {config.processes.ranks}: --get-optimal-bs tries batch sizes on one card",
            "a rank needs less than one card alone, so that what fits there fits on each of "
            "several ranks too: leave --ranks away",
            "what each rank would need at a --batch-size: --check --ranks",
        )
    output_dir = Path(config.control.output_dir)
    with (
        open_output(config, REPORT_NAME, FORMAT) as setup,
        contextlib.ExitStack() as stack,
    ):
        model_config = setup.model_config
        data, source = _find_data(setup, stack)
        folder = output_dir / f"{storage.TEMPORARY_PREFIX}trial"
        trials = BatchTrials(TrialSpec(setup.config, model_config, data, folder), setup.stop)
        report = BatchSizeReport(trials, trials.search(), source)
        report.publish(output_dir / REPORT_NAME)
        if report.result.chosen is None:
            raise explain_no_fit(trials)
        target = config.search.target_batch_size
        return ExitCode.DONE if target in (None, report.result.largest) else ExitCode.CHECK_FAILED


def _find_data(setup: RunSetup, stack: contextlib.ExitStack) -> tuple[DataFolder | None, str]:
    """The data if it is prepared and fits the run, and in words what the batches are made of."""
    folder = setup.data_dir
    if isinstance(setup, FinetuneSetup):
        return setup.data, f"chats in {folder}"
    if not os.path.exists(folder / METADATA_NAME):
        return None, f"random tokens ({folder} holds no prepared data)"
    stack.enter_context(FolderLock(folder, shared=True))
    try:
        data = load_data_folder(folder, setup.tokenizer_choice)
    except PreflightError as error:
        return None, f"random tokens ({error.lines[0]})"
    if min(data.train.n_tokens, data.val.n_tokens) <= setup.window_length:
        return None, f"random tokens ({folder} is shorter than the context)"
    return data, f"prepared data in {folder}"


def measure_limit(runtime: Runtime, margin_share: float) -> tuple[int, int]:
    """Bytes that a trial may need, and bytes that there are: the card's, or the host's available.

    A trial runs in a process of its own, so that what this process holds is not available to it.
    """
    if runtime.device.type == "cuda":
        total = torch.cuda.get_device_properties(runtime.device).total_memory
    else:
        total = available_host_bytes()
    return int(total * (1 - margin_share)), total


# ---- trials -------------------------------------------------------------------------------------


class BatchTrials:
    """Predicts and measures a run at different batch sizes.

    Args:
        spec: the run; its batch size is replaced.
        stop: a signal ends the search.

    Attributes:
        runtime: device and precision of the run.
        limit_bytes: what a trial may need.
        total_bytes: the limit and the safety margin.
        n_kept: sequences per update that every batch size has to keep; ``None``: as they come.
        needs: what learning wants of the tokens per step.
    """

    def __init__(self, spec: TrialSpec, stop: StopFlag) -> None:
        self.spec, self.stop = spec, stop
        self.config, self.settings = spec.config, spec.config.search
        self.window = spec.window
        self.runtime = spec.runtime()
        self.on_cuda = self.runtime.device.type == "cuda"
        self.limit_bytes, self.total_bytes = measure_limit(
            self.runtime, self.settings.gpu_safety_margin
        )
        self.n_kept = self._count_kept_sequences()
        self._host_limit_bytes = available_host_bytes()
        self.needs = estimate_learning_needs(self.config, spec.model_config, spec.plan(), spec.data)
        self._get_curve = functools.lru_cache(maxsize=4)(self._build_curve)

    def _count_kept_sequences(self) -> int | None:
        if self.settings.tokens_per_step:
            return max(1, round(self.settings.tokens_per_step / self.window))
        if self.settings.target_batch_size:
            accumulation = self.config.training.gradient_accumulation_steps
            return self.settings.target_batch_size * accumulation
        return None

    def count_tokens_per_step(self, size: int) -> int:
        """Tokens of a whole update at a batch size."""
        spec = self.spec.at(size, self.config.training.gradient_accumulation_steps)
        return spec.plan().tokens_per_step

    def count_times_tokens(self, size: int) -> float:
        """`LearningNeeds.count_times_tokens` of a batch size; 1 where the update is kept."""
        if self.n_kept:
            return 1.0
        return self.needs.count_times_tokens(self.count_tokens_per_step(size))

    def search(self) -> SearchResult:
        """Find the sizes by as many trials as it takes."""
        data = self.spec.data
        windows = MAX_SIZE
        if data:
            context = self.spec.model_config.context_length
            windows = count_run_windows(data, self.config.training, context).n_train
        return search(
            self.probe,
            self.predict,
            self.limit_bytes,
            keep=self.n_kept,
            target=self.settings.target_batch_size,
            sizes=self.settings.test_batch_sizes,
            largest=min(MAX_SIZE, windows, self.n_kept or MAX_SIZE),
            first=None if self.on_cuda else FIRST_SIZE,
            max_step_seconds=MAX_STEP_SECONDS,
            times_tokens=self.count_times_tokens,
        )

    def spec_at(self, size: int) -> TrialSpec:
        """The trial of a size. Its memory and speed are known from two micro-steps at most."""
        accumulation = self.config.training.gradient_accumulation_steps
        if self.n_kept:
            accumulation = -(-self.n_kept // size)
        return self.spec.at(size, min(2, accumulation))

    def build_options(self, runtime: Runtime, spec: TrialSpec) -> MemoryOptions:
        """The options of a prediction."""
        context = self.spec.model_config.context_length
        return MemoryOptions.of(
            runtime,
            self.config.system.gradient_checkpointing,
            self.window if self.window < context else None,
            self.spec.choose_data_place(runtime.device).n_bytes,
            measure_target_share(self.spec.data, spec.config.training),
        )

    def estimate(self, size: int) -> MemoryEstimate:
        """The predicted memory of a size."""
        spec = self.spec_at(size)
        accumulation = spec.config.training.gradient_accumulation_steps
        # Fewer and larger steps may not be worth compiling: the options depend on the size.
        return self._get_curve(accumulation, self.build_options(spec.runtime(), spec))(size)

    def _build_curve(
        self, accumulation: int, options: MemoryOptions
    ) -> Callable[[int], MemoryEstimate]:
        training = self.spec.at(1, accumulation).config.training
        return build_batch_curve(self.spec.model_config, training, options)

    def predict(self, size: int) -> int:
        """Predicted `TrialResult.needed_bytes`."""
        return self.estimate(size).required_bytes

    def probe(self, size: int) -> TrialResult:
        """Run the trial of a size, and log it."""
        log.info(
            f"batch size {size:,}: predicted to need {format_bytes(self.predict(size))} of "
            f"{format_bytes(self.limit_bytes)} ..."
        )
        trial = run_trial(self.spec_at(size), self._host_limit_bytes, self.stop)
        log.info(
            f"batch size {size:,}: {self.judge(trial)}, {trial.tokens_per_second:,.0f} tokens/s"
        )
        return trial

    def judge(self, trial: TrialResult) -> str:
        """Whether a trial fits, or why it does not."""
        if trial.fits(self.limit_bytes):
            return "fits"
        over = trial.needed_bytes - self.limit_bytes
        return trial.failure or f"does not fit: {format_bytes(over)} over the limit"


# ---- the report ---------------------------------------------------------------------------------


class BatchSizeReport:
    """The result of a search, for a person and for a program.

    Args:
        trials: what the search used.
        result: what it found.
        source: what the batches were made of.
    """

    def __init__(self, trials: BatchTrials, result: SearchResult, source: str) -> None:
        self.trials, self.result, self.source = trials, result, source
        self.config, self.settings = trials.config, trials.settings
        self.precision = str(trials.runtime.dtype).removeprefix("torch.")
        self.device = describe_device(trials.runtime.device)

    def publish(self, path: Path) -> None:
        """Write the report as JSON to `path`, and print it as the flags ask."""
        content = self.to_dict()
        storage.write_json(path, content)
        text = json.dumps(content, indent=2) if self.config.check.json else self.to_text()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    @property
    def flags(self) -> str:
        """The flags of the chosen size."""
        accumulation = self.result.accumulation or self.config.training.gradient_accumulation_steps
        return format_batch_flags(self.result.chosen or 0, accumulation)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types. Sizes in sequences, memory in bytes."""
        result = dataclasses.asdict(self.result)
        del result["trials"]
        return {
            "format": FORMAT,
            "model": dataclasses.asdict(self.trials.spec.model_config),
            "device": self.device,
            "precision": self.precision,
            "compile_model": self.trials.runtime.compile_model,
            "gradient_checkpointing": self.config.system.gradient_checkpointing,
            "memory_bytes": self.trials.total_bytes,
            "safety_margin": self.settings.gpu_safety_margin,
            "batches": self.source,
            "learning": dataclasses.asdict(self.trials.needs),
            **result,
            "flags": self.flags if self.result.chosen else None,
            "trials": [self._describe_trial(trial) for trial in self.result.trials],
        }

    def _describe_trial(self, trial: TrialResult) -> dict[str, Any]:
        estimate = self.trials.estimate(trial.batch_size)
        tokens_per_step = self.trials.count_tokens_per_step(trial.batch_size)
        in_epoch, in_run = self.trials.needs.count_updates(tokens_per_step)
        return dataclasses.asdict(trial) | {
            "updates_per_epoch": in_epoch,
            "updates": in_run,
            "times_tokens": round(self.trials.count_times_tokens(trial.batch_size), 4),
            "predicted_peak_bytes": estimate.peak_bytes,
            "predicted_needed_bytes": estimate.required_bytes,
            "ratio": round(self._compare(trial)[1] / self._compare(trial)[0], 4),
            "fits": trial.fits(self.trials.limit_bytes),
            "verdict": self.trials.judge(trial),
        }

    def _compare(self, trial: TrialResult) -> tuple[int, int]:
        """Predicted and measured bytes: allocated on CUDA, resident in the process on the CPU."""
        estimate = self.trials.estimate(trial.batch_size)
        if self.trials.on_cuda:
            return estimate.peak_bytes, trial.peak_bytes
        return estimate.required_bytes, trial.needed_bytes

    def to_text(self) -> str:
        """The report for a person: the limit, a table of the trials, and what follows from it."""
        trials, on_cuda = self.trials, self.trials.on_cuda
        total = f"{format_bytes(trials.total_bytes)} {'of the card' if on_cuda else 'available'}"
        held = "reserved" if on_cuda else "model's"
        context = trials.spec.model_config.context_length
        lines = [
            f"batch size for {trials.spec.model_config.label}, "
            f"{'context' if trials.window == context else 'windows of'} {trials.window:,}, "
            f"{self.precision}, on {self.device}",
            f"memory limit: {format_bytes(trials.limit_bytes)}: {total}, less "
            f"{self.settings.gpu_safety_margin:.0%} (--gpu-safety-margin)",
            f"batches: {self.source}",
            "",
            f"{'batch':>7} {'predicted':>10} {'measured':>10} {'ratio':>6} "
            f"{held:>10} {'tokens/s':>9} {'updates':>9}  result",
        ]
        for trial in sorted(self.result.trials, key=lambda t: t.batch_size):
            predicted, measured = self._compare(trial)
            held_bytes = trial.reserved_bytes if on_cuda else trial.peak_bytes
            tokens_per_step = trials.count_tokens_per_step(trial.batch_size)
            lines.append(
                f"{trial.batch_size:>7,} {format_bytes(predicted):>10} "
                f"{format_bytes(measured):>10} {measured / predicted:>6.3f} "
                f"{format_bytes(held_bytes):>10} {trial.tokens_per_second:>9,.0f} "
                f"{trials.needs.count_updates(tokens_per_step)[1]:>9,}  {trials.judge(trial)}"
            )
        return "\n".join([*lines, "", *self._conclude()])

    def _conclude(self) -> list[str]:
        """What follows from the table; the command to continue with comes last."""
        result, target = self.result, self.settings.target_batch_size
        if result.chosen is None:
            return ["no batch size fits"]
        if target:
            verdict = "fits" if result.largest == target else "does not fit"
            lines = [f"batch size {target:,} {verdict}; largest that fits: {result.largest:,}"]
        else:
            lines = [
                f"largest that fits: {result.largest:,} ({self._explain_bound()})",
                f"fastest: {result.fastest:,}",
                f"recommended: {result.recommended:,}, {self._explain_recommended()}",
            ]
        if result.accumulation:
            lines.append(self._describe_update(result.chosen, result.accumulation))
        command = format_train_command(
            self.config, *self.flags.split(), without=("batch_size", "gradient_accumulation_steps")
        )
        return [*lines, "", "continue with:", f"  {command}"]

    def _explain_recommended(self) -> str:
        """Why this is the size to take."""
        trials, result = self.trials, self.result
        sizes = {trial.batch_size: trial for trial in result.trials}
        fastest, own = sizes[result.fastest or 0], sizes[result.recommended or 0]
        least = f"the smallest within {1 - FAST_SHARE:.0%} of the"
        if own.tokens_per_second >= FAST_SHARE * fastest.tokens_per_second:
            return f"{least} fastest"
        gain = fastest.tokens_per_second / own.tokens_per_second - 1
        times = trials.count_times_tokens(fastest.batch_size)
        times /= trials.count_times_tokens(own.batch_size)
        updates = [
            trials.needs.count_updates(trials.count_tokens_per_step(trial.batch_size))
            for trial in (own, fastest)
        ]
        (own_epoch, own_run), (in_epoch, in_run) = updates
        return (
            f"{least} least time for the same loss: {own_epoch:,} updates an epoch, {own_run:,} in "
            f"the run; {fastest.batch_size:,} is {gain:.0%} faster, but makes {in_epoch:,} and "
            f"{in_run:,}, and needs {times:.1f} x the tokens ({trials.needs.basis})"
        )

    def _explain_bound(self) -> str:
        """Why there is no larger size."""
        return {
            "memory": "the next larger size was tried and does not fit",
            "data": "larger sizes need more sequences than an epoch or an update has",
            "time": f"larger sizes were not tried: a step would take over {MAX_STEP_SECONDS:.0f} "
            f"s; predicted to fit up to {self.result.predicted_largest:,}",
            "list": "of the sizes given",
        }[self.result.bound]

    def _describe_update(self, size: int, accumulation: int) -> str:
        """How batch size, accumulation and context make the tokens per step."""
        context = self.trials.window
        tokens = size * accumulation * context
        asked = self.settings.tokens_per_step or tokens
        line = f"{size:,} x {accumulation:,} x {context:,} = {tokens:,} tokens per step"
        if tokens != asked:
            line += f", the nearest to {asked:,}, which is no multiple of the context"
        return line


def explain_no_fit(trials: BatchTrials) -> PreflightError:
    """Not even one sequence fits: what would help, and by how much."""
    model_config = trials.spec.model_config
    training = trials.spec_at(1).config.training
    options = trials.build_options(trials.runtime, trials.spec_at(1))
    saved = estimate_savings(model_config, training, options)
    shorter = replace(model_config, context_length=max(2, model_config.context_length // 2))
    window = options.window_tokens and min(options.window_tokens, shorter.context_length)
    saved[f"--context-length {shorter.context_length}"] = (
        estimate_memory(model_config, training, options).needed_bytes
        - estimate_memory(shorter, training, replace(options, window_tokens=window)).needed_bytes
    )
    ways = [f"{flag} saves {format_bytes(size)}" for flag, size in saved.items() if size > 0]
    presets, preset = list(MODEL_PRESETS), trials.config.model.model_size
    smaller = "--n-layers, --n-embeddings"
    if preset in presets[1:]:
        smaller = f"--model-size {presets[presets.index(preset) - 1]}"
    return PreflightError(
        ExitCode.OUT_OF_MEMORY,
        f"no batch size fits into {format_bytes(trials.limit_bytes)}: one sequence is predicted "
        f"to need {format_bytes(trials.predict(1))}",
        "; ".join([*ways, f"or a smaller model: {smaller}"]),
        "every trial ran in a process of its own, and all its memory is free again",
    )
