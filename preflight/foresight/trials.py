"""One trial: every phase of a run at one size, in a process of its own, measured.

The real step, an evaluation, a sample, a save with read-back and a resume. The process is gone
afterwards with all it held, so that one trial never disturbs the next, and a kill by the system
ends the trial alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import shutil
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints import format as checkpoint_format
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.processes import end_with_parent, start_shielded
from preflight.core.signals import StopFlag
from preflight.corpus.shards import DataFolder
from preflight.device.runtime import Runtime, build_runtime, is_out_of_memory
from preflight.settings import ControlSettings, ModelConfig, RunConfig, SamplingConfig
from preflight.tokenization.tokenizer import load_tokenizer
from preflight.training.curve import CURVE_NAME, save_loss_curve
from preflight.training.plan import TrainingPlan, build_plan
from train_utils import BatchLoader, count_windows, iterate_windows
from trainer import Trainer, build_trainer

MAX_TRIAL_SECONDS = 1800.0
TIMED_STEPS, TIMED_SECONDS, SLOW_STEP_SECONDS = 5, 6.0, 4.0
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trial:
    """What one size did.

    Attributes:
        batch_size: sequences per micro-step.
        steps: updates run at this size.
        peak_bytes: most allocated (CUDA), or resident beyond what was there before the model.
        reserved_bytes: most the caching allocator held; 0 without one.
        needed_bytes: what counts against the limit: reserved, context and other processes (CUDA),
            else all that was resident.
        step_seconds: median of an update, `micro_steps` of them in it.
        tokens_per_second: of these updates.
        failure: why it did not get through; empty when every phase ran.
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
        """Whether every phase ran, and within the limit."""
        return not self.failure and self.steps > 0 and self.needed_bytes <= limit_bytes


