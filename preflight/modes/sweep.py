"""`--sweep`: a short training with each value of a flag, a table, a picture, a report.

The report is the journal too: what an interrupted sweep has done is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from preflight.core import storage
from preflight.core.commands import join_words
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.foresight.short_training import (
    TrainingResult,
    TrainingSpec,
    try_training,
)
from preflight.foresight.sweep import (
    Values,
    build_combination,
    choose_steps,
    list_combinations,
    parse_sweep,
    spell_values,
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
from preflight.settings import RunConfig, build_options
from preflight.training.resume import resolve_model

REPORT_NAME, PICTURE_NAME = "sweep.json", "sweep.png"
FORMAT = "preflight-sweep"
_SHARE = 16  # of the run's steps: a sixteenth
# An evaluation takes at most a tenth of a training's time, but reads enough text to compare by.
_EVAL_SHARE, LEAST_EVAL_TOKENS = 0.1, 4096


@dataclasses.dataclass
class Row:
    """One training of a sweep; without a result as long as it has not run."""

    values: Values
    spec: TrainingSpec
    result: TrainingResult | None = None

    @property
    def name(self) -> str:
        """Its values as they are typed."""
        return join_words(*spell_values(self.values))

    def to_dict(self) -> dict[str, Any]:
        """The row in the report, from which it is found again."""
        assert self.result is not None
        return {
            "values": self.values,
            "flags": self.name,
            **describe_result(self.spec, self.result),
        }


def run(config: RunConfig) -> int:
    """Train with every combination, print the table, and return 0, or 1 when none succeeded.

    Raises:
        PreflightError: code FLAGS for a value that is none; code SIGINT or SIGTERM after a signal,
            with what is kept; otherwise the code of whatever keeps a training from running.
    """
    found = parse_sweep(config.trials.sweep)
    combinations = [
        (values, build_combination(config, values)) for values in list_combinations(found)
    ]
    both = [name for name in found if config.sources.get(name) == "the command line"]
    if both:
        flag = build_options()[both[0]].flag
        raise PreflightError(ExitCode.FLAGS, f"{flag} is given, and --sweep varies it: drop one")
    with open_workshop(config, REPORT_NAME, FORMAT) as workshop:
        storage.refuse_other_kind(workshop.output_dir / PICTURE_NAME)
        rows = [_build_row(workshop, values, combined) for values, combined in combinations]
        sweep = Sweep(workshop, config, rows)
        sweep.run()
        return sweep.conclude()


def _build_row(workshop: Workshop, values: Values, config: RunConfig) -> Row:
    """A training that reads as many tokens as the others."""
    setup = workshop.setup
    n_steps = config.trials.sweep_steps or max(1, setup.plan.total_steps // _SHARE)
    model_config = resolve_model(config, setup.tokenizer, None)
    spec = TrainingSpec(
        dataclasses.replace(config, training=config.resolve_training()),
        model_config,
        setup.data,
        n_steps,
        setup.plan.total_steps,
    )
    # A larger batch takes fewer steps, and evaluations read the same text.
    wanted = n_steps * setup.plan.tokens_per_step
    windows = max(1, _choose_eval_tokens(setup, wanted) // _choose_window(spec))
    n_steps = choose_steps(wanted, spec.plan.tokens_per_step)
    return Row(values, dataclasses.replace(spec, n_steps=n_steps, eval_windows=windows))


def _choose_window(spec: TrainingSpec) -> int:
    return spec.training.choose_window(spec.model_config.context_length)


def _choose_eval_tokens(setup: RunSetup, training_tokens: int) -> int:
    """Tokens that a training is evaluated on: at most as many as the run's evaluations read."""
    affordable = round(_EVAL_SHARE * 3 * training_tokens)  # a forward pass: a third of a step
    of_run = setup.plan.eval_windows * setup.window_length
    return min(of_run, max(LEAST_EVAL_TOKENS, affordable))


