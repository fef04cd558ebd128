"""What a trial of a batch size is asked to do, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import count_run_windows
from preflight.device.ranks import Ranks
from preflight.device.runtime import Runtime, build_runtime, choose_device
from preflight.device.token_store import DataPlace, measure_free_bytes
from preflight.settings import ModelConfig, RunConfig
from preflight.training.plan import TrainingPlan, build_plan
from train_utils import choose_data_place


@dataclass(frozen=True)
class TrialResult:
    """What was measured at one batch size; of several ranks, the fullest one's memory.

    Attributes:
        batch_size: sequences per micro-step, of each rank.
        steps: timed updates.
        peak_bytes: peak of allocated memory (CUDA), or of resident memory beyond what the process
            held before the model was built (CPU).
        reserved_bytes: peak of what CUDA's caching allocator held; 0 on the CPU.
        needed_bytes: what counts against the limit: reserved memory, context and other processes
            (CUDA), or the peak of resident memory (CPU).
        micro_steps: of an update.
        step_seconds: median of an update.
        tokens_per_second: of these updates, of all ranks together.
        failure: why a phase failed; empty when every phase ran.
        phases: `peak_bytes` of each phase.
        rank_bytes: `needed_bytes` of each rank.
        is_predicted: nothing was measured: memory is traced, time is estimated.
    """

    batch_size: int
    steps: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    needed_bytes: int = 0
    micro_steps: int = 1
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    failure: str = ""
    phases: dict[str, int] = field(default_factory=dict)
    rank_bytes: tuple[int, ...] = ()
    is_predicted: bool = False

    def fits(self, limit_bytes: int) -> bool:
        """Whether every phase ran, or would, within the limit."""
        ran = self.is_predicted or self.steps > 0
        return not self.failure and ran and self.needed_bytes <= limit_bytes


@dataclass(frozen=True)
class TrialSpec:
    """What a trial runs.

    Attributes:
        config: the run; its batch size and accumulation are those of the trial.
        model_config: the architecture.
        data: prepared shards; ``None``: random tokens.
        folder: temporary, removed when the trial ends.
        n_ranks: processes that share the run.
    """

    config: RunConfig
    model_config: ModelConfig
    data: DataFolder | None
    folder: Path
    n_ranks: int = 1

    def plan(self) -> TrainingPlan:
        """The plan of the run; without data, a run long enough to be worth compiling for."""
        training, control = self.config.resolve_training(), self.config.control
        samples = training.batch_size * training.gradient_accumulation_steps * self.n_ranks
        if self.data is None:
            long = (10**9, 10**6)
            return build_plan(training, control, self.window, *long, samples_per_step=samples)
        windows = count_run_windows(self.data, training, self.model_config.context_length)
        return build_plan(
            training,
            control,
            self.window,
            windows.n_train,
            windows.n_val,
            stride_tokens=windows.stride_tokens,
            tokens_per_sample=windows.mean_tokens,
            samples_per_step=samples,
        )

    @property
    def window(self) -> int:
        """Tokens of a window, or of the longest chat; data that is shorter is not used."""
        if isinstance(self.data, ChatData):
            return self.data.longest_tokens
        return self.config.training.choose_window(self.model_config.context_length)

    def choose_data_place(self, device: torch.device) -> DataPlace:
        """Where the training tokens are kept, as the run decides it: before the model is built."""
        return self.place_data(device.type, measure_free_bytes(device) if self.data else 0)

    def place_data(self, device_type: str, free_bytes: int) -> DataPlace:
        """Where the training tokens are kept on a device with so much free memory."""
        if self.data is None:
            return DataPlace(False, 0, "random tokens")
        return choose_data_place(
            self.data,
            self.config.training,
            self.config.system,
            self.model_config.context_length,
            device_type,
            free_bytes,
        )

    def runtime(self, ranks: Ranks | None = None) -> Runtime:
        """Device, precision and compilation, as the run would choose them; all `ranks` ask."""
        return build_runtime(self.config.system, self.plan().total_steps, ranks=ranks)

    def at(self, batch_size: int, accumulation: int) -> TrialSpec:
        """The same run with another batch size."""
        training = replace(
            self.config.training, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        return replace(self, config=replace(self.config, training=training))

    def on_card(self, number: int) -> TrialSpec:
        """The same run on one of several cards; on a device without a number, the same."""
        system = self.config.system
        if choose_device(system.device).type == "cuda":
            system = replace(system, device=f"cuda:{number}")
        return replace(self, config=replace(self.config, system=system))