@dataclass(frozen=True)
class Order:
    """All that a trial needs. `folder` is its temporary place, gone when it has ended."""

    config: RunConfig
    model_config: ModelConfig
    data: DataFolder | None
    folder: Path

    def plan(self) -> TrainingPlan:
        """The run at this size; without data, one long enough to be worth compiling for."""
        context, data = self.model_config.context_length, self.data
        windows = [
            count_windows(part.n_tokens, context)
            for part in ((data.train, data.val) if data else ())
        ]
        return build_plan(
            self.config.resolve_training(),
            self.config.control,
            context,
            *(windows or (10**9, 10**6)),
        )

    def runtime(self) -> Runtime:
        """Device, precision and compilation as the run at this size would choose them."""
        return build_runtime(self.config.system, self.plan().total_steps)

    def at(self, batch_size: int, accumulation: int) -> Order:
        """The same for another size."""
        training = replace(
            self.config.training, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        return replace(self, config=replace(self.config, training=training))


class _Meter:
    """Peaks of memory, phase by phase."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.on_cuda = runtime.device.type == "cuda"
        self.name = "set-up"
        self.phases: dict[str, int] = {}
        self.reserved_bytes = self.needed_bytes = 0
        self._base = 0 if self.on_cuda else psutil.Process().memory_info().rss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what the block needs; the figures are kept when it fails."""
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
            # Beside the allocator's: the context, and what other processes hold.
            needed = reserved + total - free - torch.cuda.memory_reserved(device)
        else:
            needed, reserved = peak, 0
            peak = max(0, peak - self._base)
        self.phases[self.name] = peak
        self.reserved_bytes = max(self.reserved_bytes, reserved)
        self.needed_bytes = max(self.needed_bytes, needed)


def measure(order: Order) -> Trial:
    """Run every phase of a run at one size, in this process.

    Raises:
        PreflightError: what would stand in a run's way besides memory.
    """
    training, plan, runtime = order.config.training, order.plan(), order.runtime()
    tokenizer = load_tokenizer(order.config.model.tokenizer)
    if runtime.device.type != "cuda":
        _load_libraries(order, runtime)
    meter = _Meter(runtime)
    seconds: list[float] = []
    failure = ""
    build = functools.partial(
        build_trainer,
        order.model_config,
        training,
        plan,
        runtime,
        gradient_checkpointing=order.config.system.gradient_checkpointing,
    )
    try:
        with meter.phase("training step"):
            trainer = build()
            with _open_batches(order, runtime) as next_batch:
                _time_steps(trainer, next_batch, seconds)
        with meter.phase("evaluation"):
            trainer.evaluate(_list_validation(order, runtime), 1.0)
        with meter.phase("generation"), runtime.autocast():
            trainer.model.eval()
            length = max(1, min(SAMPLE_TOKENS, order.model_config.context_length - 1))
            generate_text(trainer.model, tokenizer, "", SamplingConfig(max_new_tokens=length))
        with meter.phase("save"):
            saved = checkpoint_format.save_checkpoint(
                order.folder,
                1,
                trainer.model.state_dict(),
                {"trainer": trainer.state_dict()},
                {"model": dataclasses.asdict(order.model_config)},
                {"val_loss": None},
            )
        shapes = {name: tuple(p.shape) for name, p in trainer.model.named_parameters()}
        del trainer
        with meter.phase("resume"):
            build().load_state_dict(
                checkpoint_format.load_weights(saved, shapes),
                checkpoint_format.load_training_state(saved)["trainer"],
            )
    except Exception as error:
        if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):
            raise
        # The cause holds the device's own words where a compiler wrapped them.
        lines = str(error.__cause__ or error).strip().splitlines() or ["no reason given"]
        failure = f"out of memory in the {meter.name}: {lines[0][:120]}"
    step_seconds = statistics.median(seconds[1:] or seconds) if seconds else 0.0
    return Trial(
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


def _load_libraries(order: Order, runtime: Runtime) -> None:
    """A step of a tiny model and a loss curve: what the libraries take for themselves is then
    there, and not counted as the model's.
    """
    save_loss_curve(
        order.folder / CURVE_NAME,
        [{"event": "step", "tokens": 1, "loss": 1.0, "learning_rate": 1.0}],
        "",
    )
    tiny = ModelConfig(64, 16, 16, 2, 1, 64)
    one = replace(order.config.training, batch_size=1, gradient_accumulation_steps=1)
    runtime = replace(runtime, compile_model=False)
    trainer = build_trainer(tiny, one, build_plan(one, ControlSettings(), 16, 1, 1), runtime)
    tokens = torch.zeros((1, 16), dtype=torch.long, device=runtime.device)
    trainer.train_step(0, [(tokens, tokens)])


def _time_steps(trainer: Trainer, next_batch: Callable[[], Batch], seconds: list[float]) -> None:
    """Append the seconds of full steps; the first is a warm-up unless a step is slow."""
    runtime, n_micro_steps = trainer.runtime, trainer.plan.accumulation_steps
    if not runtime.compile_model:  # compiled, another shape would be compiled as well
        # The optimizer's state is there before the first full step: its peak counts.
        trainer.train_step(0, [tuple(part[:1] for part in next_batch())])  # type: ignore[list-item]
    for step in range(1 + TIMED_STEPS):
        runtime.synchronize()
        began = time.perf_counter()
        trainer.train_step(step, (next_batch() for _ in range(n_micro_steps)))
        runtime.synchronize()
        seconds.append(time.perf_counter() - began)
        is_slow = not runtime.compile_model and seconds[0] > SLOW_STEP_SECONDS
        if is_slow or sum(seconds[1:]) > TIMED_SECONDS:
            return


@contextlib.contextmanager
def _open_batches(order: Order, runtime: Runtime) -> Iterator[Callable[[], Batch]]:
    training, context = order.config.training, order.model_config.context_length
    if order.data is None:
        yield functools.partial(_draw_batch, order, runtime)
        return
    with BatchLoader(
        order.data,
        "train",
        batch_size=training.batch_size,
        context_length=context,
        seed=training.seed,
        device=runtime.device,
    ) as loader:
        yield loader.next_batch


def _draw_batch(order: Order, runtime: Runtime) -> Batch:
    """Inputs and targets (B T) of random ids."""
    shape = (order.config.training.batch_size, order.model_config.context_length + 1)
    rows = torch.randint(order.model_config.vocab_size, shape).to(runtime.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _list_validation(order: Order, runtime: Runtime) -> Iterator[Batch]:
    """One batch, as an evaluation would have it."""
    if order.data is None:
        return iter([_draw_batch(order, runtime)])
    size = order.config.training.batch_size
    return iterate_windows(
        order.data,
        "val",
        batch_size=size,
        n_windows=size,
        context_length=order.model_config.context_length,
        device=runtime.device,
    )


def run_in_child(order: Order, answer: Connection) -> None:
    """The child's whole life: measure, answer, end."""
    end_with_parent(functools.partial(_remove_folder, order.folder), int(ExitCode.WORKER_LOST))
    with contextlib.suppress(OSError):  # Linux: out of memory, the system ends us, not the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        answer.send(measure(order))
    except PreflightError as error:
        answer.send((error.code, error.lines))
    except Exception:
        answer.send(traceback.format_exc())


def _remove_folder(folder: Path) -> None:
    for _ in range(3):  # the main thread may be writing there
        shutil.rmtree(folder, ignore_errors=True)


def run_trial(order: Order, hard_limit_bytes: int, stop: StopFlag) -> Trial:
    """Measure in a new process, which is gone, with all it made, on return.

    Args:
        order: what to measure.
        hard_limit_bytes: resident memory at which the child is ended before the machine swaps.
        stop: a signal ends the child and raises.

    Raises:
        PreflightError: what the child says; code WORKER_LOST when it ended without a word.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_in_child, args=(order, sender))
    size = order.config.training.batch_size
    try:
        storage.make_folder(order.folder)
        start_shielded(process)
        sender.close()
        answer = _await_answer(receiver, process, hard_limit_bytes, stop)
    finally:
        _kill(process)
        receiver.close()
        storage.remove_tree(order.folder)
    if isinstance(answer, Trial):
        return answer
    if isinstance(answer, tuple):
        raise PreflightError(answer[0], *answer[1])
    if answer in ("memory", -signal.SIGKILL, -signal.SIGABRT):
        why = (
            "it held all the memory there was"
            if answer == "memory"
            else f"ended by the system (signal {-int(answer)})"
        )
        return Trial(size, failure=f"out of memory: {why}")
    if isinstance(answer, int):
        raise PreflightError(
            ExitCode.WORKER_LOST,
            f"the trial of batch size {size} ended without a result (exit status {answer})",
            "run the same command again",
        )
    raise RuntimeError(f"the trial of batch size {size} failed:\n{answer}")


def _await_answer(
    receiver: Connection, process: BaseProcess, hard_limit_bytes: int, stop: StopFlag
) -> Any:
    """What the child sends, its exit status if nothing, or "memory" when it holds too much."""
    deadline = time.monotonic() + MAX_TRIAL_SECONDS
    while time.monotonic() < deadline:
        stop.leave_if_stopping("stopped: the search is not finished, no report was written")
        if receiver.poll(0.1):
            with contextlib.suppress(EOFError, ConnectionError):
                return receiver.recv()
            process.join()
            return process.exitcode
        with contextlib.suppress(psutil.Error):
            if psutil.Process(process.pid).memory_info().rss > hard_limit_bytes:
                return "memory"
    raise PreflightError(
        ExitCode.WORKER_LOST,
        f"a trial gave no result in {MAX_TRIAL_SECONDS / 60:.0f} minutes",
        "try a few small sizes: --test-batch-sizes 1 2 4",
    )


def _kill(process: BaseProcess) -> None:
    """End a child, and what it started (a compiler's workers), and wait for it."""
    if process.pid is None:
        return
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.close()
