"""`--compare`: the same prompts and seeds for several checkpoints, side by side.

Where `--evaluate` has scored the same items with them, it says which one is better and by how
much. Only the comparison goes to stdout, or to `--output-file` as JSON lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from generate import stream_text
from preflight.checkpoints.adapters import identify_weights
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.storage import publish_file
from preflight.core.strict_json import read_json
from preflight.device.runtime import build_exact_runtime, is_out_of_memory
from preflight.device.token_store import measure_model_room
from preflight.evaluation.comparing import Column, compare_results, format_columns, make_printable
from preflight.modes.compare_models import (
    Entry,
    Models,
    find_best_entry,
    find_entries,
)
from preflight.modes.generate import check_output
from preflight.modes.prompts import is_interactive, read_prompts
from preflight.modes.session import Session
from preflight.settings import RunConfig
from preflight.settings.kinds import MODES
from preflight.training.metrics import METRICS_NAME

_DEFAULT_WIDTH = 80


@dataclass(frozen=True)
class Completion:
    """What one of them generates after a prompt; `seconds` do not count the loading."""

    entry: Entry
    text: str
    n_tokens: int
    seconds: float
    finish_reason: str

    @property
    def tokens_per_second(self) -> float:
        """Of this completion, prefill included."""
        return self.n_tokens / max(self.seconds, 1e-9)


Evaluate = Callable[[RunConfig, Sequence[Entry], str], None]


def run_evaluation(config: RunConfig, entries: Sequence[Entry], level: str) -> None:
    """`--evaluate` of these checkpoints, which writes its results into their runs' folders."""
    paths = tuple(str(entry.checkpoint.path) for entry in entries)
    settings = dataclasses.replace(config.evaluation, evaluate=level, checkpoints=paths)
    MODES.load("evaluate")(dataclasses.replace(config, evaluation=settings))


def run(config: RunConfig, evaluate: Evaluate = run_evaluation) -> int:
    """Compare what was asked for and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    check_output(config)
    entries = find_entries(config)
    _check_output_file(config, entries)
    prompts = read_prompts(config)
    interactive = is_interactive(config)
    runtime = build_exact_runtime(config.system)
    level = config.comparison.with_evaluation
    if level is not None:
        evaluate(config, entries, level)
    try:
        models = Models(entries, runtime, measure_model_room(runtime.device))
        comparison = Comparison(models, config)
        if interactive:
            _show_differences(entries)
            return comparison.run(prompts)
        comparison.compare_all(prompts)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(
            ExitCode.OUT_OF_MEMORY,
            "out of memory on this device",
            "compare fewer of them, or use --device cpu",
        ) from None
    _show_differences(entries)
    return int(ExitCode.DONE)


def _check_output_file(config: RunConfig, entries: Sequence[Entry]) -> None:
    """PreflightError (FLAGS) for another kind of file than JSON lines, or a run's own file."""
    name = config.generation.output_file
    if name is None:
        return
    if not name.lower().endswith(".jsonl"):
        raise PreflightError(
            ExitCode.FLAGS, f"--output-file {name}: --compare writes JSON lines: NAME.jsonl"
        )
    own = (entry.checkpoint.path.parent.parent / METRICS_NAME for entry in entries)
    if any(os.path.exists(p) and os.path.exists(name) and os.path.samefile(p, name) for p in own):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--output-file {name} is a run's record of its training",
            "nothing was changed; choose another name",
        )


# ---- completions --------------------------------------------------------------------------------


