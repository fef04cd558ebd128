"""The rows of the report's sections, from what `--check` found."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from preflight.core.errors import PreflightError
from preflight.core.storage import free_bytes
from preflight.core.units import format_bytes
from preflight.corpus.chats import preview
from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.device.host_memory import available_host_bytes, reachable_host_bytes
from preflight.device.token_store import DataPlace
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.fits import check_disk, judge_fit, suggest_fit
from preflight.foresight.learnability import Advice, Content
from preflight.foresight.memory import MemoryEstimate, MemoryOptions, estimate_savings
from preflight.foresight.run_time import (
    RunCost,
    RunTime,
    count_training_flops,
    find_earliest_stop,
)
from preflight.foresight.target import Target
from preflight.models.cost import count_adapter_parameters, count_parameters
from preflight.modes.report import Problem, Report, compare
from preflight.modes.setup import RunSetup
from preflight.settings import ModelConfig, RunConfig, TrainingSettings, describe_choices
from preflight.tokenization import TokenizerRecipe
from preflight.training.plan import TrainingPlan, describe_windows
from preflight.training.trackers import load_trackers

ROOMY_SHARE = 0.4  # of the memory in use, below which a larger batch is worth a try
_TIMED_PHASES = ("training step", "optimizer step", "evaluation")
_SHOWN_CHARACTERS = 240  # of the decoded window


@dataclass
class Findings:
    """What is known so far of one run; ``None`` for what a problem kept from being known."""

    setup: RunSetup
    report: Report
    model: ModelConfig | None = None
    data: DataFolder | None = None
    plan: TrainingPlan | None = None
    target: Target | None = None
    memory: MemoryEstimate | None = None
    cost: RunCost | None = None
    run_time: RunTime | None = None

    @property
    def config(self) -> RunConfig:
        """The flags, with what a checkpoint to continue from adds."""
        return self.setup.known_config

    @property
    def training(self) -> TrainingSettings:
        """How the weights would be updated."""
        return self.config.training

    def memory_options(self) -> MemoryOptions:
        """What `estimate_memory` needs to know."""
        assert self.target is not None
        checkpointing = self.config.system.gradient_checkpointing
        return self.target.memory_options(
            gradient_checkpointing=checkpointing,
            window_tokens=self.window_tokens,
            data_bytes=self.data_place.n_bytes if self.data_place else 0,
            target_share=self.setup.target_share if self.data else 1.0,
            sharing=self.sharing,
        )

    @property
    def sharing(self) -> Sharing:
        """The ranks that the flags ask for."""
        return self.setup.sharing

    @property
    def sequences_per_step(self) -> int:
        """Sequences of an update, of all ranks."""
        if self.plan is not None:
            return self.plan.samples_per_step
        training = self.training
        per_rank = training.batch_size * training.gradient_accumulation_steps
        return per_rank * self.sharing.world

    @property
    def data_place(self) -> DataPlace | None:
        """Where the training tokens are kept; not known without them."""
        if self.data is None or self.target is None:
            return None
        if self.target.runtime is not None:
            return self.setup.data_place
        return self.setup.place_data(self.data, "cuda", self.target.limit_bytes)

    @property
    def window_tokens(self) -> int:
        """Tokens of a training window."""
        assert self.model is not None
        if self.plan is not None:
            return self.plan.window_tokens
        return self.training.choose_window(self.model.context_length)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an update; of chats their mean."""
        if self.plan is not None:
            return self.plan.tokens_per_step
        return self.sequences_per_step * self.window_tokens

    @property
    def mean_tokens(self) -> int:
        """Tokens of a sequence; of chats their mean."""
        return max(1, round(self.tokens_per_step / self.sequences_per_step))

    def find_model(self) -> None:
        """The architecture, unless its vocabulary is made from the text: see `find_made_model`."""
        if not isinstance(self.setup.tokenizer_choice, TokenizerRecipe):
            self.find_made_model()

    def find_made_model(self) -> None:
        """The architecture; where it is refused, the one with the tokenizer's own vocabulary.

        Raises:
            PreflightError: it is refused.
        """
        if self.model is not None:
            return
        try:
            self.model = self.setup.known_model_config
        except PreflightError:
            self.report.sections["model"]["not_known"] = "needs the tokenizer"
        else:
            self.setup.model_config  # noqa: B018  # raises what is wrong with it


