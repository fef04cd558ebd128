"""`--check`: the report on a run before it is paid for: what it needs, takes, costs, and learns.

Every section is gathered on its own: an error in one becomes a problem line, and the sections
that do not need it still report what they know. Text and JSON come from the same rows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import check_writable, foreign_error, refuse_other_kind, write_json
from preflight.core.units import format_bytes
from preflight.corpus.chats.data import ChatData
from preflight.corpus.chats.preview import pick_examples
from preflight.device.matmul_rate import measure_matmul_flops
from preflight.device.ranks import plan_ranks
from preflight.device.runtime import MIN_STEPS_TO_COMPILE, Runtime, is_out_of_memory
from preflight.foresight.chat_warnings import find_chat_warnings
from preflight.foresight.critical_batch import estimate_learning_needs, find_batch_warnings
from preflight.foresight.fits import find_bf16_fault, judge_fit
from preflight.foresight.learnability import (
    Advice,
    find_content_warnings,
    find_plan_warnings,
    scan_content,
)
from preflight.foresight.measured_cost import measure_cost
from preflight.foresight.memory import estimate_memory
from preflight.foresight.run_time import (
    RunCost,
    count_training_flops,
    estimate_cost,
    estimate_run_time,
)
from preflight.foresight.step_parts import LocalEstimate, estimate_by_rate, estimate_step
from preflight.foresight.target import describe_absent, describe_present, is_absent
from preflight.modes import check_sections as sections
from preflight.modes.check_answers import answer_questions
from preflight.modes.check_losses import describe_losses
from preflight.modes.check_ranks import describe_fewest_ranks, share_host, time_ranks
from preflight.modes.check_sections import ROOMY_SHARE, Findings
from preflight.modes.finetune_setup import FinetuneSetup, build_setup
from preflight.modes.foresee_server import foresee_server
from preflight.modes.report import Problem, Report, is_in_colour
from preflight.modes.start import check_machine
from preflight.settings import RunConfig
from preflight.training.schedule_picture import SCHEDULE_NAME, draw_schedule
from train_utils import iterate_windows

REPORT_NAME = "check_report.json"


def run(config: RunConfig) -> int:
    """Print the report, write it and a picture of the schedule to the output folder.

    Returns:
        0, or 1 with problems.
    """
    if config.serving.serve:
        return foresee_server(config)
    found = find_all(config)
    report = found.report
    with report.guard("training configuration"):
        draw_plan(found)
    with report.guard("system information"):
        if report.is_writable:
            write_json(Path(config.control.output_dir) / REPORT_NAME, report.to_dict())
    if config.check.json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(report.to_text(in_colour=is_in_colour(sys.stdout)))
    return int(ExitCode.CHECK_FAILED if report.problems else ExitCode.DONE)


def build_report(config: RunConfig) -> Report:
    """Gather everything that can be known; the data folder may be built, nothing else is kept."""
    return find_all(config).report


def find_all(config: RunConfig) -> Findings:
    """The report, and what it was made from."""
    with StopFlag() as stop:
        ranks = plan_ranks(config.processes.ranks or 1, config.processes.hosts)
        setup = build_setup(config, stop, ranks=ranks, measures=config.check.measure)
        found = Findings(setup, Report())
        gather(found)
    return found


def gather(found: Findings) -> None:
    """Fill the report, step by step; what fails keeps no other step from its part."""
    report = found.report
    for section, step in QUICK_STEPS:
        with report.guard(section):
            step(found)
    for problem in report.problems:
        log.warning(problem.text)  # now, since a large text may take long to read
    for section, step in STEPS:
        with report.guard(section):
            step(found)
    with report.guard("recommendations"):
        report.answers = answer_questions(found)


def check_output(found: Findings) -> None:
    """The output folder can be written to."""
    check_writable(found.setup.output_dir)
    found.report.is_writable = True


def check_device(found: Findings) -> None:
    """The device that the flags name is there, or known."""
    config = found.config
    if is_absent(config.check):
        describe_absent(config.check, config.system, MIN_STEPS_TO_COMPILE)
    else:
        check_machine(config.system)


def read_data(found: Findings) -> None:
    """Prepare and verify the data, and look at what is in it."""
    rows = found.report.sections["dataset"]
    setup = found.setup
    if isinstance(setup, FinetuneSetup):
        read_chats(found, setup)
        return
    try:
        setup.tokenizer_choice  # noqa: B018
    except PreflightError:
        rows["not_known"] = "needs the tokenizer"
        return
    data, tokenizer = setup.data, setup.tokenizer
    setup.stop.leave_if_stopping("stopped; the data folder is complete")
    found.data = data
    content = scan_content(data, tokenizer)
    found.report.warnings += find_content_warnings(content)
    windows = iterate_windows(
        data,
        "train",
        batch_size=1,
        context_length=setup.window_length,
        n_windows=1,
        device="cpu",
    )
    window = tokenizer.decode(next(iter(windows))[0][0].tolist())
    sections.describe_data(found, content, window)


def read_chats(found: Findings, setup: FinetuneSetup) -> None:
    """Prepare and verify the chats, and show some with what is learned of them."""
    chats = setup.data
    setup.stop.leave_if_stopping("stopped; the prepared chats are complete")
    found.data = chats
    sections.describe_chats(found, chats)
    specials = setup.tokenizer.special_tokens
    with chats.open_rows("train") as rows:
        picked = pick_examples(chats.facts, rows, setup.tokenizer, specials=specials)
    found.report.examples = [list(example.stretches) for example in picked]


def choose_target(found: Findings) -> None:
    """The device at hand, or the card that the flags name."""
    config, setup = found.config, found.setup
    if is_absent(config.check):
        found.target = describe_absent(config.check, config.system, setup.n_steps_to_come)
    else:
        found.target = share_host(describe_present(setup.runtime), found.sharing)
    rows = found.report.sections["training configuration"]
    rows["precision"] = found.target.dtype_name
    rows["compilation"] = found.target.compile_model
    rows["gradient_checkpointing"] = config.system.gradient_checkpointing


def draw_plan(found: Findings) -> None:
    """A picture of the learning rate, in the output folder."""
    if found.plan is None or not found.report.is_writable:
        return
    folder = found.setup.output_dir
    path = folder / SCHEDULE_NAME
    if refuse_other_kind(path) and not (folder / REPORT_NAME).exists():
        raise foreign_error(path, "is another program's file")
    draw_schedule(path, found.plan)
    found.report.sections["training configuration"]["schedule_picture"] = str(path)


def time_run(found: Findings) -> None:
    """Estimate the run's parts and, where the device is here and the run fits, measure them."""
    model, target, training = found.model, found.target, found.training
    if model is None or target is None:
        return
    if found.sharing.world > 1:
        time_ranks(found)
        return
    rows, here = found.report.sections["performance estimation"], None
    if target.card is not None:
        peak_flops = target.card.rate_tflops(target.dtype_name) * 1e12
    elif target.runtime is not None:
        peak_flops = measure_matmul_flops(target.runtime.device, target.dtype)
        rows["matrix_product_gflops"] = round(peak_flops / 1e9, 1)
        here = estimate_here(found, target.runtime, peak_flops)
    else:
        rows["not_known"] = "a memory size alone implies no speed: name the card with --target-gpu"
        return
    estimated = estimate_cost(
        model,
        training,
        dtype=target.dtype,
        card=target.card,
        here=here,
        compile_model=target.compile_model,
        gradient_checkpointing=found.config.system.gradient_checkpointing,
        window_tokens=found.mean_tokens,
    )
    measured = measure(found, estimated) if may_measure(found) else None
    found.cost = measured or estimated
    sections.describe_rate(found, estimated, measured, peak_flops)
    if found.plan is not None:
        found.run_time = estimate_run_time(
            found.cost, found.plan, found.config.control, found.setup.state.step
        )


