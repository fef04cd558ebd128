"""A short but complete training, schedule included, for what it reaches: it leaves no files."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import count_run_windows
from preflight.device.runtime import Runtime, build_runtime
from preflight.device.token_store import DataPlace, measure_free_bytes
from preflight.foresight.child import ChildRules, LackOfMemory, Report, run_in_child
from preflight.foresight.timing import choose_lag
from preflight.settings import ModelConfig, RunConfig, TrainingSettings
from preflight.training.divergence import DivergenceGuard
from preflight.training.plan import TrainingPlan, build_plan
from preflight.training.state import StepResult
from train_utils import Loader, choose_data_place, iterate_windows, open_training_loader
from trainer import Trainer, build_trainer


@dataclass(frozen=True)
class TrainingSpec:
    """What a short training trains.

    Attributes:
        config: the run, with a learning rate.
        model_config: the architecture.
        data: prepared shards.
        n_steps: length of the training; its schedule ends there.
        run_steps: length of the run that it stands for: a warm-up that the flags give is
            shortened as the run is.
        eval_windows: of the validation part, read at the end; ``None``: as many as a run of this
            length reads.
    """

    config: RunConfig
    model_config: ModelConfig
    data: DataFolder
    n_steps: int
    run_steps: int
    eval_windows: int | None = None

    @property
    def training(self) -> TrainingSettings:
        """The flags of the optimization, for this length."""
        training = self.config.resolve_training()
        warmup = training.warmup_steps
        if warmup:
            warmup = max(1, round(warmup * min(1.0, self.n_steps / self.run_steps)))
        return replace(training, max_steps=self.n_steps, num_epochs=None, warmup_steps=warmup)

    @property
    def plan(self) -> TrainingPlan:
        """The training in numbers."""
        windows = count_run_windows(self.data, self.training, self.model_config.context_length)
        plan = build_plan(
            self.training,
            self.config.control,
            windows.window_tokens,
            windows.n_train,
            windows.n_val,
            stride_tokens=windows.stride_tokens,
        )
        n_val = min(windows.n_val, self.eval_windows or plan.eval_windows)
        return replace(plan, eval_windows=n_val)

    @property
    def runtime(self) -> Runtime:
        """Device, precision and compilation, as a run of this length chooses them."""
        return build_runtime(self.config.system, self.n_steps)

    def build_trainer(self, plan: TrainingPlan, runtime: Runtime) -> Trainer:
        """A new model, as a run would begin with it."""
        return build_trainer(
            self.model_config,
            self.training,
            plan,
            runtime,
            gradient_checkpointing=self.config.system.gradient_checkpointing,
        )

    def choose_data_place(self, runtime: Runtime) -> DataPlace:
        """Where the training tokens are kept, as the run decides it: before the model is built."""
        return choose_data_place(
            self.data,
            self.training,
            self.config.system,
            self.model_config.context_length,
            runtime.device.type,
            measure_free_bytes(runtime.device),
        )

    def open_loader(self, runtime: Runtime, place: DataPlace) -> Loader:
        """The training part from its beginning, in the run's order."""
        return open_training_loader(
            self.data,
            self.training,
            self.model_config.context_length,
            runtime.device,
            on_device=place.on_device,
        )


