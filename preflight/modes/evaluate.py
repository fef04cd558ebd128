"""`--evaluate`: figures of checkpoints on text and tasks, each with its 95 % interval.

Only the result goes to stdout. What is scored is kept in a journal beside the result, so that the
same command goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from generate import load_model
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.checkpoints.manifest import WEIGHTS_NAME
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shards import load_data_folder
from preflight.device.runtime import Runtime, build_runtime, is_out_of_memory
from preflight.evaluation.encoding import Row, encode_task
from preflight.evaluation.items import Task
from preflight.evaluation.journal import Journal, build_key
from preflight.evaluation.results import (
    FORMAT,
    VERSION,
    TaskResult,
    build_figures,
    build_text_figures,
    format_table,
    list_scores,
)
from preflight.evaluation.scoring import (
    BranchScore,
    RowScorer,
    choose_batch_tokens,
    collect_items,
    score_rows,
)
from preflight.evaluation.tasks import find_task_files, read_tasks
from preflight.evaluation.validation import TextWindow, join_windows, read_texts, read_validation
from preflight.models.base import TokenModel
from preflight.settings import RunConfig
from preflight.tokenization import Tokenizer

FOLDER_NAME = "evaluation"
_STOPPED = "stopped: what was scored is kept; run the same command again to continue"


def run(config: RunConfig) -> int:
    """Evaluate what was asked for and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way; what was scored is kept.
    """
    settings = config.evaluation
    # All inputs are read before a model is loaded, so that a fault in them is told at once.
    tasks = read_tasks(find_task_files(settings.tasks, settings.tasks_dir))
    checkpoints = find_checkpoints(config)
    runtime = _build_runtime(config)
    for task, form in tasks:
        log.info(f"{task.source}: {form}, {len(task.items):,} items")
    with StopFlag() as stop:
        for checkpoint in checkpoints:
            evaluation = _evaluate(checkpoint, config, runtime, tasks, stop)
            _show(evaluation, as_json=config.check.json)
    return int(ExitCode.DONE)


def find_checkpoints(config: RunConfig) -> list[Checkpoint]:
    """The checkpoints to evaluate, each once, verified.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    named = config.evaluation.checkpoints or (config.generation.checkpoint_path,)
    found = [open_checkpoint(p) if p else find_best(Path(config.control.output_dir)) for p in named]
    return list({checkpoint.path.resolve(): checkpoint for checkpoint in found}.values())


def _build_runtime(config: RunConfig) -> Runtime:
    """Device and precision: fp32 unless a flag says otherwise, since figures are compared."""
    system = config.system
    if system.mixed_precision is None:
        system = dataclasses.replace(system, mixed_precision=False)
    runtime = build_runtime(system)
    if runtime.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # TF32 rounds nearly as coarsely as bf16
    return runtime


def _evaluate(
    checkpoint: Checkpoint,
    config: RunConfig,
    runtime: Runtime,
    tasks: Sequence[tuple[Task, str]],
    stop: StopFlag,
) -> dict[str, Any]:
    """Evaluate one checkpoint and write its result files; the content of the first."""
    folder = _find_folder(checkpoint, config)
    storage.make_folder(folder)
    with FolderLock(folder):
        storage.check_writable(folder)
        storage.remove_leftovers(
            folder, r"[\w.-]+\.(?:json|txt)"
        )  # of an evaluation that was killed
        model, tokenizer = load_model(checkpoint, runtime.device, runtime.dtype)
        log.info(f"{checkpoint.path}: step {checkpoint.step:,}, {model.config.label}")
        if config.generation.replace_unknown:
            tokenizer = tokenizer.replacing_unknown()
        evaluator = _Evaluator(checkpoint, model, tokenizer, runtime, folder, config, stop)
        try:
            results = evaluator.evaluate(tasks)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PreflightError(
                ExitCode.OUT_OF_MEMORY,
                "out of memory on this device",
                f"give --evaluation-batch-tokens less than {evaluator.batch_tokens:,}",
            ) from None
        content = _describe(checkpoint, config, runtime, tokenizer, results)
        _write(folder, checkpoint, content, results)
        evaluator.remove_journals()
    return content


def _find_folder(checkpoint: Checkpoint, config: RunConfig) -> Path:
    """Where results go: the folder of the checkpoint's run, else the output folder."""
    parent = checkpoint.path.absolute().parent
    in_run = parent.name == MILESTONES_NAME
    return (parent.parent if in_run else Path(config.control.output_dir)) / FOLDER_NAME


