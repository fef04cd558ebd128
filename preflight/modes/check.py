"""`--check`: the report on a run before it is paid for: what it needs, takes, costs, and learns.

Every section is gathered on its own: a trouble in one becomes a problem line, and the sections
that can do without it still say what they know. Text and JSON come from the same rows.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode
from preflight.core.signals import StopFlag
from preflight.core.storage import check_writable, free_bytes, write_json
from preflight.core.units import format_bytes
from preflight.corpus.build import prepare_data
from preflight.corpus.shards import DataFolder
from preflight.device.cards import Card, find_card, match_device
from preflight.device.host_memory import available_host_bytes, reachable_host_bytes
from preflight.device.runtime import (
    MIN_STEPS_TO_COMPILE,
    Runtime,
    build_runtime,
    is_out_of_memory,
)
from preflight.foresight.fits import (
    check_disk,
    find_bf16_fault,
    judge_fit,
    measure_reachable_bytes,
    suggest_fit,
)
from preflight.foresight.learnability import (
    Advice,
    find_content_warnings,
    find_plan_warnings,
    scan_content,
)
from preflight.foresight.memory import (
    MemoryEstimate,
    MemoryOptions,
    estimate_memory,
    estimate_savings,
)
from preflight.foresight.run_time import (
    RunCost,
    RunTime,
    estimate_cost,
    estimate_run_time,
    measure_cost,
    measure_matmul_flops,
)
from preflight.models.cost import count_parameters, estimate_flops_per_token
from preflight.modes.report import Problem, Report, compare
from preflight.settings import ModelConfig, RunConfig, describe_choices
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer
from preflight.training.plan import TrainingPlan, TrainState, build_plan
from preflight.training.resume import adopt_settings, find_origin, resolve_model
from train_utils import count_windows, iterate_windows

REPORT_NAME = "check_report.json"
_TIMED_PHASES = ("training step", "optimizer step", "evaluation")
_SHOWN_CHARACTERS = 240  # of the decoded window
_ROOMY_SHARE = 0.4  # of the memory in use, below which a larger batch is worth a try
_HOPPER_AND_LATER = ("H100", "H200", "GH200", "B200")


@dataclass(frozen=True)
class Target:
    """The device that the run is judged for: the present one, or one that is only named."""

    name: str
    device_type: str
    dtype: torch.dtype
    compile_model: bool
    limit_bytes: int
    card: Card | None = None
    runtime: Runtime | None = None

    def memory_options(self, gradient_checkpointing: bool) -> MemoryOptions:
        """What `estimate_memory` has to know of it."""
        hopper = None
        if self.runtime is None and self.card is not None:
            hopper = self.card.name.startswith(_HOPPER_AND_LATER)
        return MemoryOptions(
            self.dtype,
            self.device_type,
            gradient_checkpointing,
            self.compile_model,
            hopper_or_newer=hopper,
        )


def run(config: RunConfig) -> int:
    """Print the report, write it to the output folder, and return 0, or 1 with problems."""
    report = build_report(config)
    with report.guard("system information"):
        if report.is_writable:
            write_json(Path(config.control.output_dir) / REPORT_NAME, report.to_dict())
    if config.check.json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(report.to_text())
    return int(ExitCode.CHECK_FAILED if report.problems else ExitCode.DONE)


def build_report(config: RunConfig) -> Report:
    """Gather everything that can be known; the data folder may be built, nothing else is kept."""
    return _Gatherer(config).gather()


class _Gatherer:
    """What is known so far of one run; ``None`` for what a problem kept from being known."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.report = Report()
        self.output_dir = Path(config.control.output_dir)
        self.tokenizer: Tokenizer | None = None
        self.model_config: ModelConfig | None = None
        self.origin: Checkpoint | None = None
        self.state = TrainState()
        self.data: DataFolder | None = None
        self.plan: TrainingPlan | None = None
        self.target: Target | None = None
        self.memory: MemoryEstimate | None = None
        self.cost: RunCost | None = None
        self.run_time: RunTime | None = None

    def gather(self) -> Report:
        report = self.report
        with report.guard("system information"):
            report.is_writable = False
            check_writable(self.output_dir)
            report.is_writable = True
        with report.guard("model"):
            self._find_origin()
        with report.guard("model"):
            self.tokenizer = load_tokenizer(self.config.model.tokenizer)
        with report.guard("model"):
            self._resolve_model()
        with report.guard("dataset"):
            self._read_data()
        with report.guard("training configuration"):
            self._plan_training()
        with report.guard("performance estimation"):
            self._choose_target()
        self._predict_memory()
        self._describe_model()
        with report.guard("performance estimation"):
            self._time_run()
        self._describe_memory()
        self._describe_performance()
        self._describe_system()
        self._advise()
        return report

    # ---- what is to run -------------------------------------------------------------------------

    def _find_origin(self) -> None:
        """The checkpoint that `--train` would continue, and its settings."""
        origin = find_origin(self.config, self.output_dir)
        if origin is not None:
            self.config = adopt_settings(self.config, origin)
            self.origin = origin
            samples = (
                self.config.training.batch_size * self.config.training.gradient_accumulation_steps
            )
            self.state = TrainState(step=origin.step, cursor=origin.step * samples)
            self.report.sections["training configuration"]["continues"] = (
                f"{origin.path}, step {origin.step:,}"
            )

    def _resolve_model(self) -> None:
        """The architecture; where it is refused, the one with the tokenizer's own vocabulary."""
        if self.tokenizer is None:
            self.report.sections["model"]["not_known"] = "needs the tokenizer"
            return
        own = replace(self.config.model, vocab_size=None)
        self.model_config = own.resolve(self.tokenizer.vocab_size)
        self.model_config = resolve_model(self.config, self.tokenizer, self.origin)

    def _read_data(self) -> None:
        rows = self.report.sections["dataset"]
        if self.tokenizer is None:
            rows["not_known"] = "needs the tokenizer"
            return
        assert self.model_config is not None  # there is one as soon as there is a tokenizer
        context = self.model_config.context_length
        with StopFlag() as stop:
            data = prepare_data(self.config.data, self.tokenizer, context, stop)
            stop.leave_if_stopping("stopped; the data folder is complete")
        self.data = data
        for name, split in (("train", data.train), ("validation", data.val)):
            rows[f"{name}_tokens"] = split.n_tokens
            rows[f"{name}_documents"] = split.n_documents
            rows[f"{name}_shards"] = len(split.shards)
        rows["bytes_per_token"] = round(
            (data.train.n_bytes + data.val.n_bytes) / (data.train.n_tokens + data.val.n_tokens), 3
        )
        content = scan_content(data, self.tokenizer)
        rows["largest_document_tokens"] = content.largest_tokens
        rows["duplicate_documents"] = content.duplicate_documents
        rows["replacement_characters"] = content.replacement_characters
        self.report.warnings += find_content_warnings(content)
        windows = iterate_windows(
            data, "train", batch_size=1, context_length=context, n_windows=1, device="cpu"
        )
        text = self.tokenizer.decode(next(iter(windows))[0][0].tolist())
        # repr shows line breaks and whatever a terminal would act on.
        rows["the_model_will_read"] = repr(text[:_SHOWN_CHARACTERS])

    def _plan_training(self) -> None:
        config, rows = self.config, self.report.sections["training configuration"]
        training = config.training
        rows["batch_size"] = training.batch_size
        rows["accumulation"] = training.gradient_accumulation_steps
        rows["effective_batch"] = training.batch_size * training.gradient_accumulation_steps
        rows["optimizer"] = training.optimizer
        rows["learning_rate"] = config.peak_learning_rate
        rows["scheduler"] = training.scheduler
        if self.model_config is None or self.data is None:
            rows["not_known"] = "the length of the run needs the model and the dataset"
            return
        context = self.model_config.context_length
        self.plan = plan = build_plan(
            config.resolve_training(),
            config.control,
            context,
            count_windows(self.data.train.n_tokens, context),
            count_windows(self.data.val.n_tokens, context),
            self.state,
        )
        rows["tokens_per_step"] = plan.tokens_per_step
        rows["steps_per_epoch"] = round(plan.steps_per_epoch, 2)
        rows["total_steps"] = plan.total_steps
        rows["epochs"] = round(plan.total_steps / plan.steps_per_epoch, 3)
        rows["tokens"] = plan.total_steps * plan.tokens_per_step
        rows["tokens_per_parameter"] = round(
            rows["tokens"] / count_parameters(self.model_config), 3
        )
        rows["warmup_share"] = round(plan.warmup_steps / plan.total_steps, 4)
        rows["evaluation_every"] = plan.eval_every
        rows["checkpoint_every"] = plan.checkpoint_every

    def _choose_target(self) -> None:
        """The device at hand, or the card that the flags name."""
        check, system = self.config.check, self.config.system
        steps = (
            self.plan.total_steps - self.state.step
            if self.plan
            else (self.config.training.max_steps or MIN_STEPS_TO_COMPILE)
        )
        if check.target_gpu or check.gpu_memory:
            card = find_card(check.target_gpu) if check.target_gpu else None
            has_bf16 = card is None or card.bf16_tflops is not None
            dtype = torch.bfloat16 if has_bf16 else torch.float16
            if system.mixed_precision is False:
                dtype = torch.float32
            compile_model = system.compile_model
            if compile_model is None:
                compile_model = steps >= MIN_STEPS_TO_COMPILE
            gib = check.gpu_memory
            limit = int(gib * 2**30) if gib or card is None else card.usable_bytes  # type: ignore[operator]
            name = card.name if card else f"a card with {gib:g} GiB"
            self.target = Target(name, "cuda", dtype, compile_model, limit, card)
        else:
            self.target = self._describe_present(build_runtime(system, max(1, steps)))
        rows = self.report.sections["training configuration"]
        rows["precision"] = str(self.target.dtype).removeprefix("torch.")
        rows["compilation"] = self.target.compile_model
        rows["gradient_checkpointing"] = system.gradient_checkpointing

    def _describe_present(self, runtime: Runtime) -> Target:
        device, limit = runtime.device, measure_reachable_bytes(runtime)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            card = match_device(properties.name, properties.total_memory)
            return Target(
                properties.name, "cuda", runtime.dtype, runtime.compile_model, limit, card, runtime
            )
        return Target(
            str(device), "cpu", runtime.dtype, runtime.compile_model, limit, runtime=runtime
        )

    # ---- memory ---------------------------------------------------------------------------------

    def _memory_options(self) -> MemoryOptions:
        assert self.target is not None
        return self.target.memory_options(self.config.system.gradient_checkpointing)

    def _predict_memory(self) -> None:
        if self.model_config is None or self.target is None:
            self.report.sections["memory analysis"]["not_known"] = "needs the model and the device"
            return
        self.memory = estimate_memory(
            self.model_config, self.config.training, self._memory_options()
        )

    def _describe_memory(self) -> None:
        if self.memory is None or self.target is None or self.model_config is None:
            return
        rows, estimate = self.report.sections["memory analysis"], self.memory
        rows["device"] = self.target.name
        for item, size in estimate.items.items():
            rows[f"{item.replace(' ', '_')}_bytes"] = size
        for phase, size in estimate.phases.items():
            rows[f"peak_in_{phase.replace(' ', '_')}_bytes"] = size
        on_cpu, needed = self.target.device_type == "cpu", estimate.required_bytes
        measured = self.cost.peak_bytes if self.cost else None
        timed = max(estimate.phases[phase] for phase in _TIMED_PHASES)
        rows["allocated_bytes"] = compare(timed, None if on_cpu else measured)
        rows["allocated_to_within_share"] = estimate.error_share
        if on_cpu:  # what an allocator holds is not known there, but what the process does
            rows["resident_bytes"] = compare(estimate.host_bytes, measured)
        else:
            rows["reserved_bytes"] = compare(
                estimate.reserved_bytes, self.cost.reserved_bytes if self.cost else None
            )
        rows["needed_bytes"] = needed
        rows["available_bytes"] = self.target.limit_bytes
        verdict = judge_fit(needed, self.target.limit_bytes)
        rows["verdict"] = verdict
        saved = estimate_savings(self.model_config, self.config.training, self._memory_options())
        for flags, size in saved.items():
            rows[f"saved_by_{flags.replace(' ', '_')}_bytes"] = size
        if verdict == "does not fit":
            self._report_misfit(needed)
        elif verdict == "tight":
            self.report.warnings.append(
                Advice(
                    "memory",
                    f"tight: {format_bytes(needed)} of "
                    f"{format_bytes(self.target.limit_bytes)} on {self.target.name}",
                    " or ".join(saved) or "a smaller --model-size",
                )
            )
        self._check_host(rows)

    def _report_misfit(self, needed: int) -> None:
        assert self.target is not None
        assert self.model_config is not None
        self.report.problems.append(
            Problem(
                f"does not fit: {format_bytes(needed)} needed, "
                f"{format_bytes(self.target.limit_bytes)} on {self.target.name}",
                suggest_fit(
                    self.model_config,
                    self.config.training,
                    self._memory_options(),
                    self.target.limit_bytes,
                ),
            )
        )

    def _check_host(self, rows: dict[str, Any]) -> None:
        """The machine's own memory, beside a card, and the disk for checkpoints."""
        assert self.memory is not None
        assert self.model_config is not None
        if self.target is not None and self.target.device_type != "cpu":
            available = reachable_host_bytes()
            rows["host_needed_bytes"] = self.memory.host_bytes
            if self.target.runtime is not None:  # a card that is not here has another host
                rows["host_available_bytes"] = available
                if self.memory.host_bytes > available:
                    self.report.problems.append(
                        Problem(
                            f"host memory: {format_bytes(self.memory.host_bytes)} needed, "
                            f"{format_bytes(available)} free",
                            "close other programs, or choose a smaller --model-size",
                        )
                    )
        total = self.plan.total_steps if self.plan else self.config.training.max_steps
        disk = check_disk(
            self.output_dir, self.model_config, self.config.training, self.config.control, total
        )
        rows["checkpoint_bytes"] = self.memory.disk_bytes
        rows["disk_needed_bytes"] = disk.needed_bytes
        rows["disk_free_bytes"] = disk.free_bytes + disk.kept_bytes
        if disk.fault:
            self.report.problems.append(Problem(*disk.fault))

    # ---- time -----------------------------------------------------------------------------------

    def _time_run(self) -> None:
        """Estimate the run's parts and, where the device is here and it fits, measure them."""
        if self.model_config is None or self.target is None:
            return
        target, training, rows = self.target, self.config.training, self._performance
        cpu_flops = None
        if target.runtime is not None and target.card is None:
            cpu_flops = measure_matmul_flops(target.runtime.device, target.dtype)
            rows["matrix_product_gflops"] = round(cpu_flops / 1e9, 1)
        elif target.card is None:
            rows["not_known"] = "a size alone says nothing about speed: --target-gpu NAME does"
            return
        estimate = estimate_cost(
            self.model_config,
            training,
            dtype=target.dtype,
            card=target.card,
            cpu_flops=cpu_flops,
            compile_model=target.compile_model,
            gradient_checkpointing=self.config.system.gradient_checkpointing,
        )
        self.cost = estimate
        self._rate_flops = (
            cpu_flops
            or target.card.rate_tflops(  # type: ignore[union-attr]
                str(target.dtype).removeprefix("torch.")
            )
            * 1e12
        )
        tokens = (
            training.batch_size
            * training.gradient_accumulation_steps
            * self.model_config.context_length
        )
        self._predicted_rate, measured = tokens / estimate.step_seconds, None
        if self._may_measure():
            measured = self._measure(estimate)
        self.cost = measured or estimate
        rows["basis"] = self.cost.basis if measured else f"estimate, not measured: {estimate.basis}"
        rate = tokens / self.cost.step_seconds
        rows["step_seconds"] = self.cost.step_seconds
        if measured:
            rows["timed_steps"] = measured.n_timed
            rows["spread_share"] = round(measured.spread_share, 4)
        rows["tokens_per_second"] = compare(
            round(self._predicted_rate, 1), round(rate, 1) if measured else None
        )
        used = estimate_flops_per_token(self.model_config) * rate / self._rate_flops
        rows["model_flops_utilisation_share"] = round(used, 4)
        of = (
            f"the {target.card.name}'s sheet"
            if target.card
            else (
                "a matrix product's rate here"
                + (
                    f"; {target.name} is not in the table of cards"
                    if target.device_type == "cuda"
                    else ""
                )
            )
        )
        rows["utilisation_of"] = f"{self._rate_flops / 1e12:,.3g} TFLOP/s, {of}"
        if self.plan is not None:
            self.run_time = estimate_run_time(
                self.cost, self.plan, self.config.control, self.state.step
            )

    @property
    def _performance(self) -> dict[str, Any]:
        return self.report.sections["performance estimation"]

    def _may_measure(self) -> bool:
        if not self.config.check.measure or self.target is None or self.target.runtime is None:
            return False
        if self.plan is None or self.data is None or self.memory is None:
            return False
        return judge_fit(self.memory.required_bytes, self.target.limit_bytes) != "does not fit"

    def _measure(self, estimate: RunCost) -> RunCost | None:
        """Measured cost; None, and a problem, when the memory does not suffice after all."""
        assert self.model_config is not None
        assert self.plan is not None
        assert self.target is not None
        assert self.target.runtime is not None
        assert self.data is not None
        assert self.tokenizer is not None
        try:
            return measure_cost(
                self.config,
                self.model_config,
                self.plan,
                self.target.runtime,
                self.data,
                self.tokenizer,
                estimate.step_seconds,
            )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self.report.problems.append(
            Problem(
                f"out of memory in a trial step on {self.target.name}, though "
                f"{format_bytes(self.memory.required_bytes)} were predicted",  # type: ignore[union-attr]
                "a smaller --batch-size with more --gradient-accumulation-steps, or "
                "--gradient-checkpointing",
            )
        )
        return None

    def _describe_performance(self) -> None:
        rows, run_time, cost = self._performance, self.run_time, self.cost
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
        with contextlib.suppress(OverflowError):  # a run of centuries has no date
            finish = datetime.datetime.now() + datetime.timedelta(seconds=run_time.total_seconds)
            rows["finish_if_started_now"] = finish.strftime("%Y-%m-%d %H:%M")
        if self.config.check.price_per_hour is not None:
            hours = run_time.total_seconds / 3600
            rows["cost"] = round(hours * self.config.check.price_per_hour, 2)

    # ---- the rest -------------------------------------------------------------------------------

    def _describe_model(self) -> None:
        model, rows = self.model_config, self.report.sections["model"]
        if model is None:
            return
        parameters = count_parameters(model)
        rows["shape"] = model.label
        rows["parameters"] = parameters
        rows["trainable_parameters"] = parameters
        rows["size_fp32_bytes"] = 4 * parameters
        rows["size_16_bit_bytes"] = 2 * parameters
        if self.memory is not None:
            rows["optimizer_bytes"] = self.memory.items["optimizer"]
        rows["context"] = model.context_length
        rows["vocabulary"] = model.vocab_size
        rows["flops_per_token"] = estimate_flops_per_token(model)

    def _describe_system(self) -> None:
        rows = self.report.sections["system information"]
        memory = psutil.virtual_memory()
        rows["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
        rows["python"] = platform.python_version()
        rows["torch"] = str(torch.__version__)
        rows["numpy"] = np.__version__
        rows["cpu_cores"] = os.cpu_count() or 1
        rows["torch_threads"] = torch.get_num_threads()
        rows["host_memory_bytes"] = memory.total
        rows["host_memory_free_bytes"] = available_host_bytes()
        rows["cuda"] = torch.version.cuda or "not in this torch"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            rows[f"cuda:{index}"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
        if self.target is not None and self.target.runtime is not None:
            for note in self.target.runtime.notes:
                key, _, value = note.partition(": ")
                rows[f"{key}_chosen"] = value
        rows["output_disk_free_bytes"] = free_bytes(self.output_dir)
        choices = describe_choices(self.config)
        if choices:
            rows["flags_set"] = "; ".join(choices)

    def _advise(self) -> None:
        """Warnings about what the run will learn, and what to do next."""
        report, target = self.report, self.target
        if self.plan is not None and self.model_config is not None and self.data is not None:
            report.warnings += find_plan_warnings(
                self.config, self.model_config, self.plan, self.data
            )
        if target is not None and target.runtime is not None:
            fault = find_bf16_fault(target.runtime, self.config.system.mixed_precision)
            report.warnings += [Advice("bf16", *fault)] if fault else []
        if target is not None and self.memory is not None:
            share = self.memory.required_bytes / target.limit_bytes
            if target.device_type == "cuda" and share < _ROOMY_SHARE:
                report.recommendations.append(
                    f"{share:.0%} of the memory is used: a larger --batch-size may be faster; "
                    "python main.py --get-optimal-bs finds it"
                )
        if self.cost is not None and not self.cost.n_timed:
            report.recommendations.append(
                "the time is an estimate: --check on the device itself, without --no-measure, "
                "measures it"
            )
        report.recommendations.append(
            "mend the problems below, then run --check again"
            if report.problems
            else "python main.py --validate-only with the same flags tries every part once; "
            "then --train"
        )
