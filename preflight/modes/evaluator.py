"""One checkpoint's evaluation: text, tasks, contamination and generated text, with a journal."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from preflight.checkpoints.adapters import identify_weights
from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import PreflightError
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.device.runtime import Runtime
from preflight.evaluation.contamination import find_contamination
from preflight.evaluation.encoding import Row, encode_task
from preflight.evaluation.generated_text import import_scorers
from preflight.evaluation.held_out import evaluate_generated, read_held_out
from preflight.evaluation.items import Task
from preflight.evaluation.journal import Journal, build_key
from preflight.evaluation.own_tasks import SOURCE as OWN_SOURCE
from preflight.evaluation.results import (
    TaskResult,
    build_figures,
    build_text_figures,
    list_scores,
)
from preflight.evaluation.scoring import (
    BranchScore,
    RowScorer,
    choose_batch_tokens,
    collect_items,
    score_rows,
)
from preflight.evaluation.validation import TextWindow, join_windows, read_texts, read_validation
from preflight.models.base import TokenModel
from preflight.settings import RunConfig
from preflight.tokenization import Tokenizer

_STOPPED = "stopped: what was scored is kept; run the same command again to continue"
# Of a training text that is looked through for items unasked: under a minute.
_SHORT_TOKENS = 100_000_000


class Evaluator:
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
            "weights": identify_weights(checkpoint),
            "dtype": config.handover.quantize or str(runtime.dtype),
            "device": runtime.device.type,
            "torch": torch.__version__,
        }
        self._journals: list[Journal] = []
        self._data = self._load_data()

    def evaluate(self, tasks: Sequence[tuple[Task, str]]) -> list[TaskResult]:
        """The results of the text, then of the tasks in their order."""
        limits = self.config.evaluation.limits
        source, windows, available = self._read_text(limits["text"])
        prepared = []
        for task, form in tasks:
            items = task.items[: limits[task.kind]]
            try:
                encoded = encode_task(task, items, self.tokenizer, self._context)
            except PreflightError as error:
                if task.source != OWN_SOURCE:  # nobody asked for the own sets
                    raise
                log.info(f"{task.name} is left out: {error.lines[0]}")
                continue
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
        shown = results[-len(prepared) :] if prepared else []
        self._mark_contaminated(shown, [replace(t, items=items) for t, _, items, _ in prepared])
        return results + self._evaluate_generated(limits["generated"])

    def _read_text(self, n_windows: int | None) -> tuple[str, list[TextWindow], int]:
        """The validation text: its name, windows, and how many there are."""
        files = self.config.data.text_file
        if files:
            return ", ".join(files), *read_texts(files, self.tokenizer, self._context, n_windows)
        if self._data is None:
            return "", [], 0
        found = read_validation(self._data, self.tokenizer, self._context, n_windows)
        return f"validation part of {self._data.path}", *found

    def _load_data(self) -> DataFolder | None:
        """The data folder; ``None`` where there is none, or files of text are given."""
        data_dir = Path(self.config.data.data_dir)
        is_there = os.path.lexists(data_dir / METADATA_NAME)
        if self.config.data.text_file:
            return None
        if not is_there:
            log.info(f"no data folder {data_dir} and no --text-file: no validation text is scored")
            return None
        return load_data_folder(data_dir, self.tokenizer)

    def _mark_contaminated(self, results: list[TaskResult], tasks: list[Task]) -> None:
        """Say how many of the items scored stand in the text that the run learned from."""
        asked, data = self.config.evaluation.contamination, self._data
        if asked == "no" or data is None or not tasks:
            return
        trained_on = (self.checkpoint.config.get("data") or {}).get("fingerprint")
        if trained_on not in (None, data.fingerprint):
            log.info(f"{data.path} is not what this run learned from: no contamination is told")
            return
        if asked == "auto" and data.train.n_tokens > _SHORT_TOKENS:
            log.info("the training text is long: --contamination yes looks for the items in it")
            return
        for result, found in zip(
            results, find_contamination(tasks, data, self.tokenizer), strict=True
        ):
            result.contaminated = found.share
            result.notes += [
                f"line {overlap.line} stands in document {overlap.document:,} of the training "
                f'text: "{overlap.words[:100]}"'
                for overlap in found.examples
            ]
            if found.n_too_short:
                result.notes.append(
                    f"{found.n_too_short} items are too short to be looked for in the training text"
                )

    def _evaluate_generated(self, n_texts: int | None) -> list[TaskResult]:
        """BLEU and ROUGE of continuations of validation text, where there is what it takes."""
        pairs = read_held_out(self._data, self.tokenizer, n_texts) if self._data else []
        if not pairs or self._data is None:
            return []
        try:
            import_scorers()
        except PreflightError as error:
            log.info(f"no BLEU and no ROUGE: {'; '.join(error.lines)}")
            return []
        source = f"validation part of {self._data.path}"
        return [evaluate_generated(self.model, self.tokenizer, pairs, source)]

    def _score(
        self, name: str, rows: Sequence[Row], bar: tqdm, *, wants_ranks: bool = False
    ) -> tuple[RowScorer, dict[int, list[BranchScore]]]:
        """The scorer of rows, and their scores, those that the journal has first."""
        key = build_key(rows, self._facts)
        safe = re.sub(r"[^\w.-]+", "_", name)[:80]
        path = self.folder / f"{name_checkpoint(self.checkpoint)}-{safe}-{key[:8]}.journal"
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


def name_checkpoint(checkpoint: Checkpoint) -> str:
    """A name for its files."""
    return re.sub(r"[^\w.-]+", "_", checkpoint.path.absolute().name)[:80]