class Comparison(Session):
    """Compares prompt after prompt; on a terminal those that are typed, with `Session`'s commands.

    Attributes:
        records: of the output file, one for each completion.
    """

    def __init__(self, models: Models, config: RunConfig) -> None:
        super().__init__(cast(Any, None), cast(Any, None), config.sampling)
        self.models, self.records = models, list[dict[str, Any]]()
        self._settings = config.generation
        self._best = find_best_entry(models.entries)

    def compare_all(self, prompts: Sequence[str]) -> None:
        """Compare these prompts; what is finished is written even where a later one fails."""
        try:
            for prompt in prompts:
                for _ in range(self._settings.num_return_sequences):
                    self.compare(prompt)
        finally:
            if self._settings.output_file and self.records:
                content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records)
                path = Path(self._settings.output_file)
                with publish_file(path, len(data := content.encode())) as file:
                    file.write(data)
                log.info(f"{len(self.records):,} completions in {path}")

    def complete(self, prompt: str, *, echo: bool = True) -> None:
        """What `Session` calls for a prompt; Ctrl-C ends the comparison of this one."""
        try:
            self.compare(prompt)
        except KeyboardInterrupt:
            log.info("stopped")
        except PreflightError as error:
            if error.code != ExitCode.TEXT:  # a character that a tokenizer does not know
                raise
            log.info("\n".join(error.lines))

    def compare(self, prompt: str) -> None:
        """One prompt, the same random numbers for all of them."""
        index, self._n_completions = self._n_completions, self._n_completions + 1
        completions = [self._generate(entry, prompt, index) for entry in self.models.entries]
        if not self._settings.output_file:
            _show_completions(prompt, completions, self._best)
        self.records += [_describe(prompt, index, c) for c in completions]

    def _generate(self, entry: Entry, prompt: str, index: int) -> Completion:
        model, tokenizer = self.models.open(entry)
        if self._settings.replace_unknown:
            tokenizer = tokenizer.replacing_unknown()
        steps, reasons = list[int](), list[str]()

        def note(ended: Any, n_tokens: int) -> None:
            steps.append(n_tokens)
            reasons.extend(result.finish_reason for _, result in ended)

        began = time.perf_counter()
        pieces = stream_text(model, tokenizer, prompt, self.sampling, note, index)
        text = "".join(pieces)
        seconds = time.perf_counter() - began
        return Completion(entry, text, sum(steps), seconds, (reasons or [""])[-1])


def _describe(prompt: str, index: int, completion: Completion) -> dict[str, Any]:
    entry = completion.entry
    return {
        "prompt": prompt,
        "index": index,
        "name": entry.name,
        "checkpoint": str(entry.checkpoint.path),
        "step": entry.checkpoint.step,
        "val_loss": entry.checkpoint.val_loss,
        "text": completion.text,
        "n_tokens": completion.n_tokens,
        "seconds": round(completion.seconds, 4),
        "tokens_per_second": round(completion.tokens_per_second, 2),
        "finish_reason": completion.finish_reason,
    }


def _show_completions(prompt: str, completions: Sequence[Completion], best: Entry | None) -> None:
    """The completions in columns, the fastest and the best marked."""
    fastest = max(completions, key=lambda c: c.tokens_per_second)
    columns = []
    for c in completions:
        marks = [m for m, has in (("best", c.entry == best), ("fastest", c is fastest)) if has]
        title = c.entry.name + (f" [{', '.join(marks)}]" if marks else "")
        remark = f"{c.n_tokens:,} tokens, {c.seconds:.2f} s, {c.tokens_per_second:,.1f} tokens/s"
        columns.append(Column(title, make_printable(c.text), remark))
    width = shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns
    lines = format_columns(columns, width)
    print("\n".join([f"> {make_printable(prompt)}", *lines, ""]), flush=True)


# ---- evaluation ---------------------------------------------------------------------------------


def _show_differences(entries: Sequence[Entry]) -> None:
    """Each entry against the first, where `--evaluate` has left results of both."""
    results = [find_result(entry.checkpoint) for entry in entries]
    missing = [str(e.checkpoint.path) for e, r in zip(entries, results, strict=True) if r is None]
    if missing:
        log.info(
            "to compare what they score on the same items: "
            + format_command("--evaluate", "--checkpoints", *missing)
        )
    first = results[0]
    for entry, result in zip(entries[1:], results[1:], strict=True):
        if first is None or result is None:
            continue
        found, left_out = compare_results(first, result, (entries[0].name, entry.name))
        for line in left_out:
            log.info(f"not compared: {line}")
        for difference in found:
            print(difference.describe(), flush=True)


def find_result(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The newest result of `--evaluate` for exactly these weights."""
    parent = checkpoint.path.absolute().parent
    run_folder = parent.parent if parent.name == MILESTONES_NAME else parent
    wanted = identify_weights(checkpoint)
    newest: dict[str, Any] | None = None
    for content in _read_results(run_folder / "evaluation"):
        is_newer = newest is None or str(content.get("time")) >= str(newest.get("time"))
        if content.get("weights_sha256") == wanted and is_newer:
            newest = content
    return newest


def _read_results(folder: Path) -> Iterator[dict[str, Any]]:
    """The result files in a folder; a damaged one is left out with a warning."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            log.warning(f"{path} cannot be read: {error}")
            continue
        with contextlib.suppress(AttributeError):
            if content.get("format") == "preflight-evaluation":
                yield content