def describe_origin(found: Findings) -> None:
    """The checkpoint that `--train` would continue, or whose weights it would begin with."""
    setup, rows = found.setup, found.report.sections["training configuration"]
    if setup.origin is not None and setup.config:
        rows["continues"] = f"{setup.origin.path}, step {setup.origin.step:,}"
    elif setup.base is not None:
        rows["begins_with"] = f"{setup.base.path}, step {setup.base.step:,}"


def describe_model(found: Findings) -> None:
    """Shape, parameters, sizes."""
    model, rows = found.model, found.report.sections["model"]
    if model is None:
        return
    parameters = count_parameters(model)
    rows["shape"] = model.label
    rows["parameters"] = parameters
    adapter = found.training.adapter
    rows["trainable_parameters"] = (
        count_adapter_parameters(model, adapter) if adapter else parameters
    )
    rows["size_fp32_bytes"] = 4 * parameters
    rows["size_16_bit_bytes"] = 2 * parameters
    if found.memory is not None:
        rows["optimizer_bytes"] = found.memory.items["optimizer"]
    rows["context"] = model.context_length
    rows["vocabulary"] = model.vocab_size
    rows["flops_per_token"] = count_training_flops(model, found.training)


def describe_data(found: Findings, content: Content, window: str) -> None:
    """Counts, and the beginning of a `window` as the model will read it."""
    data, rows = found.data, found.report.sections["dataset"]
    assert data is not None
    for name, split in (("train", data.train), ("validation", data.val)):
        rows[f"{name}_tokens"] = split.n_tokens
        rows[f"{name}_documents"] = split.n_documents
        rows[f"{name}_shards"] = len(split.shards)
    n_bytes, n_tokens = (
        getattr(data.train, name) + getattr(data.val, name) for name in ("n_bytes", "n_tokens")
    )
    rows["largest_document_tokens"] = content.largest_tokens
    rows["duplicate_documents"] = content.duplicate_documents
    rows["replacement_characters"] = content.replacement_characters
    # repr shows line breaks and whatever a terminal would act on.
    rows["the_model_will_read"] = repr(window[:_SHOWN_CHARACTERS])
    rows["bytes_per_token"] = round(n_bytes / n_tokens, 3)


def describe_chats(found: Findings, chats: ChatData) -> None:
    """How many chats and tokens there are, and what is learned of them."""
    rows = found.report.sections["dataset"]
    for name, split in (("train", chats.train), ("validation", chats.val)):
        rows[f"{name}_chats"] = split.n_documents
        rows[f"{name}_tokens"] = split.n_tokens
    rows["longest_chat_tokens"] = chats.longest_tokens
    for number, line in enumerate(preview.describe_chats(chats.facts), 1):
        rows[f"chats_{number}"] = line


def describe_plan(found: Findings) -> None:
    """Batch, optimizer, schedule, and the run's length where it is known."""
    training, rows = found.training, found.report.sections["training configuration"]
    rows["batch_size"] = training.batch_size
    rows["accumulation"] = training.gradient_accumulation_steps
    rows["effective_batch"] = found.sequences_per_step
    if found.sharing.world > 1:
        rows["ranks"] = found.sharing.describe()
    rows["optimizer"] = training.optimizer
    rows["learning_rate"] = found.config.peak_learning_rate
    rows["scheduler"] = training.scheduler
    if found.model is None or found.data is None:
        rows["not_known"] = "the length of the run needs the model and the dataset"
        return
    found.plan = plan = found.setup.plan
    tokens = plan.total_steps * plan.tokens_per_step
    rows["tokens_per_step"] = plan.tokens_per_step
    rows["steps_per_epoch"] = round(plan.steps_per_epoch, 2)
    rows["total_steps"] = plan.total_steps
    rows["epochs"] = round(plan.epochs, 3)
    windows = describe_windows(training, plan, found.model.context_length)
    if windows:
        rows["windows"] = windows
    rows["tokens"] = tokens
    rows["tokens_per_parameter"] = round(tokens / count_parameters(found.model), 3)
    rows["warmup_share"] = round(plan.warmup_steps / plan.total_steps, 4)
    rows["evaluation_every"] = plan.eval_every
    rows["checkpoint_every"] = plan.checkpoint_every
    if plan.patience is not None:
        rows["early_stopping_patience"] = plan.patience
        _describe_early_stopping(found, plan, plan.patience)


