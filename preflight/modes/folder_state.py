"""What a folder holds of data and runs, read in a moment: nothing is verified, no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preflight.core.page_parts import format_large, replace_unprintable
from preflight.core.storage import open_regular
from preflight.core.strict_json import parse_json

# As in preflight.checkpoints, which imports torch.
MILESTONES_NAME, MANIFEST_NAME = "milestones", "manifest.json"
_METRICS_NAME, _PLAN_NAME, _METADATA_NAME = "metrics.jsonl", "run_plan.json", "metadata.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{1,15})")
_TAIL_BYTES = 2**20  # of a log: some thousand rows
_MAX_JSON_BYTES = 2**22
_MAX_FOLDERS = 500  # that are looked into
_TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class CheckpointState:
    """A checkpoint by its manifest. The loss is in nats per token, ``None`` if there is none."""

    path: Path
    step: int
    val_loss: float | None = None


@dataclass(frozen=True)
class RunState:
    """A run by its log and its checkpoints, newest first."""

    folder: Path
    step: int
    bits_per_byte: float | None = None
    total_steps: int | None = None
    command: tuple[str, ...] = ()
    checkpoints: list[CheckpointState] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done, as far as is known."""
        return self.total_steps is None or self.step >= self.total_steps

    @property
    def best(self) -> CheckpointState | None:
        """The checkpoint with the lowest validation loss; without any loss the newest."""
        known = [c for c in self.checkpoints if c.val_loss is not None]
        if known:
            return min(known, key=lambda c: (c.val_loss, -c.step))
        return self.checkpoints[0] if self.checkpoints else None

    def describe(self) -> str:
        """One line: step and quality."""
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        text = f"run {show(self.folder)}: step {self.step:,}{of}"
        if self.bits_per_byte is not None:
            return f"{text}, {self.bits_per_byte:.2f} bits per byte"
        if self.best is not None and self.best.val_loss is not None:
            return f"{text}, validation loss {self.best.val_loss:.2f}"
        return text


@dataclass(frozen=True)
class FolderState:
    """Data, runs and texts of a folder."""

    data: str = ""  # a sentence; empty without a data folder
    runs: list[RunState] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)

    def describe(self) -> list[str]:
        """What is here, in lines."""
        lines = [self.data] if self.data else []
        lines += [run.describe() for run in self.runs]
        if not lines and self.texts:
            lines = [f"texts: {', '.join(show(path) for path in self.texts[:5])}"]
        return lines or ["nothing yet: neither data nor a run"]


def read_state(root: Path, data_dir: str = "data") -> FolderState:
    """What is in `root`; whatever cannot be read counts as not there."""
    texts = [
        path for path in _list_folder(root) if path.suffix in _TEXT_SUFFIXES and path.is_file()
    ]
    return FolderState(_describe_data(root / data_dir), find_runs(root), texts[:20])


def find_runs(root: Path) -> list[RunState]:
    """The runs in `root` itself, its folders and their folders, most recently changed first."""
    found = [(when, run) for folder in _walk(root) for when, run in _read_run(folder, root)]
    return [run for _, run in sorted(found, key=lambda pair: (-pair[0], pair[1].folder))]


def _walk(root: Path) -> Iterator[Path]:
    yield root
    first = [path for path in _list_folder(root) if path.is_dir()][:_MAX_FOLDERS]
    yield from first
    left = _MAX_FOLDERS - len(first)
    for folder in first:
        if os.path.lexists(folder / _METRICS_NAME) or os.path.lexists(folder / MILESTONES_NAME):
            continue  # a run, which holds no others
        inner = [path for path in _list_folder(folder) if path.is_dir()][: max(left, 0)]
        left -= len(inner)
        yield from inner


def _list_folder(folder: Path) -> list[Path]:
    """What is in it but hidden files and links, by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [folder / name for name in names if not name.startswith(".")]
    return [path for path in paths if not path.is_symlink()]


def _read_run(folder: Path, root: Path) -> Iterator[tuple[float, RunState]]:
    """The run in a folder, and when it was last changed; nothing where there is none."""
    rows, changed = _read_tail(folder / _METRICS_NAME)
    checkpoints = list_checkpoints(folder)
    if not rows and not checkpoints:
        return
    steps = [row["step"] for row in rows] + [checkpoint.step for checkpoint in checkpoints]
    bits = [row.get("bits_per_byte") for row in rows if row.get("event") == "eval"]
    plan = _read_object(folder / _PLAN_NAME)
    total = plan["plan"].get("total_steps") if isinstance(plan.get("plan"), dict) else None
    yield (
        changed,
        RunState(
            folder.relative_to(root) if folder != root else Path("."),
            max(steps),
            _get_number(bits[-1]) if bits else None,
            total if type(total) is int else None,
            _read_command(plan),
            checkpoints,
        ),
    )


def list_checkpoints(folder: Path) -> list[CheckpointState]:
    """The checkpoints that have a manifest, newest first."""
    found = []
    for path in _list_folder(folder / MILESTONES_NAME):
        match = _CHECKPOINT_NAME.fullmatch(path.name)
        manifest = _read_object(path / MANIFEST_NAME) if match else {}
        if match and manifest:
            losses = manifest.get("losses")
            loss = losses.get("val_loss") if isinstance(losses, dict) else None
            found.append(CheckpointState(path, int(match[1]), _get_number(loss)))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def _read_tail(path: Path) -> tuple[list[dict[str, Any]], float]:
    """The last rows of a log, and when it was last written."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            raw = file.read(_TAIL_BYTES)
            changed = os.fstat(file.fileno()).st_mtime
    except OSError:
        return [], 0.0
    rows = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows, changed


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one for anything else."""
    with contextlib.suppress(OSError, ValueError):
        with open_regular(path) as file:
            content = parse_json(file.read(_MAX_JSON_BYTES))
        if isinstance(content, dict):
            return content
    return {}


def _get_number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def _read_command(plan: dict[str, Any]) -> tuple[str, ...]:
    """The flags of the run's newest command; none where it is not a training."""
    commands = plan.get("commands")
    if not isinstance(commands, list) or not commands or not isinstance(commands[-1], str):
        return ()
    try:
        words = shlex.split(commands[-1])
    except ValueError:
        return ()
    return tuple(words[words.index("--train") :]) if "--train" in words else ()


def _describe_data(folder: Path) -> str:
    content = _read_object(folder / _METADATA_NAME)
    parts = [content.get(name) for name in ("train", "val")]
    found = [part.get("n_tokens") for part in parts if isinstance(part, dict)]
    counts = [count for count in found if type(count) is int]
    if len(counts) < len(parts):
        return ""
    sources = content.get("sources")
    rows = sources if isinstance(sources, list) else []
    names = [str(row.get("name")) for row in rows if isinstance(row, dict)]
    of = f" of {', '.join(show(name) for name in names[:3])}" if names else ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"data: {format_large(sum(counts))} tokens{of}{more}"


def show(path: object) -> str:
    """A name in one line that no terminal acts on."""
    text = replace_unprintable(str(path))
    return text if len(text) <= 60 else f"...{text[-57:]}"
