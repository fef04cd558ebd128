"""`--get-optimal-bs`: the largest batch size that fits, the fastest, and the one to take.

Every size is one `trial`, in a process of its own. The predicted memory leads `search`, which is
a function of its arguments alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shlex
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
from preflight.corpus.shards import METADATA_NAME, DataFolder, load_data_folder
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import Runtime, describe_device
from preflight.foresight.batch_search import FAST_SHARE, MAX_SIZE, SearchResult, search
from preflight.foresight.memory import (
    MemoryEstimate,
    MemoryOptions,
    build_batch_curve,
    estimate_memory,
    estimate_savings,
)
from preflight.foresight.trials import Order, Trial, run_trial
from preflight.settings import MODEL_PRESETS, ModelConfig, RunConfig, build_options
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer
from train_utils import count_windows

REPORT_NAME = "batch_size_report.json"
MAX_STEP_SECONDS = 20.0  # sizes whose micro-step would take longer are not tried
FIRST_SIZE = 8  # on a CPU, to learn how long a step takes


# ---- the search ---------------------------------------------------------------------------------


# ---- the mode -----------------------------------------------------------------------------------


def run(config: RunConfig) -> int:
    """Search, print the table or JSON, write the report, and return the exit code.

    Raises:
        PreflightError: code OUT_OF_MEMORY when not even one sequence fits, with what would help;
            else with the code of whatever stands in the way.
    """
    if config.search.test_batch_sizes and config.search.target_batch_size:
        raise PreflightError(
            ExitCode.FLAGS, "--test-batch-sizes and --target-batch-size: give one of them"
        )
    output_dir = Path(config.control.output_dir)
    storage.check_writable(output_dir)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        stack.enter_context(FolderLock(output_dir))
        storage.remove_leftovers(output_dir)
        tokenizer = load_tokenizer(config.model.tokenizer)
        model_config = config.model.resolve(tokenizer.vocab_size)
        if model_config.vocab_size < tokenizer.vocab_size:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--vocab-size {model_config.vocab_size} is "
                f"smaller than the {tokenizer.vocab_size:,} ids of "
                f"{tokenizer.name}; raise it or drop it",
            )
        data, source = _find_data(config, tokenizer, model_config, stack)
        order = Order(config, model_config, data, output_dir / f"{storage.TEMPORARY_PREFIX}trial")
        return _Mode(order, source, stop).run()


def _find_data(
    config: RunConfig, tokenizer: Tokenizer, model_config: ModelConfig, stack: contextlib.ExitStack
) -> tuple[DataFolder | None, str]:
    """The prepared data where it fits the flags, and in words what the batches are made of."""
    folder, context = Path(config.data.data_dir), model_config.context_length
    if not (folder / METADATA_NAME).exists():
        return None, f"random tokens ({folder} holds no prepared data)"
    stack.enter_context(FolderLock(folder, shared=True))
    try:
        data = load_data_folder(folder, tokenizer)
    except PreflightError as error:
        return None, f"random tokens ({error.lines[0]})"
    if min(data.train.n_tokens, data.val.n_tokens) <= context:
        return None, f"random tokens ({folder} is shorter than the context)"
    return data, f"prepared data in {folder}"


def measure_limit(runtime: Runtime, margin: float) -> tuple[int, int]:
    """Bytes that a run may need, and bytes that there are: the card's, or the available memory."""
    if runtime.device.type == "cuda":
        total = torch.cuda.get_device_properties(runtime.device).total_memory
    else:
        total = available_host_bytes()
    return int(total * (1 - margin)), total


