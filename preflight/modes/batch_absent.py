"""`--get-optimal-bs --target-gpu`: batch sizes on a card that is not here. Nothing is run.

The search is that of a real card. Where a trial would run, the memory is that of `--check`: a trace
of the step; and the time is that of `--check`: a formula on the card's data sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from preflight.core.commands import format_command, join_words
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.device.runtime import MIN_STEPS_TO_COMPILE
from preflight.device.token_store import DataPlace
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.memory import MemoryOptions, estimate_memory
from preflight.foresight.rank_time import estimate_shared_cost, find_network
from preflight.foresight.run_time import RunCost, estimate_cost
from preflight.foresight.target import Target, describe_absent
from preflight.foresight.trial_spec import TrialResult, TrialSpec
from preflight.modes.batch_report import FOUND_FLAGS, BatchSizeReport
from preflight.modes.batch_trials import BatchTrials
from preflight.modes.trying import list_train_words
from preflight.settings import RunConfig

# The line of a compiled step knows no shorter last chunk of the loss, and was found 0.5 % off at
# most: so near to the limit, each size is traced by itself.
_NEAR_SHARE = 0.02
_OF_CHECK = ("target_gpu", "gpu_memory", "ranks", "hosts", "network_gbits")


def check_card(config: RunConfig) -> None:
    """Refuse a card of which nothing is known but its memory.

    Raises:
        PreflightError: code FLAGS, for a card that is not in the table, or whose speed is unknown.
    """
    target = describe_absent(config.check, config.system, MIN_STEPS_TO_COMPILE)
    if target.card is None:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--gpu-memory {config.check.gpu_memory:g} alone implies no speed, on which the batch "
            "size to take depends",
            "name the card too: --target-gpu 'RTX 4090'",
            f"what one size needs: --check --gpu-memory {config.check.gpu_memory:g} --batch-size 8",
        )


class AbsentTrials(BatchTrials):
    """Predicts a run at different batch sizes on the card that the flags name.

    Args:
        spec: as in `BatchTrials`.
        stop: a signal ends the search.

    Attributes:
        target: the card, and how a run at the configured batch size would use it.
    """

    max_step_seconds = math.inf
    max_micro_steps = 2**62  # all of them: `--check` counts the batches of each
    afterwards = "all of it is predicted: nothing was run"

    def _find_device(self) -> None:
        config = self.config
        self.target = self.find_target(self.spec)
        self.runtime = self.target.planned_runtime
        self.sharing = Sharing(self.n_ranks, config.processes.hosts)
        self.network = find_network(config.processes)
        self.device = self.target.name
        self.total_bytes = self.target.limit_bytes
        self.limit_bytes = int(self.total_bytes * (1 - self.settings.gpu_safety_margin))

    def find_target(self, spec: TrialSpec) -> Target:
        """The card; whether a run is compiled for it depends on its steps."""
        return describe_absent(self.config.check, self.config.system, spec.plan().total_steps)

    def _describe_memory(self, spec: TrialSpec) -> tuple[Callable[..., MemoryOptions], DataPlace]:
        target = self.find_target(spec)
        return target.memory_options, spec.place_data(target.device_type, target.limit_bytes)

    def estimate_cost(self, size: int) -> RunCost:
        """Seconds at a batch size, by formula."""
        spec, card = self.spec_at(size), self.target.card
        assert card is not None
        plan = spec.plan()
        choices: dict[str, Any] = {
            "card": card,
            "dtype": self.target.dtype,
            "gradient_checkpointing": self.config.system.gradient_checkpointing,
            "compile_model": self.find_target(spec).compile_model,
            "window_tokens": max(1, round(plan.tokens_per_step / plan.samples_per_step)),
        }
        run = spec.model_config, spec.config.training
        if self.n_ranks == 1:
            return estimate_cost(*run, **choices)
        return estimate_shared_cost(*run, self.sharing, network=self.network, **choices)[0]

    def probe(self, size: int) -> TrialResult:
        """Predict a size, and log it.

        Raises:
            PreflightError: after a signal, with its code.
        """
        self.stop.leave_if_stopping("stopped: the search is not finished, and nothing was run")
        spec, memory = self.spec_at(size), self.estimate(size)
        training, limit = spec.config.training, self.limit_bytes
        if abs(memory.required_bytes - limit) < _NEAR_SHARE * limit:
            memory = estimate_memory(spec.model_config, training, self.build_options(spec))
        seconds = self.estimate_cost(size).step_seconds
        trial = TrialResult(
            size,
            peak_bytes=memory.peak_bytes,
            reserved_bytes=memory.reserved_bytes,
            needed_bytes=memory.required_bytes,
            micro_steps=training.gradient_accumulation_steps,
            step_seconds=seconds,
            tokens_per_second=spec.plan().tokens_per_step / seconds,
            phases=memory.phases,
            is_predicted=True,
        )
        log.info(
            f"batch size {size:,}, predicted: {format_bytes(trial.needed_bytes)} of "
            f"{format_bytes(limit)}, {trial.tokens_per_second:,.0f} tokens/s"
        )
        return trial


class AbsentReport(BatchSizeReport):
    """What was predicted for a card that is not here.

    Args:
        trials: what the search used.
        result: what it found.
        source: what the batches would be made of.
    """

    trials: AbsentTrials
    next_larger = "the next larger size is predicted not to fit"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, all of it predicted."""
        return super().to_dict() | {"is_predicted": True, "time_basis": self._basis}

    @property
    def _basis(self) -> str:
        """On which assumptions the times rest."""
        return self.trials.estimate_cost(self.result.chosen or 1).basis

    def _describe_prediction(self, trial: TrialResult) -> dict[str, Any]:
        return {
            "predicted_peak_bytes": trial.peak_bytes,
            "predicted_needed_bytes": trial.needed_bytes,
            "ratio": None,
        }

    def _describe_search(self) -> list[str]:
        return [
            *super()._describe_search(),
            "all figures are predicted: the card is not here, and nothing was run",
            f"memory: a trace of the step; time: an estimate that {self._basis}",
        ]

    @property
    def memory_heading(self) -> str:
        """Of the columns that `_describe_memory` fills."""
        return f"{'allocated':>10} {'needed':>10} {'step, ms':>9}"

    def _describe_memory(self, trial: TrialResult) -> str:
        return (
            f"{format_bytes(trial.peak_bytes):>10} {format_bytes(trial.needed_bytes):>10} "
            f"{1000 * trial.step_seconds:>9,.1f}"
        )

    def _list_commands(self) -> list[str]:
        """The whole run's time and cost there, and the run itself."""
        foreseen = list_train_words(self.config, FOUND_FLAGS, also=_OF_CHECK)
        if foreseen[0] == "--train":
            del foreseen[0]
        words = list_train_words(self.config, FOUND_FLAGS) + self.flags.split()
        sharing = self.trials.sharing
        if sharing.hosts > 1:
            command = join_words(
                *("torchrun", "--nnodes", sharing.hosts),
                *("--nproc-per-node", sharing.ranks_per_host),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT", "main.py", *words),
            )
        else:
            command = format_command(*words)
        return [
            "time and cost of the whole run there:",
            f"  {format_command('--check', *foreseen, *self.batch_flags.split())}",
            "",
            "continue there with (--get-optimal-bs there measures what is predicted here):",
            f"  {command}",
        ]
