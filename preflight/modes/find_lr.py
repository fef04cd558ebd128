"""`--find-lr`: a learning-rate range test in a process of its own, its picture and its answer."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.foresight.child import LackOfMemory, run_in_child
from preflight.foresight.learning_rate import (
    RangeResult,
    RangeSpec,
    analyse_range,
    run_range_test,
)
from preflight.modes.trying import Progress, Workshop, format_train_command, open_workshop
from preflight.settings import RunConfig

REPORT_NAME, PICTURE_NAME = "lr_finder.json", "lr_finder.png"
FORMAT = "preflight-lr-finder"


def run(config: RunConfig) -> int:
    """Run the test, draw it, print what it found, and return 0, or 1 when it found nothing.

    Raises:
        PreflightError: with the code of whatever keeps the test from running.
    """
    with open_workshop(config, REPORT_NAME, FORMAT) as workshop:
        storage.refuse_other_kind(workshop.output_dir / PICTURE_NAME)
        result = _find(workshop, config)
        path = workshop.output_dir / REPORT_NAME
        content = {
            "format": FORMAT,
            "model": workshop.setup.model_config.label,
            "optimizer": config.training.optimizer,
            "tokens_per_step": workshop.setup.plan.tokens_per_step,
            **result.to_dict(),
            "flags": None if result.fault else _spell(result),
        }
        storage.write_json(path, content)
        _draw(workshop.output_dir / PICTURE_NAME, workshop.setup.model_config.label, result)
        if config.check.json:
            text = json.dumps(content, indent=2)
        else:
            text = "\n".join(
                [*_describe(result, config), "", f"picture: {path.parent / PICTURE_NAME}"]
            )
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return ExitCode.CHECK_FAILED if result.fault else ExitCode.DONE


def _find(workshop: Workshop, config: RunConfig) -> RangeResult:
    settings = config.trials
    spec = RangeSpec(
        workshop.build_spec(settings.find_lr_steps), settings.find_lr_min, settings.find_lr_max
    )
    n_steps = spec.training.n_steps
    log.info(
        f"range test: {n_steps:,} steps of {workshop.setup.plan.tokens_per_step:,} tokens, "
        f"learning rate {spec.lowest:g} to {spec.highest:g}"
    )
    rules = workshop.build_rules("the range test", "stopped: the range test is not finished")
    with Progress(n_steps, "range test") as progress:
        answer = run_in_child(functools.partial(run_range_test, spec), rules, progress.record)
    if isinstance(answer, LackOfMemory):
        raise PreflightError(
            ExitCode.OUT_OF_MEMORY,
            f"the range test ran out of memory: {answer.reason}",
            "lower --batch-size, or find the one that fits: --get-optimal-bs",
        )
    return analyse_range(answer, spec.keep)


def _spell(result: RangeResult) -> str:
    return f"--learning-rate {result.suggested:.2g}"


def _describe(result: RangeResult, config: RunConfig) -> list[str]:
    """What was found, for a person."""
    if not result.points:
        return [result.fault]
    end = f"diverged at {result.points[-1][0]:.2e}" if result.diverged else "did not diverge"
    lines = [f"{len(result.points):,} steps; the loss {end}"]
    if result.fault:
        return [*lines, result.fault]
    command = format_train_command(config, *_spell(result).split(), without=("learning_rate",))
    return [
        *lines,
        f"steepest descent of the smoothed loss: {result.steepest:.2e}",
        f"a tenth of its minimum's ({result.minimum:.2e}): {result.tenth:.2e}",
        "",
        "continue with the larger of the two:",
        f"  {command}",
    ]


def _draw(path: Path, title: str, result: RangeResult) -> None:
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the mode
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    if result.points:
        axes.plot(
            *zip(*result.points, strict=True), color="#9db4d3", linewidth=0.7, label="each step"
        )
        axes.plot(
            *zip(*result.smoothed, strict=True), color="#1f4e8c", linewidth=1.8, label="smoothed"
        )
        low, first = min(y for _, y in result.smoothed), result.points[0][1]
        axes.set_ylim(low - 0.1 * (first - low) - 0.01, first + 0.5 * (first - low) + 0.01)
    marks: list[tuple[str, float | None, str]] = [
        ("steepest descent", result.steepest, "#c8501e"),
        ("a tenth of the minimum's", result.tenth, "#5b7f4d"),
    ]
    for name, rate, colour in marks:
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"learning-rate range test, {title}", loc="left", fontsize=11)
    if result.points:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    with storage.publish_file(path) as file:
        figure.savefig(file, format="png")
