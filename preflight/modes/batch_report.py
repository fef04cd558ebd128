"""The report of `--get-optimal-bs`, for a person and for a program."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from preflight.core import storage
from preflight.core.units import format_bytes
from preflight.foresight.batch_search import FAST_SHARE, SearchResult
from preflight.foresight.fits import format_batch_flags
from preflight.foresight.trial_spec import TrialResult
from preflight.modes.batch_trials import MAX_STEP_SECONDS, BatchTrials
from preflight.modes.trying import format_train_command

FORMAT = "preflight-batch-size"
FOUND_FLAGS = ("batch_size", "gradient_accumulation_steps")


class BatchSizeReport:
    """The result of a search, for a person and for a program.

    Args:
        trials: what the search used.
        result: what it found.
        source: what the batches were made of.
    """

    next_larger = "the next larger size was tried and does not fit"

    def __init__(self, trials: BatchTrials, result: SearchResult, source: str) -> None:
        self.trials, self.result, self.source = trials, result, source
        self.config, self.settings = trials.config, trials.settings
        self.precision = str(trials.runtime.dtype).removeprefix("torch.")

    def publish(self, path: Path) -> None:
        """Write the report as JSON to `path`, and print it as the flags ask."""
        content = self.to_dict()
        storage.write_json(path, content)
        text = json.dumps(content, indent=2) if self.config.check.json else self.to_text()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    @property
    def batch_flags(self) -> str:
        """The flags of the chosen size."""
        accumulation = self.result.accumulation or self.config.training.gradient_accumulation_steps
        return format_batch_flags(self.result.chosen or 0, accumulation)

    @property
    def flags(self) -> str:
        """`batch_flags`, and the ranks that a run of one host starts itself."""
        processes = self.config.processes
        starts = processes.ranks is not None and processes.hosts == 1
        return self.batch_flags + f" --ranks {processes.ranks}" * starts

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types. Sizes in sequences, memory in bytes."""
        result = dataclasses.asdict(self.result)
        del result["trials"]
        return {
            "format": FORMAT,
            "model": dataclasses.asdict(self.trials.spec.model_config),
            "device": self.trials.device,
            "ranks": self.trials.n_ranks,
            "precision": self.precision,
            "compile_model": self.trials.runtime.compile_model,
            "gradient_checkpointing": self.config.system.gradient_checkpointing,
            "memory_bytes": self.trials.total_bytes,
            "safety_margin": self.settings.gpu_safety_margin,
            "batches": self.source,
            "learning": dataclasses.asdict(self.trials.needs),
            **result,
            "flags": self.flags if self.result.chosen else None,
            "trials": [
                self._describe_trial(trial) | self._describe_prediction(trial)
                for trial in self.result.trials
            ],
        }

    def _describe_trial(self, trial: TrialResult) -> dict[str, Any]:
        tokens_per_step = self.trials.count_tokens_per_step(trial.batch_size)
        in_epoch, in_run = self.trials.needs.count_updates(tokens_per_step)
        return dataclasses.asdict(trial) | {
            "updates_per_epoch": in_epoch,
            "updates": in_run,
            "times_tokens": round(self.trials.count_times_tokens(trial.batch_size), 4),
            "fits": trial.fits(self.trials.limit_bytes),
            "verdict": self.trials.judge(trial),
        }

    def _describe_prediction(self, trial: TrialResult) -> dict[str, Any]:
        """What was predicted of a trial, beside what it measured."""
        estimate = self.trials.estimate(trial.batch_size)
        return {
            "predicted_peak_bytes": estimate.peak_bytes,
            "predicted_needed_bytes": estimate.required_bytes,
            "ratio": round(self._compare(trial)[1] / self._compare(trial)[0], 4),
        }

    def _compare(self, trial: TrialResult) -> tuple[int, int]:
        """Predicted and measured bytes: allocated on CUDA, resident in the process on the CPU."""
        estimate = self.trials.estimate(trial.batch_size)
        if self.trials.on_cuda:
            return estimate.peak_bytes, trial.peak_bytes
        return estimate.required_bytes, trial.needed_bytes

    def to_text(self) -> str:
        """The report for a person: the limit, a table of the trials, and what follows from it."""
        heading, rows = self._tabulate()
        return "\n".join([*self._describe_search(), "", heading, *rows, "", *self._conclude()])

    def _describe_search(self) -> list[str]:
        """For which model and device, within which limit, on which data."""
        trials, on_cuda = self.trials, self.trials.on_cuda
        total = f"{format_bytes(trials.total_bytes)} {'of the card' if on_cuda else 'available'}"
        ranks = []
        if trials.n_ranks > 1:
            total += "" if on_cuda else f" for each of {trials.n_ranks} ranks"
            ranks = [
                f"ranks: {trials.sharing.describe()}; batch size of each, memory of the fullest, "
                "tokens/s of all together"
            ]
        context = trials.spec.model_config.context_length
        return [
            f"batch size for {trials.spec.model_config.label}, "
            f"{'context' if trials.window == context else 'windows of'} {trials.window:,}, "
            f"{self.precision}, on {trials.device}",
            f"memory limit: {format_bytes(trials.limit_bytes)}: {total}, less "
            f"{self.settings.gpu_safety_margin:.0%} (--gpu-safety-margin)",
            f"batches: {self.source}",
            *ranks,
        ]

    def _tabulate(self) -> tuple[str, list[str]]:
        """The heading of a table of the trials, and its rows, the smallest batch size first."""
        rows = []
        for trial in sorted(self.result.trials, key=lambda t: t.batch_size):
            tokens_per_step = self.trials.count_tokens_per_step(trial.batch_size)
            updates = self.trials.needs.count_updates(tokens_per_step)[1]
            rows.append(
                f"{trial.batch_size:>7,} {self._describe_memory(trial)} "
                f"{trial.tokens_per_second:>9,.0f} {updates:>9,}  {self.trials.judge(trial)}"
            )
        return f"{'batch':>7} {self.memory_heading} {'tokens/s':>9} {'updates':>9}  result", rows

    @property
    def memory_heading(self) -> str:
        """Of the columns that `_describe_memory` fills."""
        held = "reserved" if self.trials.on_cuda else "model's"
        return f"{'predicted':>10} {'measured':>10} {'ratio':>6} {held:>10}"

    def _describe_memory(self, trial: TrialResult) -> str:
        predicted, measured = self._compare(trial)
        held_bytes = trial.reserved_bytes if self.trials.on_cuda else trial.peak_bytes
        return (
            f"{format_bytes(predicted):>10} {format_bytes(measured):>10} "
            f"{measured / predicted:>6.3f} {format_bytes(held_bytes):>10}"
        )

    def _conclude(self) -> list[str]:
        """What follows from the table; the command to continue with comes last."""
        result, target = self.result, self.settings.target_batch_size
        if result.chosen is None:
            return ["no batch size fits"]
        if target:
            verdict = "fits" if result.largest == target else "does not fit"
            lines = [f"batch size {target:,} {verdict}; largest that fits: {result.largest:,}"]
        else:
            lines = [
                f"largest that fits: {result.largest:,} ({self._explain_bound()})",
                f"fastest: {result.fastest:,}",
                f"recommended: {result.recommended:,}, {self._explain_recommended()}",
            ]
        if result.accumulation:
            lines.append(self._describe_update(result.chosen, result.accumulation))
        return [*lines, "", *self._list_commands()]

    def _list_commands(self) -> list[str]:
        """What to do next."""
        command = format_train_command(self.config, *self.flags.split(), without=FOUND_FLAGS)
        return ["continue with:", f"  {command}"]

    def _explain_recommended(self) -> str:
        """Why this is the size to take."""
        trials, result = self.trials, self.result
        sizes = {trial.batch_size: trial for trial in result.trials}
        fastest, own = sizes[result.fastest or 0], sizes[result.recommended or 0]
        least = f"the smallest within {1 - FAST_SHARE:.0%} of the"
        if own.tokens_per_second >= FAST_SHARE * fastest.tokens_per_second:
            return f"{least} fastest"
        gain = fastest.tokens_per_second / own.tokens_per_second - 1
        times = trials.count_times_tokens(fastest.batch_size)
        times /= trials.count_times_tokens(own.batch_size)
        updates = [
            trials.needs.count_updates(trials.count_tokens_per_step(trial.batch_size))
            for trial in (own, fastest)
        ]
        (own_epoch, own_run), (in_epoch, in_run) = updates
        return (
            f"{least} least time for the same loss: {own_epoch:,} updates an epoch, {own_run:,} in "
            f"the run; {fastest.batch_size:,} is {gain:.0%} faster, but makes {in_epoch:,} and "
            f"{in_run:,}, and needs {times:.1f} x the tokens ({trials.needs.basis})"
        )

    def _explain_bound(self) -> str:
        """Why there is no larger size."""
        return {
            "memory": self.next_larger,
            "data": "larger sizes need more sequences than an epoch or an update has",
            "time": f"larger sizes were not tried: a step would take over {MAX_STEP_SECONDS:.0f} "
            f"s; predicted to fit up to {self.result.predicted_largest:,}",
            "list": "of the sizes given",
        }[self.result.bound]

    def _describe_update(self, size: int, accumulation: int) -> str:
        """How ranks, batch size, accumulation and context make the tokens per step."""
        context, n_ranks = self.trials.window, self.trials.n_ranks
        tokens = size * accumulation * context * n_ranks
        asked = self.settings.tokens_per_step or tokens
        line = f"{size:,} x {accumulation:,} x {context:,} = {tokens:,} tokens per step"
        unit = "the context"
        if n_ranks > 1:
            line, unit = f"{n_ranks:,} ranks x {line}", "ranks x context"
        if tokens != asked:
            line += f", the nearest to {asked:,}, which is no multiple of {unit}"
        return line
