"""`--forecast`: the bits per byte that a run will reach, from three short complete trainings.

The report is the journal too: a training that an interrupted forecast has done is not done again.
When the run is done, `--train` compares.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_seconds
from preflight.foresight.forecast import (
    LEAST_RUN_STEPS,
    Prediction,
    choose_lengths,
    forecast_loss,
)
from preflight.foresight.run_time import RunCost, estimate_run_time
from preflight.foresight.short_training import (
    TrainingResult,
    TrainingSpec,
    describe_training,
    try_training,
)
from preflight.modes.setup import RunSetup
from preflight.modes.trying import (
    Progress,
    Workshop,
    describe_result,
    find_result,
    format_train_command,
    open_workshop,
    read_report,
)
from preflight.settings import RunConfig
from preflight.training.metrics import METRICS_NAME, read_metrics

REPORT_NAME = "forecast.json"
FORMAT = "preflight-forecast"
_MANY_EPOCHS = 4  # repeated text is worth about as much as new up to here (arXiv:2305.16264)
Trained = list[tuple[TrainingSpec, TrainingResult]]


def run(config: RunConfig) -> int:
    """Train three times, print the forecast, and return 0.

    Raises:
        PreflightError: code FLAGS for a run that is too short; DIVERGED or OUT_OF_MEMORY when a
            training did not reach its end; SIGINT or SIGTERM after a signal, with what is kept;
            otherwise the code of whatever keeps a training from running.
    """
    with open_workshop(config, REPORT_NAME, FORMAT) as workshop:
        total = workshop.setup.plan.total_steps
        if total < LEAST_RUN_STEPS:
            raise PreflightError(
                ExitCode.FLAGS,
                f"a run of {total:,} steps is too short for a forecast",
                f"--max-steps {LEAST_RUN_STEPS} or more",
            )
        trained = _train(workshop, choose_lengths(total))
        content = _build_report(workshop, trained)
        storage.write_json(workshop.output_dir / REPORT_NAME, content)
        text = json.dumps(content, indent=2)
        if not config.check.json:
            text = "\n".join(_describe(content, workshop, config))
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return ExitCode.DONE


def _train(workshop: Workshop, lengths: tuple[int, ...]) -> Trained:
    """Every training, of which an earlier call may have done some."""
    path, total = workshop.output_dir / REPORT_NAME, workshop.setup.plan.total_steps
    saved = read_report(path).get("trainings", [])
    specs = [workshop.build_spec(length) for length in lengths]
    trained = [(spec, result) for spec in specs if (result := find_result(saved, spec))]
    waiting = specs[len(trained) :] if len(trained) < len(specs) else []
    n_steps = sum(spec.n_steps for spec in waiting)
    log.info(
        f"forecast: trainings of {', '.join(f'{length:,}' for length in lengths)} steps, "
        f"{sum(lengths) / total:.0%} of the run's {total:,}"
        + (f"; {len(trained)} of them done before" if trained else "")
    )
    stopped = "stopped: what is done is kept; run the same command again to continue"
    with Progress(n_steps, "forecast") as progress:
        for spec in waiting:
            name = f"the training of {spec.n_steps:,} steps"
            result = try_training(spec, workshop.build_rules(name, stopped), progress.record)
            if result.val_loss is None:
                raise _explain_failure(name, result)
            trained.append((spec, result))
            storage.write_json(path, _list_trainings(trained))
            log.info(
                f"forecast: {spec.n_steps:,} steps reach validation loss {result.val_loss:.4f}, "
                f"{result.bits_per_byte:.4f} bits per byte"
            )
    return trained


def _list_trainings(trained: Trained) -> dict[str, Any]:
    return {"format": FORMAT, "trainings": [describe_result(*pair) for pair in trained]}


def _explain_failure(name: str, result: TrainingResult) -> PreflightError:
    if result.failure.startswith("out of memory"):
        advice = "lower --batch-size, or find the one that fits: --get-optimal-bs"
        return PreflightError(ExitCode.OUT_OF_MEMORY, f"{name}: {result.failure}", advice)
    advice = "lower --learning-rate, or find one: --find-lr"
    return PreflightError(ExitCode.DIVERGED, f"{name}: {result.failure}", advice)


def _build_report(workshop: Workshop, trained: Trained) -> dict[str, Any]:
    """The trainings and what follows from them, as plain JSON types."""
    setup = workshop.setup
    total, data = setup.plan.total_steps, setup.data
    losses = [result.val_loss for _, result in trained if result.val_loss is not None]
    loss = forecast_loss([spec.n_steps for spec, _ in trained], losses, total)
    bits = loss.scale(data.val.n_tokens / data.val.n_bytes / math.log(2))
    seconds = _estimate_seconds(workshop, *trained[-1])
    price = setup.given.check.price_per_hour
    return _list_trainings(trained) | {
        "run": _describe_run(setup),
        "total_steps": total,
        "val_loss": dataclasses.asdict(loss),
        "bits_per_byte": dataclasses.asdict(bits),
        "seconds": seconds,
        "cost": None if price is None or seconds is None else price * seconds / 3600,
        "reached": None,
    }


def _describe_run(setup: RunSetup) -> Any:
    """What decides the run's result, as it is read back from JSON."""
    plan = setup.plan
    total = plan.total_steps
    spec = TrainingSpec(
        setup.config, setup.model_config, setup.data, total, total, plan.eval_windows
    )
    return json.loads(json.dumps(describe_training(spec)))


