"""`--validate-only`: twelve numbered checks that try every part of a run once, on the real model.

Each check returns what it saw, or raises `Fault` with the fix. None stops the others, and what a
check writes is gone when it ends; only the data folder may be built.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from preflight.core.errors import ExitCode
from preflight.core.signals import StopFlag
from preflight.modes.report import describe_error
from preflight.modes.setup import RunSetup
from preflight.modes.validation_inputs import (
    check_configuration,
    check_folders,
    check_loader,
    check_shards,
    check_tokenizer,
)
from preflight.modes.validation_model import (
    check_backward,
    check_checkpoint,
    check_evaluation,
    check_forward,
    check_generation,
    check_mixed_precision,
    check_update,
)
from preflight.modes.validation_subject import Fault, Lacking, Subject
from preflight.settings import RunConfig

Status = Literal["passed", "failed", "not run"]

# Name, function, and the checks without which it cannot say anything.
CHECKS: tuple[tuple[str, Callable[[Subject], str], tuple[int, ...]], ...] = (
    ("configuration", check_configuration, ()),
    ("folders", check_folders, ()),
    ("tokenizer", check_tokenizer, ()),
    ("shards", check_shards, ()),
    ("loader", check_loader, (4,)),
    ("forward pass", check_forward, (1,)),
    ("backward pass", check_backward, (6,)),
    ("update", check_update, (7,)),
    ("checkpoint", check_checkpoint, (2, 6)),
    ("evaluation", check_evaluation, (4, 6)),
    ("generation", check_generation, (6,)),
    ("mixed precision", check_mixed_precision, (6,)),
)


@dataclass(frozen=True)
class Result:
    """One check's outcome. `seen` is what was found; `faults` pairs what is wrong with its fix."""

    number: int
    name: str
    status: Status
    seen: str
    faults: tuple[tuple[str, str], ...] = ()


def run(config: RunConfig) -> int:
    """Run all checks, print each, and return 0, or 1 when one did not pass."""
    # Compilation is left to the run unless it was asked for: it takes longer than all checks.
    system = dataclasses.replace(config.system, compile_model=bool(config.system.compile_model))
    results: list[Result] = []
    with StopFlag() as stop:
        subject = Subject(RunSetup(dataclasses.replace(config, system=system), stop))
        for number in range(1, len(CHECKS) + 1):
            result = run_check(number, subject, results)
            results.append(result)
            if not config.check.json:
                _print_result(result)
    failed = [result for result in results if result.status != "passed"]
    if config.check.json:
        sys.stdout.write(
            json.dumps(
                {
                    "ok": not failed,
                    "warnings": subject.warnings,
                    "checks": [dataclasses.asdict(result) for result in results],
                },
                indent=2,
            )
            + "\n"
        )
    else:
        for warning in subject.warnings:
            sys.stdout.write(f"warning: {warning}\n")
        sys.stdout.write(f"{len(results) - len(failed)} of {len(results)} checks passed\n")
    return int(ExitCode.CHECK_FAILED if failed else ExitCode.DONE)


def _print_result(result: Result) -> None:
    lines = [f"{result.number:>2} {result.status:<8} {result.name}: {result.seen}"]
    for what, fix in result.faults:
        lines += [f"     - {what}"] + [f"       {fix}"] * bool(fix)
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def run_check(number: int, subject: Subject, before: list[Result]) -> Result:
    """One check, whatever it raises; `before` are the results of those it may need."""
    name, function, needs = CHECKS[number - 1]
    try:
        for needed in needs:
            if before[needed - 1].status != "passed":
                raise Lacking(needed)
        return Result(number, name, "passed", function(subject))
    except Lacking as lacking:
        return Result(number, name, "not run", str(lacking))
    except Fault as fault:
        faults = fault.faults
    except Exception as error:  # a broken part must not hide what the other checks find
        faults = (describe_error(error),)
    count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    return Result(number, name, "failed", count, faults)
