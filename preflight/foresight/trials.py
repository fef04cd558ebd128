"""One trial: every phase of a run at one batch size, measured in a process of its own.

The phases are real training steps, an evaluation, a sample, a checkpoint that is read back, and a
resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from generate import SAMPLE_TOKENS, generate_text
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints.rows import list_rows
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.ranks import JoinedRanks, Ranks, is_lost_rank, local_ranks
from preflight.device.runtime import Runtime, choose_device, is_out_of_memory
from preflight.device.token_store import DataPlace
from preflight.foresight.child import ChildRules, LackOfMemory, Report, run_in_child
from preflight.foresight.children import run_in_children
from preflight.foresight.timing import Batch, choose_lag, iterate_step_seconds, take_first_row
from preflight.foresight.trial_meter import Meter
from preflight.foresight.trial_spec import TrialResult, TrialSpec
from preflight.settings import ControlSettings, ModelConfig, SamplingConfig
from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.training.curve import CURVE_NAME, LossCurve
from preflight.training.plan import TrainingPlan, build_plan
from train_utils import (
    Shares,
    find_heaviest_sample,
    iterate_windows,
    open_training_loader,
)
from trainer import Trainer, build_trainer

TIMED_STEPS, TIMED_SECONDS, SLOW_STEP_SECONDS = 5, 6.0, 4.0


def measure(spec: TrialSpec, ranks: Ranks | None = None) -> TrialResult:
    """Run every phase of a run, in this process: alone, or together with the other `ranks`.

    Raises:
        PreflightError: any trouble but a lack of memory, which is a result.
    """
    ranks = ranks or local_ranks()
    runtime, plan, training = spec.runtime(ranks), spec.plan(), spec.config.training
    # Without data, that of bytes will do: ids above its own are only never generated.
    tokenizer = spec.data.load_tokenizer() if spec.data else load_tokenizer("byte")
    if runtime.device.type != "cuda":
        _load_libraries(spec, runtime, ranks)
    meter = Meter(runtime)
    seconds: list[float] = []
    failure = ""
    try:
        _run_phases(spec, plan, runtime, ranks, tokenizer, meter, seconds)
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
        (meter.needed_bytes,),
    )


def _run_phases(
    spec: TrialSpec,
    plan: TrainingPlan,
    runtime: Runtime,
    ranks: Ranks,
    tokenizer: Tokenizer,
    meter: Meter,
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
            ranks=ranks,
        )

    # A run draws its curve while it trains, and holds the library that draws from then on.
    if ranks.is_first:
        LossCurve([]).save(spec.folder / CURVE_NAME, "trial")
    with meter.phase("training step"):
        place = spec.choose_data_place(runtime.device)
        trainer = build()
        with _open_batches(spec, runtime, place, ranks) as next_batch:
            _time_steps(trainer, next_batch, seconds)
    with meter.phase("evaluation"):
        trainer.evaluate(_list_validation(spec, runtime, ranks), 1.0)
    with meter.phase("generation"), runtime.autocast(), ranks.open_root(trainer.model):
        trainer.model.eval()
        length = max(1, min(SAMPLE_TOKENS, spec.model_config.context_length - 1))
        generate_text(trainer.model, tokenizer, "", SamplingConfig(max_new_tokens=length))
    weights, optimizer = trainer.list_weights(), trainer.list_optimizer_tensors()
    with meter.phase("save"):
        saved = save_checkpoint(
            spec.folder,
            1,
            weights,
            {"trainer": trainer.state_dict()},
            {"model": dataclasses.asdict(spec.model_config), **_describe_adapter(spec)},
            {"val_loss": None},
            optimizer=optimizer,
            adapter=spec.config.training.adapter,
            ranks=ranks,
        )
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    rows = list_rows(weights), list_rows(optimizer)
    del trainer, weights, optimizer
    with meter.phase("resume"):
        build().load_state_dict(
            checkpoint_format.load_weights(saved, shapes, rows[0]),
            checkpoint_format.load_optimizer(saved, rows[1]),
            checkpoint_format.load_training_state(saved)["trainer"],
        )


def _describe_adapter(spec: TrialSpec) -> dict[str, Any]:
    """As in a checkpoint of adapters, whose base does not matter here."""
    adapter = spec.config.training.adapter
    if adapter is None:
        return {}
    targets = list(adapter.targets)
    return {"adapter": dataclasses.asdict(adapter) | {"targets": targets, "base_sha256": "0" * 64}}


def _load_libraries(spec: TrialSpec, runtime: Runtime, ranks: Ranks) -> None:
    """Train a tiny model and draw a loss curve, so that what the libraries allocate for themselves
    is there before the model, and is not counted as the model's.
    """
    if ranks.is_first:
        row = {"event": "step", "tokens": 1, "loss": 1.0, "learning_rate": 1.0}
        LossCurve([row]).save(spec.folder / CURVE_NAME, "")
    tiny = ModelConfig(64, 16, 16, 2, 1, 64)
    one = replace(spec.config.training, batch_size=1, gradient_accumulation_steps=1)
    runtime = replace(runtime, compile_model=False)
    plan = build_plan(one, ControlSettings(), 16, 1, 1)
    trainer = build_trainer(tiny, one, plan, runtime, ranks=ranks)
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
            if trainer.ranks.any(is_slow or sum(seconds[1:]) > TIMED_SECONDS):
                return


@contextlib.contextmanager
def _open_batches(
    spec: TrialSpec, runtime: Runtime, place: DataPlace, ranks: Ranks
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
        shares=Shares([spec.config.training.batch_size * ranks.world], ranks),
    ) as loader:
        yield loader.next_batch


def _draw_batch(spec: TrialSpec, runtime: Runtime) -> Batch:
    """Inputs and targets (B T) of random ids."""
    shape = (spec.config.training.batch_size, spec.window + 1)
    rows = torch.randint(spec.model_config.vocab_size, shape).to(runtime.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _list_validation(spec: TrialSpec, runtime: Runtime, ranks: Ranks) -> Iterator[Batch]:
    """One batch of each rank, as an evaluation would have it."""
    if spec.data is None:
        return iter([_draw_batch(spec, runtime)])
    size = spec.config.training.batch_size
    return iterate_windows(
        spec.data,
        "val",
        batch_size=size,
        n_windows=size * ranks.world,
        context_length=spec.window,
        device=runtime.device,
        ranks=ranks,
    )


def run_trial(spec: TrialSpec, hard_limit_bytes: int, stop: StopFlag) -> TrialResult:
    """Measure in new processes, one for each rank; when this returns, they and their files are
    gone.

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
    if spec.n_ranks == 1:
        answers = [run_in_child(functools.partial(_measure, spec), rules)]
    else:
        answers = _run_on_ranks(spec, rules)
    if isinstance(answers[0], LackOfMemory):
        return TrialResult(size, failure=f"out of memory: {answers[0].reason}")
    return _join_results(answers)