def _estimate_seconds(
    workshop: Workshop, spec: TrainingSpec, result: TrainingResult
) -> float | None:
    """Of the whole run; ``None`` where it would be compiled and the training was not."""
    setup = workshop.setup
    if spec.runtime.compile_model != setup.runtime.compile_model:
        return None
    cost = RunCost(
        step_seconds=result.training_seconds / result.n_steps,
        window_seconds=result.eval_seconds / result.eval_windows,
        sample_seconds=0.0,
        checkpoint_seconds=0.0,
        start_seconds=0.0,
        basis=f"a training of {result.n_steps:,} steps",
    )
    return estimate_run_time(cost, setup.plan, setup.config.control).total_seconds


def _describe(content: dict[str, Any], workshop: Workshop, config: RunConfig) -> list[str]:
    """The forecast for a person; the command to continue with comes last."""
    bits, loss = (Prediction(**content[name]) for name in ("bits_per_byte", "val_loss"))
    lines = [f"  {'steps':>9} {'val loss':>9} {'bits/byte':>9}"]
    for saved in content["trainings"]:
        lines.append(
            f"  {saved['n_steps']:>9,} {saved['val_loss']:>9.4f} {saved['bits_per_byte']:>9.4f}"
        )
    lines.append(f"  {content['total_steps']:>9,} {loss.loss:>9.4f} {bits.loss:>9.4f}  forecast")
    lines += ["", f"the run will reach {_spell(bits)}"]
    if content["seconds"] is not None:
        cost = "" if content["cost"] is None else f", at a cost of {content['cost']:.2f}"
        lines.append(f"it takes about {format_seconds(content['seconds'])}{cost}")
    plan = workshop.setup.plan
    reads = plan.text_reads
    if reads > _MANY_EPOCHS:
        lines.append(
            f"it reads its text {reads:.0f} times: repeated text teaches less, it may end higher"
        )
    return [*lines, "", "continue with:", f"  {format_train_command(config)}"]


def _spell(bits: Prediction) -> str:
    return f"{bits.loss:.3f} bits per byte (90 % interval {bits.low:.3f} to {bits.high:.3f})"


def read_forecast(setup: RunSetup) -> dict[str, Any] | None:
    """The run's forecast; ``None`` where there is none, or only one of other settings."""
    content = read_report(setup.output_dir / REPORT_NAME)
    if content.get("format") != FORMAT or content.get("run") != _describe_run(setup):
        return None
    return content


def compare_with_forecast(setup: RunSetup) -> str | None:
    """What a finished run reached beside its forecast, which is kept in the report too.

    ``None`` where there is no forecast of the run.
    """
    content = read_forecast(setup)
    if content is None:
        return None
    total = setup.plan.total_steps
    rows = read_metrics(setup.output_dir / METRICS_NAME)
    reached = [
        row["bits_per_byte"] for row in rows if (row["event"], row["step"]) == ("eval", total)
    ]
    if not reached:
        return None
    bits = Prediction(**content["bits_per_byte"])
    path = setup.output_dir / REPORT_NAME
    storage.write_json(path, content | {"reached": reached[-1]})
    inside = "inside" if bits.low <= reached[-1] <= bits.high else "outside"
    return (
        f"forecast: {_spell(bits)}; reached: {reached[-1]:.3f}, {inside} the interval, "
        f"{abs(reached[-1] / bits.loss - 1):.1%} {'above' if reached[-1] > bits.loss else 'below'}"
    )
