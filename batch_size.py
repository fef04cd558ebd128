"""`--get-optimal-bs`: the largest batch size that fits, the fastest, and the one to take.

Every size is one `trial`, in a process of its own. The predicted memory leads `search`, which is
a function of its arguments alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memory import MemoryEstimate, build_batch_curve, estimate_memory, estimate_savings
from preflight.core import storage
from preflight.core.console import format_bytes, say
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.signals import StopFlag
from preflight.corpus.shards import METADATA_NAME, DataFolder, load_data_folder
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import Runtime, describe_device
from preflight.settings.config import MODEL_PRESETS, ModelConfig, RunConfig, build_options
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer
from train_utils import count_windows
from trial import Order, Trial, run_trial

REPORT_NAME = "batch_size_report.json"
MAX_SIZE = 1_048_576  # of --batch-size
USUAL_TRIALS = 6
FAST_SHARE = 0.98  # a size this near to the fastest is as good
MAX_STEP_SECONDS = 20.0  # sizes whose micro-step would take longer are not tried
FIRST_SIZE = 8  # on a CPU, to learn how long a step takes


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Sizes are ``None`` when none fits; every one of them has run.

    Attributes:
        trials: in the order in which they ran.
        limit_bytes: what a trial was allowed to need.
        largest: the largest size that fits.
        fastest: the one with the most tokens per second.
        recommended: the smallest within 2 % of the fastest.
        chosen: the one to go on with; not the recommended where a product has to be kept.
        accumulation: micro-steps that keep the product; ``None``: as configured.
        bound: what ended the search above `largest`: ``memory``, ``data``, ``time``, or
            ``list`` when the sizes were given.
        predicted_largest: what the line, corrected by the trials, says of memory alone.
    """

    trials: tuple[Trial, ...]
    limit_bytes: int
    largest: int | None
    fastest: int | None
    recommended: int | None
    chosen: int | None
    accumulation: int | None
    bound: str
    predicted_largest: int


# ---- the search ---------------------------------------------------------------------------------


def search(
    probe: Callable[[int], Trial],
    predict: Callable[[int], int],
    limit_bytes: int,
    *,
    sizes: tuple[int, ...] = (),
    target: int | None = None,
    keep: int | None = None,
    largest: int = MAX_SIZE,
    first: int | None = None,
    max_step_seconds: float = math.inf,
) -> SearchResult:
    """Find the largest size that fits and the fastest, in few trials.

    Args:
        probe: runs one size.
        predict: predicted `Trial.needed_bytes`, rising with the size.
        limit_bytes: what may be needed.
        sizes: try these and no others.
        target: the size that is wanted; only where it does not fit, smaller ones are tried.
        keep: sequences per update that the chosen size and its accumulation multiply to.
        largest: sizes above it are of no use.
        first: a small size to begin with, where a step may take long.
        max_step_seconds: sizes whose micro-step would take longer are not tried.
    """
    state = _Search(probe, predict, limit_bytes, target or largest, max_step_seconds)
    for size in dict.fromkeys(sizes or (target,) if target else sizes):
        state.run(size)
    if not sizes and not (target and state.fitting()):
        state.find_largest(None if target else first)
    if not sizes and not target:
        state.find_fastest()
    return state.conclude("list" if sizes else "", target, keep)


