"""`--evaluate`: figures of checkpoints on text and tasks, each with its 95 % interval.

Only the result goes to stdout. What is scored is kept in a journal beside the result, so that the
same command goes on after an interruption.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from generate import load_model
from preflight.checkpoints.adapters import identify_weights
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.device.runtime import Runtime, build_exact_runtime, is_out_of_memory
from preflight.evaluation.hub_tasks import read_hub_task
from preflight.evaluation.items import Task
from preflight.evaluation.own_tasks import load_own_tasks
from preflight.evaluation.results import (
    FORMAT,
    VERSION,
    TaskResult,
    format_table,
)
from preflight.evaluation.tasks import find_task_files, read_tasks
from preflight.modes.evaluator import Evaluator, name_checkpoint
from preflight.modes.quantizing import check_quantize, quantize_loaded
from preflight.settings import RunConfig
from preflight.tokenization import Tokenizer

FOLDER_NAME = "evaluation"


def run(config: RunConfig) -> int:
    """Evaluate what was asked for and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way; what was scored is kept.
    """
    settings = config.evaluation
    check_quantize(config)
    # All inputs are read before a model is loaded, so that a fault in them is told at once.
    hub = [name for name in settings.tasks if name.startswith("hf:")]
    files = [name for name in settings.tasks if name not in hub]
    tasks = read_tasks(find_task_files(files, settings.tasks_dir))
    tasks += [read_hub_task(name) for name in hub]
    if not settings.tasks and not settings.tasks_dir:
        tasks = [(task, "items of our own writing") for task in load_own_tasks()]
    checkpoints = find_checkpoints(config)
    runtime = build_exact_runtime(config.system)
    for task, form in tasks:
        log.info(f"{task.name} ({task.source}): {form}, {len(task.items):,} items")
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
        if check_quantize(config):
            model = quantize_loaded(model, tokenizer, config, runtime)
        if config.generation.replace_unknown:
            tokenizer = tokenizer.replacing_unknown()
        evaluator = Evaluator(checkpoint, model, tokenizer, runtime, folder, config, stop)
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


# ---- results ------------------------------------------------------------------------------------


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
        "weights_sha256": identify_weights(checkpoint),
        "model": checkpoint.model_config.label,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "level": config.evaluation.evaluate or "standard",
        "dtype": config.handover.quantize or str(runtime.dtype).removeprefix("torch."),
        "device": runtime.device.type,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tasks": [result.to_dict() for result in results],
    }


def _write(
    folder: Path, checkpoint: Checkpoint, content: dict[str, Any], results: list[TaskResult]
) -> None:
    """Write ``<name>-<time>.json`` and ``.txt``, under a name that is free."""
    stem = f"{name_checkpoint(checkpoint)}-{time.strftime('%Y%m%d-%H%M%S')}"
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