@dataclass(frozen=True)
class TrainingResult:
    """What a short training reached.

    Attributes:
        n_steps: that it ran.
        n_tokens: that it was trained on.
        training_seconds: of its steps, without the first, which warms up, as if all had taken the
            same.
        eval_seconds: of the evaluation.
        eval_windows: that it read.
        val_loss: at the end, in nats per token; ``None`` after a failure.
        bits_per_byte: the same per byte of text.
        losses: of the training steps; of long trainings, means over neighbours.
        failure: why it did not reach its end; empty when it did.
    """

    n_steps: int = 0
    n_tokens: int = 0
    training_seconds: float = 0.0
    eval_seconds: float = 0.0
    eval_windows: int = 0
    val_loss: float | None = None
    bits_per_byte: float | None = None
    losses: tuple[float, ...] = ()
    failure: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of the training steps."""
        return self.n_tokens / self.training_seconds if self.training_seconds else 0.0


def train_shortly(spec: TrainingSpec, report: Report) -> TrainingResult:
    """Train in this process; `report` takes (step, loss) of every step.

    A training that diverges is a result.

    Raises:
        PreflightError: any other trouble.
    """
    losses: list[float] = []
    try:
        return _train(spec, report, losses)
    except PreflightError as error:
        if error.code != ExitCode.DIVERGED:
            raise
        return TrainingResult(len(losses), failure=error.lines[0])


def _train(spec: TrainingSpec, report: Report, losses: list[float]) -> TrainingResult:
    plan, runtime = spec.plan, spec.runtime
    place = spec.choose_data_place(runtime)
    trainer = spec.build_trainer(plan, runtime)
    guard = DivergenceGuard(Path(spec.config.control.output_dir), fp16=runtime.needs_scaler)
    pending: deque[StepResult] = deque()
    began = after_first = time.perf_counter()

    def read(keep: int) -> None:
        while len(pending) > keep:
            result = pending.popleft()
            loss, norm = float(result.loss), float(result.grad_norm)  # waits for the device
            losses.append(loss)
            report((result.step, loss))
            guard.check(result, math.isfinite(loss) and math.isfinite(norm), norm)

    with spec.open_loader(runtime, place) as loader:
        for step in range(plan.total_steps):
            batches = (loader.next_batch() for _ in range(plan.accumulation_steps))
            pending.append(trainer.train_step(step, batches))
            read(choose_lag(trainer))
            if step == 0:
                after_first = time.perf_counter()
        read(0)
    ended = time.perf_counter()
    seconds = ended - began
    if plan.total_steps > 1:
        seconds = (ended - after_first) * plan.total_steps / (plan.total_steps - 1)
    windows = iterate_windows(
        spec.data,
        "val",
        batch_size=spec.training.batch_size,
        context_length=spec.training.choose_window(spec.model_config.context_length),
        n_windows=plan.eval_windows,
        device=runtime.device,
    )
    val = spec.data.val
    found = trainer.evaluate(windows, val.n_tokens / val.n_bytes)
    assert found is not None
    result = TrainingResult(
        plan.total_steps,
        plan.total_steps * plan.tokens_per_step,
        seconds,
        time.perf_counter() - ended,
        plan.eval_windows,
        losses=average_neighbours(losses),
    )
    if not math.isfinite(found.loss):
        return replace(result, failure="diverged: the validation loss is not finite")
    return replace(result, val_loss=found.loss, bits_per_byte=found.bits_per_byte)


def average_neighbours(values: list[float], most: int = 200) -> tuple[float, ...]:
    """At most `most` means of as many neighbours each; values that are not finite are left out."""
    per_mean = -(-len(values) // most) or 1
    groups = (values[first : first + per_mean] for first in range(0, len(values), per_mean))
    finite = ([value for value in group if math.isfinite(value)] for group in groups)
    return tuple(sum(group) / len(group) for group in finite if group)


def try_training(spec: TrainingSpec, rules: ChildRules, on_step: Report) -> TrainingResult:
    """`train_shortly` in a process of its own.

    Raises:
        PreflightError: as `run_in_child`.
    """
    answer = run_in_child(functools.partial(train_shortly, spec), rules, on_step)
    if isinstance(answer, LackOfMemory):
        return TrainingResult(failure=f"out of memory: {answer.reason}")
    assert isinstance(answer, TrainingResult)
    return answer


def describe_training(spec: TrainingSpec) -> dict[str, object]:
    """What decides a short training's result, as plain JSON types: to find it again."""
    system = spec.config.system
    return {
        "model": dataclasses.asdict(spec.model_config),
        "training": dataclasses.asdict(spec.training),
        "data": spec.data.fingerprint,
        "eval_windows": spec.plan.eval_windows,
        "device": system.device,
        "mixed_precision": system.mixed_precision,
    }