def estimate_here(found: Findings, runtime: Runtime, matmul_flops: float) -> LocalEstimate:
    """A step on the device at hand: from parts of the model where it fits, else from a rate."""
    model, training, memory = found.model, found.training, found.memory
    assert model is not None
    assert found.target is not None
    model = dataclasses.replace(model, context_length=found.mean_tokens or model.context_length)
    checkpointing = found.config.system.gradient_checkpointing
    fits = memory and judge_fit(memory.required_bytes, found.target.limit_bytes) != "does not fit"
    if fits:
        return estimate_step(
            model,
            training,
            runtime,
            matmul_flops=matmul_flops,
            gradient_checkpointing=checkpointing,
        )
    return estimate_by_rate(
        model,
        training,
        matmul_flops=matmul_flops,
        flops_per_token=count_training_flops(model, training),
        gradient_checkpointing=checkpointing,
    )


def estimate(found: Findings) -> None:
    """Predict the memory, which needs no data."""
    if found.model is not None and found.target is not None:
        found.memory = estimate_memory(found.model, found.training, found.memory_options())
    else:
        found.report.sections["memory analysis"]["not_known"] = "needs the model and the device"


def may_measure(found: Findings) -> bool:
    """Whether real steps can be timed: on a device that is here, and that the run fits."""
    target = found.target
    if not found.config.check.measure or target is None or target.runtime is None:
        return False
    if found.plan is None or found.data is None or found.memory is None:
        return False
    return judge_fit(found.memory.required_bytes, target.limit_bytes) != "does not fit"


