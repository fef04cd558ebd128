"""One trial: every phase of a run at one batch size, measured in a process of its own.

The phases are real training steps, an evaluation, a sample, a checkpoint that is read back, and a
resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.signals import StopFlag
from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import count_run_windows
from preflight.device.host_memory import release_freed_memory
from preflight.device.runtime import Runtime, build_runtime, is_out_of_memory
from preflight.device.token_store import DataPlace, measure_free_bytes
from preflight.foresight.child import ChildRules, LackOfMemory, Report, run_in_child
from preflight.foresight.timing import Batch, choose_lag, iterate_step_seconds, take_first_row
from preflight.settings import ControlSettings, ModelConfig, RunConfig, SamplingConfig
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.training.curve import CURVE_NAME, LossCurve
from preflight.training.plan import TrainingPlan, build_plan
from train_utils import (
    choose_data_place,
    find_heaviest_sample,
    iterate_windows,
    open_training_loader,
)
from trainer import Trainer, build_trainer

TIMED_STEPS, TIMED_SECONDS, SLOW_STEP_SECONDS = 5, 6.0, 4.0


@dataclass(frozen=True)
class TrialResult:
    """What was measured at one batch size.

    Attributes:
        batch_size: sequences per micro-step.
        steps: timed updates.
        peak_bytes: peak of allocated memory (CUDA), or of resident memory beyond what the process
            held before the model was built (CPU).
        reserved_bytes: peak of what CUDA's caching allocator held; 0 on the CPU.
        needed_bytes: what counts against the limit: reserved memory, context and other processes
            (CUDA), or the peak of resident memory (CPU).
        micro_steps: of an update.
        step_seconds: median of an update.
        tokens_per_second: of these updates.
        failure: why a phase failed; empty when every phase ran.
        phases: `peak_bytes` of each phase.
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

    def fits(self, limit_bytes: int) -> bool:
        """Whether every phase ran, within the limit."""
        return not self.failure and self.steps > 0 and self.needed_bytes <= limit_bytes


