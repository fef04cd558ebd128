"""`--report`: one page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.page_parts import build_mark
from preflight.core.storage import foreign_error, open_regular, publish_file, refuse_other_kind
from preflight.modes.run_facts import RunFacts, read_run
from preflight.modes.run_page import MARK, render_page
from preflight.settings import RunConfig

PAGE_NAME = "report.html"
MAX_RUNS = 12


def run(config: RunConfig) -> int:
    """Read the runs, write the page, and return 0.

    Raises:
        PreflightError: code FLAGS, for too many runs; CHECKPOINT, when a folder holds no run;
            STORAGE, when the page cannot be written. After the page: CHECKPOINT or DATA, when a
            file of a run is damaged, which the page says too.
    """
    names = config.report.runs or config.comparison.compare or (config.control.output_dir,)
    folders = list(dict.fromkeys(Path(name) for name in names))
    if len(folders) > MAX_RUNS:
        raise PreflightError(
            ExitCode.FLAGS, f"--runs takes at most {MAX_RUNS} runs, got {len(folders)}"
        )
    path = Path(config.report.report_file or folders[0] / PAGE_NAME)
    data_dir = Path(config.data.data_dir) if "data_dir" in config.sources else None
    runs = [
        read_run(folder, name, data_dir)
        for folder, name in zip(folders, name_runs(folders), strict=True)
    ]
    write_page(path, render_page(runs))
    log.info(f"report: {path}")
    damaged = [error for run in runs for error in run.damaged]
    if damaged:
        raise _explain_damage(path, damaged)
    for fact in (fact for run in runs for fact in run.missing):
        log.info(fact)
    return ExitCode.DONE


def name_runs(folders: list[Path]) -> list[str]:
    """The last part of each path, or the whole path where two end alike."""
    short = [folder.resolve().name or str(folder) for folder in folders]
    return [
        name if short.count(name) == 1 else str(folder)
        for name, folder in zip(short, folders, strict=True)
    ]


def write_page(path: Path, page: str) -> None:
    """Publish the page.

    Raises:
        PreflightError: code STORAGE, also when it would replace a file that is not such a page.
    """
    mark, content = build_mark(MARK), page.encode("utf-8")
    if refuse_other_kind(path):
        with open_regular(path) as file:
            if file.read(len(mark)) != mark:
                raise foreign_error(path, "is another program's file")
    with publish_file(path, len(content)) as file:
        file.write(content)


def _explain_damage(path: Path, damaged: list[PreflightError]) -> PreflightError:
    first, more = damaged[0], len(damaged) - 1
    told = [first.lines[0]] + ([f"{more} more damaged files are named in the report"] * bool(more))
    return PreflightError(first.code, *told, f"the report is written without them: {path}")


__all__ = ["MAX_RUNS", "PAGE_NAME", "RunFacts", "name_runs", "run", "write_page"]