def measure(found: Findings, estimate: RunCost) -> RunCost | None:
    """Measured cost; None, and a problem, when the memory does not suffice after all."""
    setup, target = found.setup, found.target
    assert target is not None
    assert target.runtime is not None
    assert found.memory is not None
    try:
        return measure_cost(
            found.config,
            setup.known_model_config,
            setup.plan,
            target.runtime,
            setup.data,
            setup.tokenizer,
            estimate.step_seconds,
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    needed = format_bytes(found.memory.required_bytes)
    found.report.problems.append(
        Problem(
            f"out of memory in a trial step on {target.name}, though {needed} were predicted",
            "a smaller --batch-size with more --gradient-accumulation-steps, or "
            "--gradient-checkpointing",
        )
    )
    return None


def advise(found: Findings) -> None:
    """Warnings about what the run will learn, and what to do next."""
    report, target, config = found.report, found.target, found.config
    if found.plan is not None and found.model is not None and found.data is not None:
        needs = estimate_learning_needs(config, found.model, found.plan, found.data)
        report.warnings += find_batch_warnings(config, needs, found.plan)
        if isinstance(found.data, ChatData):
            report.warnings += find_chat_warnings(config, found.plan, found.data)
        else:
            warnings = find_plan_warnings(config, found.model, found.plan, found.data)
            begun = found.setup.base_facts is not None  # it has learned from other text before
            report.warnings += [
                warning
                for warning in warnings
                if not (begun and warning.key == "tokens_per_parameter")
            ]
    runtime = target.runtime if target else None
    fault = find_bf16_fault(runtime, config.system.mixed_precision) if runtime else None
    if fault:
        report.warnings.append(Advice("bf16", *fault))
    if target is not None and found.memory is not None and target.device_type == "cuda":
        share = found.memory.required_bytes / target.limit_bytes
        if share < ROOMY_SHARE:
            report.recommendations.append(
                f"{share:.0%} of the memory is used: a larger --batch-size may be faster; "
                f"{format_command('--get-optimal-bs', *_name_card(config))} finds it"
            )
    if found.cost is not None and not found.cost.n_timed:
        report.recommendations.append(
            "the time is an estimate: --check on the device itself, without --no-measure, "
            "measures it"
        )
    report.recommendations.append(
        "fix the problems below, then run --check again"
        if report.problems
        else "the same flags without --check begin the run"
        if config.finetuning.finetune
        else f"{format_command('--validate-only')} with the same flags tries every part once; "
        "then --train"
    )


def _name_card(config: RunConfig) -> tuple[str, ...]:
    """The flag of a card that is not here."""
    name = config.check.target_gpu
    return () if name is None else ("--target-gpu", name)


Step = Callable[[Findings], object]
# The section that says so when a step fails, and the step.
QUICK_STEPS: tuple[tuple[str, Step], ...] = (
    ("system information", check_output),
    ("model", sections.describe_origin),
    ("model", lambda found: found.setup.tokenizer_choice),  # its error belongs to this section
    ("model", Findings.find_model),
    ("performance estimation", check_device),
    ("training configuration", sections.describe_trackers),
)
STEPS: tuple[tuple[str, Step], ...] = (
    ("dataset", read_data),
    ("model", Findings.find_made_model),
    ("training configuration", sections.describe_plan),
    ("dataset", describe_losses),
    ("performance estimation", choose_target),
    ("memory analysis", estimate),
    ("model", sections.describe_model),
    ("performance estimation", time_run),
    ("memory analysis", sections.describe_memory),
    ("memory analysis", describe_fewest_ranks),
    ("performance estimation", sections.describe_performance),
    ("system information", sections.describe_system),
    ("recommendations", advise),
)