class _Search:
    """Trials so far, and what follows from them."""

    def __init__(self, probe: Callable[[int], Trial], predict: Callable[[int], int],
                 limit_bytes: int, largest: int, max_step_seconds: float) -> None:
        self.probe, self.predict, self.limit_bytes = probe, predict, limit_bytes
        self.largest, self.max_step_seconds = largest, max_step_seconds
        self.trials: dict[int, Trial] = {}

    def run(self, size: int) -> Trial:
        """The trial of a size; each is run once."""
        if size not in self.trials:
            self.trials[size] = self.probe(size)
        return self.trials[size]

    def bracket(self) -> tuple[int, int, bool]:
        """The largest size that fits, the smallest known not to, and whether that one was tried."""
        failed = [s for s, t in self.trials.items() if not t.fits(self.limit_bytes)]
        high = min([self.ceiling() + 1, *failed])
        low = max((s for s, t in self.trials.items()
                   if t.fits(self.limit_bytes) and s < min([MAX_SIZE + 1, *failed])), default=0)
        return low, high, high in self.trials

    def ceiling(self) -> int:
        """The largest size of any use: by the data, and by the time that a step takes."""
        timed = [t for t in self.trials.values() if t.step_seconds]
        if not timed:
            return self.largest
        last = max(timed, key=lambda t: t.batch_size)
        seconds = last.step_seconds / last.micro_steps / last.batch_size
        ceiling = max(1, int(min(self.largest, self.max_step_seconds / seconds)))
        # Less than twice of what has run is not worth another trial that long.
        near = ceiling < self.largest and ceiling < 2 * last.batch_size
        return min(ceiling, last.batch_size) if near else ceiling

    def estimate(self, size: int) -> float:
        """Bytes needed: the prediction, corrected by what was measured."""
        points = sorted((t for t in self.trials.values() if not t.failure),
                        key=lambda t: abs(t.needed_bytes - self.limit_bytes))
        if not points:
            return self.predict(size)
        near, base = points[0], self.predict(points[0].batch_size)
        for other in points[1:]:
            run = base - self.predict(other.batch_size)
            rise = near.needed_bytes - other.needed_bytes
            if run and rise / run > 0:
                return near.needed_bytes + rise / run * (self.predict(size) - base)
        if near.needed_bytes < self.limit_bytes / 2:
            # What is off at a small size is what every size has: the interpreter, the context.
            return self.predict(size) + near.needed_bytes - base
        return self.predict(size) * near.needed_bytes / max(base, 1)

    def guess(self, low: int, high: int) -> int:
        """The largest size from `low` to `high` - 1 that is estimated to fit."""
        while high - low > 1:
            middle = (low + high) // 2
            if self.estimate(middle) <= self.limit_bytes:
                low = middle
            else:
                high = middle
        return low

    def find_largest(self, first: int | None) -> None:
        """Close in on the border until both its sides have been tried."""
        if first is not None:
            # Where even that is too much by prediction, a smaller one.
            self.run(max(1, self.guess(0, min(first, self.largest) + 1)))
        surprises = 0
        while True:
            low, high, tried = self.bracket()
            if high - low <= 1:
                return
            size = self._choose_next(low, high, tried, surprises)
            expected = self.estimate(size) <= self.limit_bytes
            trial = self.run(size)
            surprises += not trial.failure and trial.fits(self.limit_bytes) != expected

    def _choose_next(self, low: int, high: int, tried: bool, surprises: int) -> int:
        """A size strictly between `low` and `high`: where the corrected line meets the limit."""
        guess, half = self.guess(low, high), max(1, (high - low) // 2)
        # Where the line has been wrong again and again, longer and longer strides.
        stride = min(1 << max(0, surprises - 1), half)
        if tried and len(self.trials) >= 2 * USUAL_TRIALS:
            size = low + half
        elif guess <= low:
            size = low + stride
        elif tried and guess >= high - 1:
            # It failed against the line: by how much is known only if it got through.
            size = low + half if self.trials[high].failure else high - stride
        else:
            size = guess
        return min(max(size, low + 1), high - 1)

    def find_fastest(self) -> None:
        """Powers of two below the largest size, downwards until one is clearly slower."""
        largest, _, _ = self.bracket()
        size = 1 << max(0, int(largest * 3 / 4).bit_length() - 1)
        for _ in range(max(1, USUAL_TRIALS - len(self.trials))):
            if not 0 < size < largest:
                return
            best = max(t.tokens_per_second for t in self.fitting())
            if self.run(size).tokens_per_second < FAST_SHARE * best:
                return
            size //= 2

    def fitting(self) -> list[Trial]:
        """Trials that fit, below any that did not."""
        low, _, _ = self.bracket()
        return [t for s, t in self.trials.items() if s <= low and t.fits(self.limit_bytes)]

    def choose(self, preferred: int, keep: int) -> tuple[int, int] | tuple[None, None]:
        """Size and accumulation that multiply to `keep`, the size tried as all others are."""
        while (largest := self.bracket()[0]) > 0:
            size, accumulation = split_sequences(keep, preferred, largest)
            if self.run(size).fits(self.limit_bytes):
                return size, accumulation
        return None, None

    def conclude(self, bound: str, target: int | None, keep: int | None) -> SearchResult:
        """What the trials say."""
        recommended = self.recommend() if not target else self.bracket()[0]
        chosen, accumulation = recommended or None, None
        if chosen and keep:
            chosen, accumulation = self.choose(chosen, keep)
        low, high, tried = self.bracket()
        if not bound:
            limited = self.ceiling() < self.largest
            bound = "memory" if tried else "time" if limited else "data"
        fastest = max(self.fitting(), key=lambda t: t.tokens_per_second, default=None)
        return SearchResult(
            tuple(self.trials.values()), self.limit_bytes, low or None,
            fastest.batch_size if fastest else None, self.recommend() or None, chosen,
            accumulation, bound, high - 1 if tried else self.guess(low, self.largest + 1))

    def recommend(self) -> int:
        """The smallest size within 2 % of the fastest; 0 when none fits."""
        enough = FAST_SHARE * max((t.tokens_per_second for t in self.fitting()), default=0.0)
        return min((t.batch_size for t in self.fitting() if t.tokens_per_second >= enough),
                   default=0)


def split_sequences(n_sequences: int, preferred: int, largest: int) -> tuple[int, int]:
    """Micro-batch and accumulation whose product is exactly `n_sequences`.

    Of the micro-batches up to `largest`, the one nearest in ratio to `preferred`.
    """
    small = (n for n in range(1, math.isqrt(n_sequences) + 1) if n_sequences % n == 0)
    divisors = {d for n in small for d in (n, n_sequences // n) if d <= largest}
    size = min(divisors, key=lambda d: (abs(math.log(d / preferred)), d))
    return size, n_sequences // size


# ---- the mode -----------------------------------------------------------------------------------


def run_search(config: RunConfig) -> int:
    """Search, print the table or JSON, write the report, and return the exit code.

    Raises:
        PreflightError: code OUT_OF_MEMORY when not even one sequence fits, with what would help;
            else with the code of whatever stands in the way.
    """
    if config.search.test_batch_sizes and config.search.target_batch_size:
        raise PreflightError(ExitCode.FLAGS, "--test-batch-sizes and --target-batch-size: give "
                             "one of them")
    output_dir = Path(config.control.output_dir)
    storage.check_writable(output_dir)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        stack.enter_context(FolderLock(output_dir))
        storage.remove_leftovers(output_dir)
        tokenizer = load_tokenizer(config.model.tokenizer)
        model_config = config.model.resolve(tokenizer.vocab_size)
        if model_config.vocab_size < tokenizer.vocab_size:
            raise PreflightError(ExitCode.FLAGS, f"--vocab-size {model_config.vocab_size} is "
                                 f"smaller than the {tokenizer.vocab_size:,} ids of "
                                 f"{tokenizer.name}; raise it or drop it")
        data, source = _find_data(config, tokenizer, model_config, stack)
        order = Order(config, model_config, data, output_dir / f"{storage.TEMPORARY_PREFIX}trial")
        return _Mode(order, source, stop).run()


def _find_data(config: RunConfig, tokenizer: Tokenizer, model_config: ModelConfig,
               stack: contextlib.ExitStack) -> tuple[DataFolder | None, str]:
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
            self.runtime, self.settings.gpu_safety_margin)
        self.host_bytes = available_host_bytes()
        self.keep: int | None = None
        if self.settings.tokens_per_step:
            self.keep = max(1, round(self.settings.tokens_per_step / self.context))
        elif self.settings.target_batch_size:
            self.keep = (self.settings.target_batch_size
                         * self.config.training.gradient_accumulation_steps)

    def run(self) -> int:
        """Search and report; the exit code."""
        target = self.settings.target_batch_size
        windows = count_windows(self.order.data.train.n_tokens, self.context) \
            if self.order.data else MAX_SIZE
        result = search(
            self.probe, self.predict, self.limit_bytes, keep=self.keep, target=target,
            sizes=self.settings.test_batch_sizes,
            largest=min(MAX_SIZE, windows, self.keep or MAX_SIZE),
            first=None if self.on_cuda else FIRST_SIZE, max_step_seconds=MAX_STEP_SECONDS)
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
        return self._curve(order.config.training.gradient_accumulation_steps,
                           order.runtime().compile_model)(size)

    @functools.lru_cache(maxsize=4)  # noqa: B019  # lives as long as the call
    def _curve(self, accumulation: int, compile_model: bool) -> Callable[[int], MemoryEstimate]:
        training = self.order.at(1, accumulation).config.training
        return build_batch_curve(self.order.model_config, training,
                                 **self.options() | {"compile_model": compile_model})

    def options(self) -> dict[str, Any]:
        """Of `estimate_memory`."""
        return {"dtype": self.runtime.dtype, "device_type": "cuda" if self.on_cuda else "cpu",
                "gradient_checkpointing": self.config.system.gradient_checkpointing,
                "compile_model": self.runtime.compile_model}

    def predict(self, size: int) -> int:
        """Predicted `Trial.needed_bytes`."""
        estimate = self.estimate(size)
        return estimate.needed_bytes if self.on_cuda else estimate.host_bytes

    def probe(self, size: int) -> Trial:
        """Run one size, and say so."""
        say(f"batch size {size:,}: predicted to need {format_bytes(self.predict(size))} of "
            f"{format_bytes(self.limit_bytes)} ...")
        trial = run_trial(self.order_at(size), self.host_bytes, self.stop)
        say(f"batch size {size:,}: {self.judge(trial)}, {trial.tokens_per_second:,.0f} tokens/s")
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
            if (self.config.sources.get(option.name) != "the command line"
                    or option.group in ("search", "check", "generation", "sampling")
                    or option.name in ("batch_size", "gradient_accumulation_steps")):
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
                dataclasses.asdict(trial) | {
                    "predicted_peak_bytes": (peak := self.estimate(trial.batch_size).peak_bytes),
                    "predicted_needed_bytes": self.predict(trial.batch_size),
                    "ratio": round(trial.peak_bytes / peak, 4),
                    "fits": trial.fits(self.limit_bytes), "verdict": self.judge(trial),
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
            f"batches: {self.source}", "",
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
                f"{self.judge(trial)}")
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
            lines += [f"fastest: {result.fastest:,}",
                      f"recommended: {result.recommended:,}, the smallest within "
                      f"{1 - FAST_SHARE:.0%} of the fastest"]
        if result.accumulation:
            tokens = result.chosen * result.accumulation * self.context
            asked = self.settings.tokens_per_step or tokens
            lines.append(
                f"{result.chosen:,} x {result.accumulation:,} x {self.context:,} = {tokens:,} "
                f"tokens per step"
                + ("" if tokens == asked else f", the nearest to {asked:,}, which is no multiple "
                                              f"of the context"))
        return [*lines, "", "go on with:", f"  {self.command(result)}"]

    def explain_no_fit(self) -> PreflightError:
        """Not even one sequence fits: what would help, by how much."""
        training = self.order_at(1).config.training
        model_config = self.order.model_config
        before = estimate_memory(model_config, training, **self.options()).needed_bytes
        saved = estimate_savings(model_config, training, **self.options())
        half = replace(model_config, context_length=max(2, self.context // 2))
        saved[f"--context-length {half.context_length}"] = before - estimate_memory(
            half, training, **self.options()).needed_bytes
        names = list(MODEL_PRESETS)
        name = self.config.model.model_size
        smaller = (f"--model-size {names[names.index(name) - 1]}" if name in names[1:] else
                   "--n-layers, --n-embeddings")
        ways = [f"{flag} saves {format_bytes(size)}" for flag, size in saved.items() if size > 0]
        return PreflightError(
            ExitCode.OUT_OF_MEMORY,
            f"no batch size fits into {format_bytes(self.limit_bytes)}: one sequence is predicted "
            f"to need {format_bytes(self.predict(1))}",
            "; ".join([*ways, f"or a smaller model: {smaller}"]),
            "every trial ran in a process of its own: nothing stays behind")
