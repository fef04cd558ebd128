"""`--prepare`: the data folder alone, and what is in it."""

from __future__ import annotations

import json
import sys

from preflight.core.errors import ExitCode
from preflight.core.signals import StopFlag
from preflight.corpus.data_report import describe, read_report
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig


def run(config: RunConfig) -> int:
    """Prepare the data, print what is in it, and return 0.

    Raises:
        PreflightError: with the code of whatever keeps it from being prepared.
    """
    with StopFlag() as stop:
        setup = RunSetup(config, stop, continues=False, trains=False)
        report = read_report(setup.data.path)
    text = json.dumps(report, indent=2) if config.check.json else "\n".join(describe(report))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return ExitCode.DONE