def _measure(spec: TrialSpec, report: Report) -> TrialResult:
    return measure(spec)


def _run_on_ranks(spec: TrialSpec, rules: ChildRules) -> list[Any]:
    """The result of each rank, or that of one which lacks memory."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    works = [
        functools.partial(_measure_rank, spec, store.port, rank) for rank in range(spec.n_ranks)
    ]
    return run_in_children(works, rules, _lacks_memory)


def _lacks_memory(answer: TrialResult | LackOfMemory) -> bool:
    return isinstance(answer, LackOfMemory) or bool(answer.failure)


def _measure_rank(spec: TrialSpec, port: int, rank: int, report: Report) -> TrialResult:
    """Measure as one of several ranks, which meet at a port of this machine.

    Raises:
        PreflightError: also with code WORKER_LOST, where another rank has gone.
    """
    if rank:
        log.setLevel("ERROR")
    ranks = JoinedRanks(
        dist.TCPStore("localhost", port),
        rank,
        spec.n_ranks,
        device_type=choose_device(spec.config.system.device).type,
    )
    try:
        result = measure(spec.on_card(rank), ranks)
        if not result.failure:  # or the others wait in a phase that this one has left
            ranks.barrier()
            ranks.close()
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise PreflightError(ExitCode.WORKER_LOST, f"rank {rank} has lost another one") from error
    return result


def _join_results(results: list[TrialResult]) -> TrialResult:
    """One result of all ranks: the memory of the fullest, the speed of the slowest."""
    fullest = max(results, key=lambda result: result.needed_bytes)
    return replace(
        fullest,
        step_seconds=max(result.step_seconds for result in results),
        tokens_per_second=min(result.tokens_per_second for result in results),
        rank_bytes=tuple(result.needed_bytes for result in results),
    )
