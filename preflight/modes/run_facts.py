"""What the folder of a run holds, read for its report. What is damaged is named, not fatal."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.store import scan_checkpoints
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import open_regular
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json
from preflight.corpus.data_report import read_report
from preflight.corpus.metadata import METADATA_NAME, read_metadata
from preflight.corpus.shards import compute_fingerprint
from preflight.modes import check, forecast
from preflight.modes.run_plan import PLAN_NAME
from preflight.training.metrics import METRICS_NAME, read_metrics

EVALUATION_NAME = "evaluation"  # the folder of the files that `--evaluate` writes
STEP_FIGURES = (
    *("step", "tokens", "loss", "bits_per_byte", "learning_rate", "grad_norm"),
    *("tokens_per_second", "peak_memory_bytes"),
)
_EVALUATION_FIGURES = ("step", "val_loss", "perplexity", "bits_per_byte")
_MAX_EVALUATION_FILES = 50  # the newest
_BLOCK_BYTES = 2**20
Columns = dict[str, "array[float]"]


@dataclass
class RunFacts:
    """A run, as its folder tells it.

    Attributes:
        steps, evaluations: a column for each figure, NaN where a row has none.
        samples: step and text, in the order of the run.
        resumed_at: steps that the run was resumed at.
        n_skipped: updates that were not finite.
        plan, check, forecast: what was saved before and at the start; empty where nothing was.
        scores: the name and the content of each file of `--evaluate`, oldest first.
        data: the data folder's report; ``None`` without one, or of other data than the run's.
        missing: what is not there, in sentences.
        damaged: the error for each file that is there and cannot be used.
    """

    folder: Path
    name: str
    steps: Columns = field(default_factory=lambda: _build_columns(STEP_FIGURES))
    evaluations: Columns = field(default_factory=lambda: _build_columns(_EVALUATION_FIGURES))
    samples: list[tuple[int, str]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    n_skipped: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    scores: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
    damaged: list[PreflightError] = field(default_factory=list)

    @contextlib.contextmanager
    def keep_damage(self) -> Iterator[None]:
        """Add the error of what is read within to `damaged`."""
        try:
            yield
        except PreflightError as error:
            self.damaged.append(error)

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the newest checkpoint that has one; empty without."""
        for checkpoint in self.checkpoints:
            with contextlib.suppress(PreflightError):
                return checkpoint.config
        return {}


def _build_columns(names: tuple[str, ...]) -> Columns:
    return {name: array("d") for name in names}


def read_run(folder: Path, name: str, data_dir: Path | None = None) -> RunFacts:
    """Everything that a run's folder holds.

    Args:
        folder: the run's `--output-dir`.
        name: what the page calls it.
        data_dir: of its data report; ``None``: the one that the run's plan names.

    Raises:
        PreflightError: code CHECKPOINT, when there is neither a log nor a checkpoint.
    """
    has_log = os.path.lexists(folder / METRICS_NAME)
    facts = RunFacts(folder, name)
    with facts.keep_damage():
        facts.checkpoints, damaged = scan_checkpoints(folder)
        facts.damaged += [
            PreflightError(ExitCode.CHECKPOINT, reason, "the other checkpoints are not affected")
            for reason in damaged.values()
        ]
    if not has_log and not facts.checkpoints and not facts.damaged:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{folder} holds no run: neither {METRICS_NAME} nor a checkpoint",
            f"train one: {format_command('--train', '--output-dir', folder)}, or name another "
            "folder: --output-dir, or --runs for several",
        )
    with facts.keep_damage():
        _read_log(facts, folder / METRICS_NAME)
    for key, file_name in (
        ("plan", PLAN_NAME),
        ("check", check.REPORT_NAME),
        ("forecast", forecast.REPORT_NAME),
    ):
        with facts.keep_damage():
            setattr(facts, key, _read_object(folder / file_name) or {})
    _read_scores(facts)
    _read_data(facts, data_dir)
    _list_missing(facts)
    return facts


