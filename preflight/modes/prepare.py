"""`--prepare`: the data folder alone, and what is in it."""

from __future__ import annotations

import json
import sys

from preflight.core.errors import ExitCode
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.corpus.data_report import PAGE_NAME, describe, draw_pictures, read_report
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig

_SHOWN_CHARACTERS = 100  # of an example of `--show-dropped`


def run(config: RunConfig) -> int:
    """Prepare the data, print what is in it, and return 0.

    Raises:
        PreflightError: with the code of whatever keeps it from being prepared.
    """
    with StopFlag() as stop:
        data = RunSetup(config, stop, continues=False).data
    report = read_report(data.path)
    if report is None:
        log.info(f"{data.path} was made by an older version, which wrote no report")
        return ExitCode.DONE
    pictures = draw_pictures(data.path, report)
    lines = [*describe(report), *_list_dropped(report, config.data.show_dropped)]
    lines.append(f"report: {data.path / PAGE_NAME}; pictures: {pictures[0]}, {pictures[1]}")
    text = json.dumps(report, indent=2) if config.check.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return ExitCode.DONE


def _list_dropped(report: dict[str, object], n_examples: int) -> list[str]:
    """Examples of what each rule dropped."""
    lines = []
    dropped = report["dropped"]
    assert isinstance(dropped, list)
    for entry in dropped if n_examples else ():
        lines.append(f"dropped by {entry['reason']}:")
        for example in entry["examples"][:n_examples]:
            text = " ".join(example["text"].split())[:_SHOWN_CHARACTERS]
            lines.append(f"  {example['source']}, row {example['row'] + 1:,}: {text}")
    return lines