def _describe_early_stopping(found: Findings, plan: TrainingPlan, patience: int) -> None:
    """From which step on the run may stop; a warning where it cannot."""
    earliest = find_earliest_stop(plan, found.setup.state.step)
    if earliest is not None:
        found.report.sections["training configuration"]["earliest_stop_step"] = earliest
        return
    text = f"--early-stopping-patience {patience} cannot stop this run: it would take "
    text += f"{patience + 1} evaluations before the end, one every {plan.eval_every:,} of "
    text += f"{plan.total_steps:,} steps"
    fix = "a smaller patience, or a smaller --eval-every"
    found.report.warnings.append(Advice("early_stopping", text, fix))


def describe_trackers(found: Findings) -> None:
    """That TensorBoard's files are written; an error where its library is missing."""
    control = found.config.control
    load_trackers(control)
    if control.tensorboard:
        found.report.sections["training configuration"]["tensorboard"] = True


def describe_memory(found: Findings) -> None:
    """Predicted memory by item and phase, beside what was measured; whether it fits."""
    estimate, target, model = found.memory, found.target, found.model
    if estimate is None or target is None or model is None:
        return
    rows = found.report.sections["memory analysis"]
    rows["device"] = target.name
    if found.data_place is not None:
        rows["training_data"] = found.data_place.why
    for item, size in estimate.items.items():
        rows[f"{item.replace(' ', '_')}_bytes"] = size
    for phase, size in estimate.phases.items():
        rows[f"peak_in_{phase.replace(' ', '_')}_bytes"] = size
    on_cpu = target.device_type == "cpu"
    measured = found.cost.peak_bytes if found.cost else None
    timed = max(estimate.phases[phase] for phase in _TIMED_PHASES)
    rows["allocated_bytes"] = compare(timed, None if on_cpu else measured)
    rows["allocated_to_within_share"] = estimate.error_share
    if on_cpu:  # an allocator's reserve is not known there, but what the process holds is
        rows["resident_bytes"] = compare(estimate.host_bytes, measured)
    else:
        reserved = found.cost.reserved_bytes if found.cost else None
        rows["reserved_bytes"] = compare(estimate.reserved_bytes, reserved)
    needed = estimate.required_bytes
    rows["needed_bytes"] = needed
    rows["available_bytes"] = target.limit_bytes
    rows["verdict"] = judge_fit(needed, target.limit_bytes)
    saved: dict[str, int] = {}
    # A card costs by its size; of the host's memory only a lack is of interest.
    if not on_cpu or needed > ROOMY_SHARE * target.limit_bytes:
        saved = estimate_savings(model, found.training, found.memory_options())
    for flags, size in saved.items():
        rows[f"saved_by_{flags.replace(' ', '_')}_bytes"] = size
    _judge_memory(found, needed, list(saved))
    _describe_host(found, rows)


def _judge_memory(found: Findings, needed: int, ways_to_save: list[str]) -> None:
    """A problem where the run does not fit, a warning where it barely does."""
    target, report = found.target, found.report
    assert target is not None
    limit = f"{format_bytes(target.limit_bytes)} on {target.name}"
    verdict = report.sections["memory analysis"]["verdict"]
    if verdict == "does not fit":
        text = f"does not fit: {format_bytes(needed)} needed, {limit}"
        assert found.model is not None
        options, limit_bytes = found.memory_options(), target.limit_bytes
        fix = suggest_fit(found.model, found.training, options, limit_bytes)
        report.problems.append(Problem(text, fix))
    elif verdict == "tight":
        ways = " or ".join(ways_to_save) or "a smaller --model-size"
        text = f"tight: {format_bytes(needed)} of {limit}"
        report.warnings.append(Advice("memory", text, ways))


def _describe_host(found: Findings, rows: dict[str, Any]) -> None:
    """The machine's own memory, beside a card, and the disk for checkpoints."""
    target, memory, model = found.target, found.memory, found.model
    assert target is not None
    assert memory is not None
    assert model is not None
    problems, config = found.report.problems, found.config
    if target.device_type != "cpu":
        rows["host_needed_bytes"] = memory.host_bytes
        if target.runtime is not None:  # a card that is not here has another host
            rows["host_available_bytes"] = available = reachable_host_bytes()
            if memory.host_bytes > available:
                text = f"host memory: {format_bytes(memory.host_bytes)} needed, "
                text += f"{format_bytes(available)} free"
                problems.append(Problem(text, "close other programs, or a smaller --model-size"))
    total = found.plan.total_steps if found.plan else found.training.max_steps
    disk = check_disk(found.setup.output_dir, model, found.training, config.control, total)
    rows["checkpoint_bytes"] = memory.disk_bytes
    rows["disk_needed_bytes"] = disk.needed_bytes
    rows["disk_free_bytes"] = disk.free_bytes + disk.kept_bytes
    if disk.fault:
        problems.append(Problem(*disk.fault))