@dataclass(frozen=True)
class TrialSpec:
    """What a trial runs.

    Attributes:
        config: the run; its batch size and accumulation are those of the trial.
        model_config: the architecture.
        data: prepared shards; ``None``: random tokens.
        folder: temporary, removed when the trial ends.
    """

    config: RunConfig
    model_config: ModelConfig
    data: DataFolder | None
    folder: Path

    def plan(self) -> TrainingPlan:
        """The plan of the run; without data, a run long enough to be worth compiling for."""
        training, control = self.config.resolve_training(), self.config.control
        if self.data is None:
            return build_plan(training, control, self.window, 10**9, 10**6)
        windows = count_run_windows(self.data, training, self.model_config.context_length)
        return build_plan(
            training,
            control,
            self.window,
            windows.n_train,
            windows.n_val,
            stride_tokens=windows.stride_tokens,
            tokens_per_sample=windows.mean_tokens,
        )

    @property
    def window(self) -> int:
        """Tokens of a window, or of the longest chat; data that is shorter is not used."""
        if isinstance(self.data, ChatData):
            return self.data.longest_tokens
        return self.config.training.choose_window(self.model_config.context_length)

    def choose_data_place(self, device: torch.device) -> DataPlace:
        """Where the training tokens are kept, as the run decides it: before the model is built."""
        if self.data is None:
            return DataPlace(False, 0, "random tokens")
        return choose_data_place(
            self.data,
            self.config.training,
            self.config.system,
            self.model_config.context_length,
            device.type,
            measure_free_bytes(device),
        )

    def runtime(self) -> Runtime:
        """Device, precision and compilation, as the run would choose them."""
        return build_runtime(self.config.system, self.plan().total_steps)

    def at(self, batch_size: int, accumulation: int) -> TrialSpec:
        """The same run with another batch size."""
        training = replace(
            self.config.training, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        return replace(self, config=replace(self.config, training=training))


class _Meter:
    """The peak of memory in each phase."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.on_cuda = runtime.device.type == "cuda"
        self.name = "set-up"
        self.phases: dict[str, int] = {}
        self.reserved_bytes = self.needed_bytes = 0
        self._base = 0
        if not self.on_cuda:
            # Memory that was freed and kept would be used again, and a model that grows into it
            # would seem to need nothing.
            gc.collect()
            release_freed_memory()
            self._base = psutil.Process().memory_info().rss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the peak of the block, also when it fails."""
        self.name = name
        gc.collect()
        self.runtime.reset_peak_memory()
        try:
            yield
        finally:
            self._read()

    def _read(self) -> None:
        peak = self.runtime.peak_memory_bytes()
        if self.on_cuda:
            device = self.runtime.device
            reserved = torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            # What is used beside the allocator's memory: the context, and other processes.
            needed = reserved + total - free - torch.cuda.memory_reserved(device)
        else:
            needed, reserved = peak, 0
            peak = max(0, peak - self._base)
        self.phases[self.name] = peak
        self.reserved_bytes = max(self.reserved_bytes, reserved)
        self.needed_bytes = max(self.needed_bytes, needed)


def measure(spec: TrialSpec) -> TrialResult:
    """Run every phase of a run, in this process.

    Raises:
        PreflightError: any trouble but a lack of memory, which is a result.
    """
    runtime, plan, training = spec.runtime(), spec.plan(), spec.config.training
    # Without data, that of bytes will do: ids above its own are only never generated.
    tokenizer = spec.data.load_tokenizer() if spec.data else load_tokenizer("byte")
    if runtime.device.type != "cuda":
        _load_libraries(spec, runtime)
    meter = _Meter(runtime)
    seconds: list[float] = []
    failure = ""
    try:
        _run_phases(spec, plan, runtime, tokenizer, meter, seconds)
    except Exception as error:
        cause = error.__cause__ or error  # the device's own words, where a compiler wrapped them
        if not is_out_of_memory(error) and not is_out_of_memory(cause):
            raise
        lines = str(cause).strip().splitlines() or ["no reason given"]
        failure = f"out of memory in the {meter.name}: {lines[0][:120]}"
    # The first step warms up.
    step_seconds = statistics.median(seconds[1:] or seconds) if seconds else 0.0
    return TrialResult(
        training.batch_size,
        len(seconds),
        max(meter.phases.values(), default=0),
        meter.reserved_bytes,
        meter.needed_bytes,
        training.gradient_accumulation_steps,
        step_seconds,
        plan.tokens_per_step / step_seconds if seconds else 0.0,
        failure,
        meter.phases,
    )


def _run_phases(
    spec: TrialSpec,
    plan: TrainingPlan,
    runtime: Runtime,
    tokenizer: Tokenizer,
    meter: _Meter,
    seconds: list[float],
) -> None:
    """A short run from its first step to a resume; what was timed is in `seconds`."""

    def build() -> Trainer:
        return build_trainer(
            spec.model_config,
            spec.config.training,
            plan,
            runtime,
            gradient_checkpointing=spec.config.system.gradient_checkpointing,
        )

    # A run draws its curve while it trains, and holds the library that draws from then on.
    LossCurve([]).save(spec.folder / CURVE_NAME, "trial")
    with meter.phase("training step"):
        place = spec.choose_data_place(runtime.device)
        trainer = build()
        with _open_batches(spec, runtime, place) as next_batch:
            _time_steps(trainer, next_batch, seconds)
    with meter.phase("evaluation"):
        trainer.evaluate(_list_validation(spec, runtime), 1.0)
    with meter.phase("generation"), runtime.autocast():
        trainer.model.eval()
        length = max(1, min(SAMPLE_TOKENS, spec.model_config.context_length - 1))
        generate_text(trainer.model, tokenizer, "", SamplingConfig(max_new_tokens=length))
    with meter.phase("save"):
        saved = save_checkpoint(
            spec.folder,
            1,
            trainer.list_weights(),
            {"trainer": trainer.state_dict()},
            {"model": dataclasses.asdict(spec.model_config), **_describe_adapter(spec)},
            {"val_loss": None},
            optimizer=trainer.list_optimizer_tensors(),
            adapter=spec.config.training.adapter,
        )
    shapes = {name: tuple(w.shape) for name, w in trainer.list_weights().items()}
    del trainer
    with meter.phase("resume"):
        build().load_state_dict(
            checkpoint_format.load_weights(saved, shapes),
            checkpoint_format.load_optimizer(saved),
            checkpoint_format.load_training_state(saved)["trainer"],
        )


def _describe_adapter(spec: TrialSpec) -> dict[str, Any]:
    """As in a checkpoint of adapters, whose base does not matter here."""
    adapter = spec.config.training.adapter
    if adapter is None:
        return {}
    targets = list(adapter.targets)
    return {"adapter": dataclasses.asdict(adapter) | {"targets": targets, "base_sha256": "0" * 64}}


def _load_libraries(spec: TrialSpec, runtime: Runtime) -> None:
    """Train a tiny model and draw a loss curve, so that what the libraries allocate for themselves
    is there before the model, and is not counted as the model's.
    """
    row = {"event": "step", "tokens": 1, "loss": 1.0, "learning_rate": 1.0}
    LossCurve([row]).save(spec.folder / CURVE_NAME, "")
    tiny = ModelConfig(64, 16, 16, 2, 1, 64)
    one = replace(spec.config.training, batch_size=1, gradient_accumulation_steps=1)
    runtime = replace(runtime, compile_model=False)
    trainer = build_trainer(tiny, one, build_plan(one, ControlSettings(), 16, 1, 1), runtime)
    tokens = torch.zeros((1, 16), dtype=torch.long, device=runtime.device)
    trainer.train_step(0, [(tokens, tokens)])


def _time_steps(trainer: Trainer, next_batch: Callable[[], Batch], seconds: list[float]) -> None:
    """Append the seconds of full steps to `seconds`; the first is a warm-up unless it is slow."""
    n_micro_steps, compiled = trainer.plan.accumulation_steps, trainer.runtime.compile_model
    if not compiled:  # compiled, another shape would be compiled as well
        # It allocates the optimizer's state before the first full step, as in every later step.
        trainer.train_step(0, [take_first_row(next_batch())])
    steps = iterate_step_seconds(
        trainer, lambda: (next_batch() for _ in range(n_micro_steps)), choose_lag(trainer)
    )
    with contextlib.closing(steps):
        for taken in itertools.islice(steps, 1 + TIMED_STEPS):
            seconds.append(taken)
            is_slow = not compiled and seconds[0] > SLOW_STEP_SECONDS
            if is_slow or sum(seconds[1:]) > TIMED_SECONDS:
                return


@contextlib.contextmanager
def _open_batches(
    spec: TrialSpec, runtime: Runtime, place: DataPlace
) -> Iterator[Callable[[], Batch]]:
    if spec.data is None:
        yield functools.partial(_draw_batch, spec, runtime)
        return
    with open_training_loader(
        spec.data,
        spec.config.training,
        spec.model_config.context_length,
        runtime.device,
        on_device=place.on_device,
        cursor=find_heaviest_sample(spec.data, spec.config.training),
    ) as loader:
        yield loader.next_batch


def _draw_batch(spec: TrialSpec, runtime: Runtime) -> Batch:
    """Inputs and targets (B T) of random ids."""
    shape = (spec.config.training.batch_size, spec.window + 1)
    rows = torch.randint(spec.model_config.vocab_size, shape).to(runtime.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _list_validation(spec: TrialSpec, runtime: Runtime) -> Iterator[Batch]:
    """One batch, as an evaluation would have it."""
    if spec.data is None:
        return iter([_draw_batch(spec, runtime)])
    size = spec.config.training.batch_size
    return iterate_windows(
        spec.data,
        "val",
        batch_size=size,
        n_windows=size,
        context_length=spec.window,
        device=runtime.device,
    )


def run_trial(spec: TrialSpec, hard_limit_bytes: int, stop: StopFlag) -> TrialResult:
    """Measure in a new process; when this returns, the process and its files are gone.

    Args:
        spec: what to measure.
        hard_limit_bytes: as in `ChildRules`.
        stop: after a signal the child is killed.

    Raises:
        PreflightError: as `run_in_child`.
    """
    size = spec.config.training.batch_size
    rules = ChildRules(
        f"the trial of batch size {size}",
        spec.folder,
        hard_limit_bytes,
        stop,
        ("stopped: the search is not finished, and no report was written",),
        "try a few small sizes: --test-batch-sizes 1 2 4",
    )
    answer = run_in_child(functools.partial(_measure, spec), rules)
    if isinstance(answer, LackOfMemory):
        return TrialResult(size, failure=f"out of memory: {answer.reason}")
    assert isinstance(answer, TrialResult)
    return answer


def _measure(spec: TrialSpec, report: Report) -> TrialResult:
    return measure(spec)
