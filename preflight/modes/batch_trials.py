"""The trials of `--get-optimal-bs`: what a run needs at a batch size, predicted and measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.units import format_bytes
from preflight.corpus.windows import count_run_windows
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import Runtime, describe_device
from preflight.device.token_store import DataPlace
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.batch_search import MAX_SIZE, SearchResult, search
from preflight.foresight.critical_batch import estimate_learning_needs
from preflight.foresight.memory import (
    MemoryEstimate,
    MemoryOptions,
    build_batch_curve,
    estimate_memory,
    estimate_savings,
)
from preflight.foresight.trial_spec import TrialResult, TrialSpec
from preflight.foresight.trials import run_trial
from preflight.settings import MODEL_PRESETS
from train_utils import measure_target_share

MAX_STEP_SECONDS = 20.0  # sizes whose micro-step would take longer are not tried
FIRST_SIZE = 8  # on a CPU, to learn how long a step takes


def measure_limit(runtime: Runtime, margin_share: float, n_ranks: int) -> tuple[int, int]:
    """Bytes that a rank may need, and bytes that there are for it.

    Those are the card's, or the rank's part of what the host has available. A trial runs in
    processes of its own, so that what this process holds is not available to it.
    """
    if runtime.device.type == "cuda":
        cards = range(n_ranks) if n_ranks > 1 else [runtime.device]
        total = min(torch.cuda.get_device_properties(card).total_memory for card in cards)
    else:
        total = available_host_bytes() // n_ranks
    return int(total * (1 - margin_share)), total


class BatchTrials:
    """Predicts and measures a run at different batch sizes.

    Args:
        spec: the run; its batch size is replaced.
        stop: a signal ends the search.

    Attributes:
        runtime: device and precision of the run.
        device: in words.
        n_ranks: processes that share the run. A batch size is that of each.
        sharing: how they share it, for predictions.
        limit_bytes: what a rank may need.
        total_bytes: the limit and the safety margin.
        n_kept: sequences of each rank per update that every batch size has to keep; ``None``: as
            they come.
        needs: what learning wants of the tokens per step.
    """

    max_step_seconds = MAX_STEP_SECONDS
    max_micro_steps = 2  # of a trial: memory and speed are known from two
    afterwards = "every trial ran in a process of its own, and all its memory is free again"

    def __init__(self, spec: TrialSpec, stop: StopFlag) -> None:
        self.spec, self.stop = spec, stop
        self.config, self.settings = spec.config, spec.config.search
        self.window, self.n_ranks = spec.window, spec.n_ranks
        self.sharing = Sharing(self.n_ranks)
        self._find_device()
        self.on_cuda = self.runtime.device.type == "cuda"
        self.n_kept = self._count_kept_sequences()
        self.needs = estimate_learning_needs(self.config, spec.model_config, spec.plan(), spec.data)
        self._get_curve = functools.lru_cache(maxsize=4)(self._build_curve)

    def _find_device(self) -> None:
        """Set what is known of the device."""
        self.runtime = self.spec.runtime()
        self.device = describe_device(self.runtime.device)
        self.limit_bytes, self.total_bytes = measure_limit(
            self.runtime, self.settings.gpu_safety_margin, self.n_ranks
        )
        self._host_limit_bytes = available_host_bytes()

    def _count_kept_sequences(self) -> int | None:
        if self.settings.tokens_per_step:
            return max(1, round(self.settings.tokens_per_step / self.window / self.n_ranks))
        if self.settings.target_batch_size:
            accumulation = self.config.training.gradient_accumulation_steps
            return self.settings.target_batch_size * accumulation
        return None

    def count_micro_steps(self, size: int) -> int:
        """Micro-steps of an update at a batch size."""
        if self.n_kept:
            return -(-self.n_kept // size)
        return self.config.training.gradient_accumulation_steps

    def count_tokens_per_step(self, size: int) -> int:
        """Tokens of a whole update at a batch size."""
        return self.spec.at(size, self.count_micro_steps(size)).plan().tokens_per_step

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
            n_train = count_run_windows(data, self.config.training, context).n_train
            windows = max(1, n_train // self.n_ranks)
        return search(
            self.probe,
            self.predict,
            self.limit_bytes,
            keep=self.n_kept,
            target=self.settings.target_batch_size,
            sizes=self.settings.test_batch_sizes,
            largest=min(MAX_SIZE, windows, self.n_kept or MAX_SIZE),
            first=None if self.on_cuda else FIRST_SIZE,
            max_step_seconds=self.max_step_seconds,
            times_tokens=self.count_times_tokens,
        )

    def spec_at(self, size: int) -> TrialSpec:
        """The trial of a size."""
        return self.spec.at(size, min(self.max_micro_steps, self.count_micro_steps(size)))

    def build_options(self, spec: TrialSpec) -> MemoryOptions:
        """The options of a prediction."""
        make, place = self._describe_memory(spec)
        context = self.spec.model_config.context_length
        return make(
            gradient_checkpointing=self.config.system.gradient_checkpointing,
            window_tokens=self.window if self.window < context else None,
            data_bytes=place.n_bytes,
            target_share=measure_target_share(self.spec.data, spec.config.training),
            sharing=self.sharing,
        )

    def _describe_memory(self, spec: TrialSpec) -> tuple[Callable[..., MemoryOptions], DataPlace]:
        """What makes the options of a trial's device, and where the training tokens are there."""
        runtime = spec.runtime()
        return functools.partial(MemoryOptions.of, runtime), spec.choose_data_place(runtime.device)

    def estimate(self, size: int) -> MemoryEstimate:
        """The predicted memory of a size."""
        spec = self.spec_at(size)
        accumulation = spec.config.training.gradient_accumulation_steps
        # Fewer and larger steps may not be worth compiling: the options depend on the size.
        return self._get_curve(accumulation, self.build_options(spec))(size)

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
            f"{format_bytes(self.limit_bytes)}{' on each rank' if self.n_ranks > 1 else ''} ..."
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


def explain_no_fit(trials: BatchTrials) -> PreflightError:
    """Not even one sequence fits: what would help, and by how much."""
    model_config = trials.spec.model_config
    training = trials.spec_at(1).config.training
    options = trials.build_options(trials.spec_at(1))
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
        trials.afterwards,
    )