def describe_rate(
    found: Findings, estimate: RunCost, measured: RunCost | None, peak_flops: float
) -> None:
    """Seconds a step, tokens/s, and the share of the device's arithmetic that they use."""
    target, model, training = found.target, found.model, found.training
    assert target is not None
    assert model is not None
    rows, cost = found.report.sections["performance estimation"], measured or estimate
    tokens = found.tokens_per_step
    predicted, rate = tokens / estimate.step_seconds, tokens / cost.step_seconds
    rows["basis"] = cost.basis if measured else f"estimate, not measured: {estimate.basis}"
    rows["step_seconds"] = cost.step_seconds
    if measured:
        rows["timed_steps"] = measured.n_timed
        rows["spread_share"] = round(measured.spread_share, 4)
    rows["tokens_per_second"] = compare(round(predicted, 1), round(rate, 1) if measured else None)
    used = count_training_flops(model, training) * rate / (peak_flops * found.sharing.world)
    rows["model_flops_utilisation_share"] = round(used, 4)
    if target.card:
        source = f"the {target.card.name}'s data sheet"
    else:
        source = "a matrix product's rate here"
        if target.device_type == "cuda":
            source += f"; {target.name} is not in the table of cards"
    rows["utilisation_of"] = f"{peak_flops / 1e12:,.3g} TFLOP/s, {source}"


def describe_performance(found: Findings) -> None:
    """The time of the whole run by its parts, and its cost."""
    rows = found.report.sections["performance estimation"]
    run_time, cost = found.run_time, found.cost
    if run_time is None or cost is None:
        rows.setdefault("not_known", "the time of the run needs model, dataset and device")
        return
    rows["start_seconds"] = run_time.start_seconds
    if cost.compile_seconds:
        rows["of_which_compilation_seconds"] = cost.compile_seconds
    rows["training_seconds"] = run_time.training_seconds
    rows["evaluations"] = run_time.n_evaluations
    rows["evaluation_seconds"] = run_time.evaluation_seconds
    rows["checkpoints"] = run_time.n_checkpoints
    rows["checkpoint_seconds"] = run_time.checkpoint_seconds
    rows["total_seconds"] = run_time.total_seconds
    plans = found.report.sections["training configuration"]
    if "earliest_stop_step" in plans:
        step = plans["earliest_stop_step"]
        rows["upper_bound"] = f"early stopping may end the run from step {step:,} on"
    with contextlib.suppress(OverflowError):  # a run of centuries has no date
        finish = datetime.datetime.now() + datetime.timedelta(seconds=run_time.total_seconds)
        rows["finish_if_started_now"] = finish.strftime("%Y-%m-%d %H:%M")
    price = found.config.check.price_per_hour
    if price is not None:
        machines = found.sharing.hosts
        rows["cost"] = round(run_time.total_seconds / 3600 * price * machines, 2)


def describe_system(found: Findings) -> None:
    """Versions, cores, memory, devices, and what was chosen for them."""
    rows = found.report.sections["system information"]
    rows["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    rows["python"] = platform.python_version()
    rows["torch"] = str(torch.__version__)
    rows["numpy"] = np.__version__
    rows["cpu_cores"] = os.cpu_count() or 1
    rows["torch_threads"] = torch.get_num_threads()
    rows["host_memory_bytes"] = psutil.virtual_memory().total
    rows["host_memory_free_bytes"] = available_host_bytes()
    rows["cuda"] = torch.version.cuda or "not in this torch"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
    if found.target is not None and found.target.runtime is not None:
        for note in found.target.runtime.notes:
            key, _, value = note.partition(": ")
            rows[f"{key}_chosen"] = value
    rows["output_disk_free_bytes"] = free_bytes(found.setup.output_dir)
    choices = describe_choices(found.setup.known_adopted)
    if choices:
        rows["flags_set"] = "; ".join(choices)