class Sweep:
    """The trainings of a sweep, those that are done first in its report."""

    def __init__(self, workshop: Workshop, config: RunConfig, rows: list[Row]) -> None:
        self.workshop, self.config, self.rows = workshop, config, rows
        self.path = workshop.output_dir / REPORT_NAME

    def run(self) -> None:
        """Run every training that no earlier call has run; each is kept at once."""
        self._restore()
        waiting = [row for row in self.rows if row.result is None]
        n_steps = sum(row.spec.n_steps for row in waiting)
        done = len(self.rows) - len(waiting)
        log.info(
            f"sweep: {len(self.rows):,} trainings of {self.rows[0].spec.n_steps:,} steps"
            + (f", {done:,} of them done before" if done else "")
        )
        stopped = "stopped: what is done is kept; run the same command again to continue"
        with Progress(n_steps, "sweep") as progress:
            for number, row in enumerate(waiting, done + 1):
                rules = self.workshop.build_rules(f"the training with {row.name}", stopped)
                row.result = try_training(row.spec, rules, progress.record)
                progress.skip(row.spec.n_steps - row.result.n_steps)
                self.write()
                log.info(f"sweep: {number:,}/{len(self.rows):,} {row.name}: {_judge(row.result)}")

    def _restore(self) -> None:
        """Take over rows of an earlier call whose training would be the same."""
        saved = read_report(self.path).get("rows", [])
        for row in self.rows:
            row.result = find_result(saved, row.spec)

    @property
    def best(self) -> Row | None:
        """The row with the fewest bits per byte."""
        reached = [row for row in self.rows if row.result and row.result.bits_per_byte is not None]
        return min(reached, key=_bits, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The report: every row that is done."""
        return {
            "format": FORMAT,
            "flags": self.best.name if self.best else None,
            "rows": [row.to_dict() for row in self.rows if row.result],
        }

    def write(self) -> None:
        """Keep the rows so far."""
        storage.write_json(self.path, self.to_dict())

    def conclude(self) -> int:
        """Draw and print what was found; the exit code."""
        self.write()
        _draw(self.workshop.output_dir / PICTURE_NAME, self.rows)
        lines = json.dumps(self.to_dict(), indent=2).splitlines()
        if not self.config.check.json:
            lines = [*_format_table(self.rows, self.best), "", *self._advise()]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        return ExitCode.DONE if self.best else ExitCode.CHECK_FAILED

    def _advise(self) -> list[str]:
        picture = f"picture: {self.workshop.output_dir / PICTURE_NAME}"
        if self.best is None:
            return ["no training reached its end", picture]
        command = format_train_command(self.config, *spell_values(self.best.values))
        return [picture, "continue with the best:", f"  {command}"]


def _bits(row: Row) -> float:
    assert row.result is not None
    assert row.result.bits_per_byte is not None
    return row.result.bits_per_byte


def _judge(result: TrainingResult) -> str:
    if result.bits_per_byte is None:
        return result.failure
    return f"validation loss {result.val_loss:.4f}, {result.bits_per_byte:.4f} bits per byte"


def _format_table(rows: list[Row], best: Row | None) -> list[str]:
    width = max(len(row.name) for row in rows)
    lines = [
        f"  {'flags':<{width}} {'steps':>7} {'val loss':>9} {'bits/byte':>9} {'seconds':>8} "
        f"{'tokens/s':>9}"
    ]
    for row in rows:
        result = row.result
        if result is None:
            continue
        mark = "*" if row is best else " "
        if result.bits_per_byte is None:
            lines.append(f"{mark} {row.name:<{width}} {result.n_steps:>7,} {result.failure}")
            continue
        seconds = result.training_seconds + result.eval_seconds
        lines.append(
            f"{mark} {row.name:<{width}} {result.n_steps:>7,} {result.val_loss:>9.4f} "
            f"{result.bits_per_byte:>9.4f} {seconds:>8.1f} {result.tokens_per_second:>9,.0f}"
        )
    return lines


def _draw(path: Path, rows: list[Row]) -> None:
    """Training losses over the tokens; of one flag with numbers, the result over its value too."""
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the mode
    from matplotlib.figure import Figure

    reached = [row for row in rows if row.result and row.result.bits_per_byte is not None]
    names = list(rows[0].values)
    values = [row.values[names[0]] for row in reached]
    is_line = len(names) == 1 and all(type(value) in (int, float) for value in values)
    figure = Figure(figsize=(11 if is_line else 8, 5), dpi=130, layout="constrained")
    left = figure.add_subplot(1, 1 + is_line, 1)
    for row in rows:
        losses = row.result.losses if row.result else ()
        tokens = row.result.n_tokens if row.result else 0
        places = [tokens * (i + 1) / len(losses) for i in range(len(losses))]
        if tokens:
            left.plot(places, losses, linewidth=1, label=row.name)
    left.set_xlabel("tokens")
    left.set_ylabel("training loss (nats per token)")
    left.grid(alpha=0.25)
    if left.lines:
        left.legend(frameon=False, fontsize=8)
    if is_line:
        right = figure.add_subplot(1, 2, 2)
        points = sorted((row.values[names[0]], _bits(row)) for row in reached)
        right.plot([x for x, _ in points], [y for _, y in points], "o-", color="#c8501e")
        if points and points[0][0] > 0 and points[-1][0] >= 4 * points[0][0]:
            right.set_xscale("log")
        right.set_xlabel(names[0])
        right.set_ylabel("validation, bits per byte")
        right.grid(alpha=0.25)
    with storage.publish_file(path) as file:
        figure.savefig(file, format="png")