class _Evaluator:
    """Scores text and tasks with one model, and keeps a journal of each.

    Attributes:
        batch_tokens: that go through the model at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: TokenModel,
        tokenizer: Tokenizer,
        runtime: Runtime,
        folder: Path,
        config: RunConfig,
        stop: StopFlag,
    ) -> None:
        self.checkpoint, self.model, self.tokenizer = checkpoint, model, tokenizer
        self.folder, self.config, self.stop = folder, config, stop
        self.batch_tokens = config.evaluation.evaluation_batch_tokens or choose_batch_tokens(
            model.config, runtime.device, runtime.dtype
        )
        self._context = model.config.context_length
        self._facts = {
            "weights": checkpoint.manifest.files[WEIGHTS_NAME].sha256,
            "dtype": str(runtime.dtype),
            "device": runtime.device.type,
            "torch": torch.__version__,
        }
        self._journals: list[Journal] = []

    def evaluate(self, tasks: Sequence[tuple[Task, str]]) -> list[TaskResult]:
        """The results of the text, then of the tasks in their order."""
        limits = self.config.evaluation.limits
        source, windows, available = self._read_text(limits["text"])
        prepared = []
        for task, form in tasks:
            items = task.items[: limits[task.kind]]
            encoded = encode_task(task, items, self.tokenizer, self._context)
            prepared.append((task, form, items, encoded))
        total = sum(w.row.n_tokens for w in windows)
        total += sum(row.n_tokens for *_, encoded in prepared for row in encoded.rows)
        results = []
        with tqdm(
            total=total,
            desc=self.checkpoint.path.name,
            unit="token",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not is_progress_shown(),
        ) as bar:
            if windows:
                _, scores = self._score("text", [w.row for w in windows], bar, wants_ranks=True)
                results.append(_build_text_result(source, windows, available, scores))
            for task, form, items, encoded in prepared:
                scorer, scores = self._score(task.name, encoded.rows, bar)
                found = collect_items(scorer.rows, scores, len(items))
                results.append(
                    TaskResult(
                        *(task.name, task.kind, task.source, form),
                        build_figures(task.kind, items, found),
                        len(items),
                        len(task.items),
                        encoded.list_notes(),
                        list_scores(task, items, found),
                    )
                )
        return results

    def _read_text(self, n_windows: int | None) -> tuple[str, list[TextWindow], int]:
        """The validation text: its name, windows, and how many there are."""
        files = self.config.data.text_file
        if files:
            return ", ".join(files), *read_texts(files, self.tokenizer, self._context, n_windows)
        data_dir = Path(self.config.data.data_dir)
        if not os.path.lexists(data_dir / METADATA_NAME):
            log.info(f"no data folder {data_dir} and no --text-file: no validation text is scored")
            return "", [], 0
        data = load_data_folder(data_dir, self.tokenizer)
        found = read_validation(data, self.tokenizer, self._context, n_windows)
        return f"validation part of {data_dir}", *found

    def _score(
        self, name: str, rows: Sequence[Row], bar: tqdm, *, wants_ranks: bool = False
    ) -> tuple[RowScorer, dict[int, list[BranchScore]]]:
        """The scorer of rows, and their scores, those that the journal has first."""
        key = build_key(rows, self._facts)
        safe = re.sub(r"[^\w.-]+", "_", name)[:80]
        path = self.folder / f"{_name(self.checkpoint)}-{safe}-{key[:8]}.journal"
        journal = Journal(path, key, self.batch_tokens)
        self._journals.append(journal)
        scorer = RowScorer(self.model, rows, journal.batch_tokens, wants_ranks=wants_ranks)
        if journal.done:
            log.info(
                f"{name}: {len(journal.done):,} of {len(scorer.rows):,} parts were scored before"
            )
            bar.update(sum(scorer.rows[i].n_tokens for i in journal.done))

        def keep(batch: Any, scores: list[list[BranchScore]]) -> None:
            journal.add(batch, scores)
            bar.update(sum(scorer.rows[i].n_tokens for i in batch.rows))
            self.stop.leave_if_stopping(_STOPPED)

        try:
            return scorer, score_rows(scorer, keep, journal.done)
        finally:
            journal.close()

    def remove_journals(self) -> None:
        """Delete them, once the result is written."""
        for journal in self._journals:
            journal.remove()


def _build_text_result(
    source: str, windows: list[TextWindow], available: int, scores: dict[int, list[BranchScore]]
) -> TaskResult:
    found = join_windows(windows, scores)
    rows = [dataclasses.asdict(window) for window in found]
    figures = build_text_figures(found)
    return TaskResult(
        "text", "text", source, "plain text", figures, len(windows), available, scores=rows
    )


# ---- results ------------------------------------------------------------------------------------


def _name(checkpoint: Checkpoint) -> str:
    return re.sub(r"[^\w.-]+", "_", checkpoint.path.absolute().name)[:80]


def _describe(
    checkpoint: Checkpoint,
    config: RunConfig,
    runtime: Runtime,
    tokenizer: Tokenizer,
    results: list[TaskResult],
) -> dict[str, Any]:
    """The result file's content."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "weights_sha256": checkpoint.manifest.files[WEIGHTS_NAME].sha256,
        "model": checkpoint.model_config.label,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "level": config.evaluation.evaluate or "standard",
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": runtime.device.type,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tasks": [result.to_dict() for result in results],
    }


def _write(
    folder: Path, checkpoint: Checkpoint, content: dict[str, Any], results: list[TaskResult]
) -> None:
    """Write ``<name>-<time>.json`` and ``.txt``, under a name that is free."""
    stem = f"{_name(checkpoint)}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = {Path(name).stem for name in os.listdir(folder)}
    free = next(s for s in (stem, *(f"{stem}-{n}" for n in range(2, 10_000))) if s not in taken)
    storage.write_json(folder / f"{free}.json", content)
    lines = [*_describe_shortly(content), "", *format_table(results)]
    with storage.publish_file(folder / f"{free}.txt") as file:
        file.write(("\n".join(lines) + "\n").encode())
    log.info(f"result in {folder / free}.json and .txt")


def _describe_shortly(content: dict[str, Any]) -> list[str]:
    return [
        f"{content['checkpoint']}: step {content['step']:,}, {content['model']}",
        f"level {content['level']}, {content['dtype']} on {content['device']}, tokenizer "
        f"{content['tokenizer']['name']}",
    ]


def _show(content: dict[str, Any], *, as_json: bool) -> None:
    """The table, or with --json one row: the content without the scores of single items."""
    if as_json:
        tasks = [{k: v for k, v in task.items() if k != "scores"} for task in content["tasks"]]
        print(json.dumps(content | {"tasks": tasks}), flush=True)
        return
    results = [TaskResult.from_dict(task) for task in content["tasks"]]
    print("\n".join([*_describe_shortly(content), "", *format_table(results)]), flush=True)