class _Mode:
    """One call of `--get-optimal-bs`: the search with real trials, and its report."""

    def __init__(self, order: Order, source: str, stop: StopFlag) -> None:
        self.order, self.source, self.stop = order, source, stop
        self.config, self.settings = order.config, order.config.search
        self.context = order.model_config.context_length
        self.runtime = order.runtime()
        self.on_cuda = self.runtime.device.type == "cuda"
        self.limit_bytes, self.total_bytes = measure_limit(
            self.runtime, self.settings.gpu_safety_margin
        )
        self.host_bytes = available_host_bytes()
        self.keep: int | None = None
        if self.settings.tokens_per_step:
            self.keep = max(1, round(self.settings.tokens_per_step / self.context))
        elif self.settings.target_batch_size:
            self.keep = (
                self.settings.target_batch_size * self.config.training.gradient_accumulation_steps
            )

    def run(self) -> int:
        """Search and report; the exit code."""
        target = self.settings.target_batch_size
        windows = (
            count_windows(self.order.data.train.n_tokens, self.context)
            if self.order.data
            else MAX_SIZE
        )
        result = search(
            self.probe,
            self.predict,
            self.limit_bytes,
            keep=self.keep,
            target=target,
            sizes=self.settings.test_batch_sizes,
            largest=min(MAX_SIZE, windows, self.keep or MAX_SIZE),
            first=None if self.on_cuda else FIRST_SIZE,
            max_step_seconds=MAX_STEP_SECONDS,
        )
        report = self.describe(result)
        storage.write_json(self.order.folder.parent / REPORT_NAME, report)
        text = json.dumps(report, indent=2) if self.config.check.json else self.render(result)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if result.chosen is None:
            raise self.explain_no_fit()
        fits_target = not target or result.largest == target
        return ExitCode.DONE if fits_target else ExitCode.CHECK_FAILED

    def order_at(self, size: int) -> Order:
        """What the trial of a size runs: two micro-steps stand for any larger number of them."""
        accumulation = self.config.training.gradient_accumulation_steps
        if self.keep:
            accumulation = -(-self.keep // size)
        return self.order.at(size, min(2, accumulation))

    def estimate(self, size: int) -> MemoryEstimate:
        """The predicted memory of a size."""
        order = self.order_at(size)
        return self._curve(
            order.config.training.gradient_accumulation_steps, order.runtime().compile_model
        )(size)

    @functools.lru_cache(maxsize=4)  # noqa: B019  # lives as long as the call
    def _curve(self, accumulation: int, compile_model: bool) -> Callable[[int], MemoryEstimate]:
        training = self.order.at(1, accumulation).config.training
        return build_batch_curve(
            self.order.model_config, training, replace(self.options(), compile_model=compile_model)
        )

    def options(self) -> MemoryOptions:
        """Of `estimate_memory`."""
        return MemoryOptions.of(self.runtime, self.config.system.gradient_checkpointing)

    def predict(self, size: int) -> int:
        """Predicted `Trial.needed_bytes`."""
        return self.estimate(size).required_bytes

    def probe(self, size: int) -> Trial:
        """Run one size, and say so."""
        log.info(
            f"batch size {size:,}: predicted to need {format_bytes(self.predict(size))} of "
            f"{format_bytes(self.limit_bytes)} ..."
        )
        trial = run_trial(self.order_at(size), self.host_bytes, self.stop)
        log.info(
            f"batch size {size:,}: {self.judge(trial)}, {trial.tokens_per_second:,.0f} tokens/s"
        )
        return trial

    def judge(self, trial: Trial) -> str:
        """Whether a trial fits, or why it does not."""
        if trial.fits(self.limit_bytes):
            return "fits"
        over = trial.needed_bytes - self.limit_bytes
        return trial.failure or f"does not fit: {format_bytes(over)} over the limit"

    def flags(self, result: SearchResult) -> str:
        """The flags to go on with."""
        accumulation = result.accumulation or self.config.training.gradient_accumulation_steps
        return f"--batch-size {result.chosen} --gradient-accumulation-steps {accumulation}"

    def command(self, result: SearchResult) -> str:
        """The whole command to go on with: the flags of this call, and those found."""
        words = ["python", "main.py", "--train"]
        for option in build_options().values():
            value = getattr(getattr(self.config, option.group), option.name)
            if (
                self.config.sources.get(option.name) != "the command line"
                or option.group in ("search", "check", "generation", "sampling")
                or option.name in ("batch_size", "gradient_accumulation_steps")
            ):
                continue
            if option.kind is bool:
                words.append(option.flag if value else option.flag.replace("--", "--no-", 1))
            else:
                words += [option.flag, *map(str, value if option.many else [value])]
        return f"{shlex.join(words)} {self.flags(result)}"

    def describe(self, result: SearchResult) -> dict[str, Any]:
        """The report as plain JSON types. Sizes in sequences, memory in bytes."""
        runtime = self.runtime
        return {
            "model": dataclasses.asdict(self.order.model_config),
            "device": describe_device(runtime.device),
            "precision": str(runtime.dtype).removeprefix("torch."),
            "compile_model": runtime.compile_model,
            "gradient_checkpointing": self.config.system.gradient_checkpointing,
            "memory_bytes": self.total_bytes,
            "safety_margin": self.settings.gpu_safety_margin,
            "batches": self.source,
            **{key: value for key, value in dataclasses.asdict(result).items() if key != "trials"},
            "flags": self.flags(result) if result.chosen else None,
            "trials": [
                dataclasses.asdict(trial)
                | {
                    "predicted_peak_bytes": (peak := self.estimate(trial.batch_size).peak_bytes),
                    "predicted_needed_bytes": self.predict(trial.batch_size),
                    "ratio": round(trial.peak_bytes / peak, 4),
                    "fits": trial.fits(self.limit_bytes),
                    "verdict": self.judge(trial),
                }
                for trial in result.trials
            ],
        }

    def render(self, result: SearchResult) -> str:
        """The report for a person."""
        runtime, margin = self.runtime, self.settings.gpu_safety_margin
        held = "reserved" if self.on_cuda else "resident"
        lines = [
            f"batch size for {self.order.model_config.label}, context {self.context:,}, "
            f"{str(runtime.dtype).removeprefix('torch.')}, on {describe_device(runtime.device)}",
            f"limit: {format_bytes(self.limit_bytes)}, that is {format_bytes(self.total_bytes)} "
            f"{'of the card' if self.on_cuda else 'available'} less {margin:.0%} "
            f"(--gpu-safety-margin)",
            f"batches: {self.source}",
            "",
            f"{'batch':>7} {'predicted':>10} {'measured':>10} {'ratio':>6} "
            f"{held:>10} {'tokens/s':>9} {'steps':>5}  result",
        ]
        for trial in sorted(result.trials, key=lambda t: t.batch_size):
            predicted = self.estimate(trial.batch_size).peak_bytes
            n_held = trial.reserved_bytes if self.on_cuda else trial.needed_bytes
            lines.append(
                f"{trial.batch_size:>7,} {format_bytes(predicted):>10} "
                f"{format_bytes(trial.peak_bytes):>10} {trial.peak_bytes / predicted:>6.3f} "
                f"{format_bytes(n_held):>10} {trial.tokens_per_second:>9,.0f} {trial.steps:>5}  "
                f"{self.judge(trial)}"
            )
        return "\n".join([*lines, "", *self.conclude(result)])

    def conclude(self, result: SearchResult) -> list[str]:
        """What follows from the table; the flags to go on with come last."""
        if result.chosen is None:
            return ["nothing fits"]
        why = {
            "memory": "the next size was tried and does not",
            "data": "larger ones would need more windows than an epoch or an update has",
            "time": f"larger sizes were not tried: a step would take over {MAX_STEP_SECONDS:.0f} "
            f"s; predicted to fit up to {result.predicted_largest:,}",
            "list": "of those given",
        }[result.bound]
        target = self.settings.target_batch_size
        lines = [f"largest that fits: {result.largest:,} ({why})"]
        if target:
            verdict = "fits" if result.largest == target else "does not fit"
            lines = [f"batch size {target:,} {verdict}; largest that fits: {result.largest:,}"]
        else:
            lines += [
                f"fastest: {result.fastest:,}",
                f"recommended: {result.recommended:,}, the smallest within "
                f"{1 - FAST_SHARE:.0%} of the fastest",
            ]
        if result.accumulation:
            tokens = result.chosen * result.accumulation * self.context
            asked = self.settings.tokens_per_step or tokens
            lines.append(
                f"{result.chosen:,} x {result.accumulation:,} x {self.context:,} = {tokens:,} "
                f"tokens per step"
                + (
                    ""
                    if tokens == asked
                    else f", the nearest to {asked:,}, which is no multiple of the context"
                )
            )
        return [*lines, "", "go on with:", f"  {self.command(result)}"]

    def explain_no_fit(self) -> PreflightError:
        """Not even one sequence fits: what would help, by how much."""
        training = self.order_at(1).config.training
        model_config = self.order.model_config
        before = estimate_memory(model_config, training, self.options()).needed_bytes
        saved = estimate_savings(model_config, training, self.options())
        half = replace(model_config, context_length=max(2, self.context // 2))
        saved[f"--context-length {half.context_length}"] = (
            before - estimate_memory(half, training, self.options()).needed_bytes
        )
        names = list(MODEL_PRESETS)
        name = self.config.model.model_size
        smaller = (
            f"--model-size {names[names.index(name) - 1]}"
            if name in names[1:]
            else "--n-layers, --n-embeddings"
        )
        ways = [f"{flag} saves {format_bytes(size)}" for flag, size in saved.items() if size > 0]
        return PreflightError(
            ExitCode.OUT_OF_MEMORY,
            f"no batch size fits into {format_bytes(self.limit_bytes)}: one sequence is predicted "
            f"to need {format_bytes(self.predict(1))}",
            "; ".join([*ways, f"or a smaller model: {smaller}"]),
            "every trial ran in a process of its own: nothing stays behind",
        )