def _read_log(facts: RunFacts, path: Path) -> None:
    """PreflightError (CHECKPOINT) after all rows, when some lines are none."""
    n_rows = 0
    try:
        for row in read_metrics(path):
            n_rows += 1
            _take_row(facts, row)
        n_lines = _count_lines(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _damage_error(path, error.strerror or str(error)) from None
    if n_lines > n_rows:
        raise _damage_error(path, f"{n_lines - n_rows:,} of {n_lines:,} lines are no rows")


def _take_row(facts: RunFacts, row: dict[str, Any]) -> None:
    event, step = row["event"], row["step"]
    if event == "step":
        _append(facts.steps, row)
        facts.n_skipped += row.get("skipped") is True
    elif event == "eval":
        _append(facts.evaluations, row)
    elif event == "sample" and isinstance(row.get("text"), str):
        facts.samples.append((step, row["text"]))
    elif event == "resume":
        facts.resumed_at.append(step)


def _append(columns: Columns, row: dict[str, Any]) -> None:
    for name, column in columns.items():
        number = get_number(row, name)
        column.append(float("nan") if number is None else number)


def _count_lines(path: Path) -> int:
    """Those that end: the last one may be torn by a kill, which is no damage."""
    with open_regular(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))


def get_number(content: Any, *keys: str) -> float | None:
    """The number at these keys of nested objects; ``None`` for anything else."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if isinstance(content, bool) or not isinstance(content, (int, float)):
        return None
    return float(content) if abs(content) < 1e300 else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; ``None`` where there is no file.

    Raises:
        PreflightError: code CHECKPOINT, when it is damaged.
    """
    try:
        with open_regular(path) as file:
            content = parse_json(file.read(MAX_JSON_BYTES + 1))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damage_error(path, getattr(error, "strerror", None) or str(error)) from None
    return content


def _damage_error(path: Path, reason: str) -> PreflightError:
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{path} is damaged: {reason}",
        "restore it from a copy, or delete it; the run's checkpoints are not affected",
    )


def _read_scores(facts: RunFacts) -> None:
    folder = facts.folder / EVALUATION_NAME
    try:
        paths = [folder / name for name in os.listdir(folder) if name.endswith(".json")]
        paths.sort(key=lambda path: (path.lstat().st_mtime, path.name))
    except OSError:
        return
    for path in paths[-_MAX_EVALUATION_FILES:]:
        with facts.keep_damage():
            content = _read_object(path)
            if content and isinstance(content.get("tasks"), list):
                facts.scores.append((path.stem, content))


def _read_data(facts: RunFacts, data_dir: Path | None) -> None:
    """The data folder's report, if the folder is still the one that the run was trained on."""
    described: tuple[Any, ...] = (facts.plan.get("data"), facts.config.get("data"), {})
    saved = next(data for data in described if isinstance(data, dict))
    folder = data_dir or Path(str(saved.get("folder", "data")).replace("\0", "") or "data")
    if not os.path.lexists(folder / METADATA_NAME):
        facts.missing.append(f"The data folder {folder} is not here (--data-dir names another).")
        return
    with facts.keep_damage():
        metadata = read_metadata(folder)
        if saved.get("fingerprint") not in (None, compute_fingerprint(metadata)):
            facts.missing.append(
                f"The data folder {folder} holds other data than this run was trained on."
            )
            return
        facts.data = read_report(folder)
        if facts.data is None:
            facts.missing.append(f"The data folder {folder} has no report.")


def _list_missing(facts: RunFacts) -> None:
    """One sentence for each part of the page that has nothing to show."""
    told = {
        f"There are no rows of steps in {METRICS_NAME}: no curves.": facts.steps["step"],
        "The run has not been evaluated on its validation part yet.": facts.evaluations["step"],
        f"There is no {PLAN_NAME}: an older version trained this run.": facts.plan,
        f"There is no {check.REPORT_NAME}: --check before --train adds predictions.": facts.check,
        "There are no checkpoints.": facts.checkpoints,
    }
    facts.missing += [sentence for sentence, part in told.items() if not part]
