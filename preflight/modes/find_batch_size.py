"""`--get-optimal-bs`: the largest batch size that fits, the fastest, and the recommended one.

Every size is measured by one trial in a process of its own, or in one for each rank
(`foresight/trials.py`); for a card that is not here it is predicted (`batch_absent.py`). Which
sizes are tried is decided in `foresight/batch_search.py`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.signals import StopFlag
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.device.ranks import plan_ranks
from preflight.foresight.target import is_absent
from preflight.foresight.trial_spec import TrialSpec
from preflight.modes.batch_absent import AbsentReport, AbsentTrials, check_card
from preflight.modes.batch_report import FORMAT, BatchSizeReport
from preflight.modes.batch_trials import BatchTrials, explain_no_fit
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.modes.launch import count_ranks
from preflight.modes.setup import RunSetup
from preflight.modes.trying import open_output
from preflight.settings import RunConfig
from trainer import refuse_unshared

REPORT_NAME = "batch_size_report.json"


def run(config: RunConfig) -> int:
    """Search, print the table or JSON, write the report, and return the exit code.

    Raises:
        PreflightError: code OUT_OF_MEMORY when not even one sequence fits, with what would help;
            otherwise the code of whatever keeps a trial from running.
    """
    if config.search.test_batch_sizes and config.search.target_batch_size:
        raise PreflightError(
            ExitCode.FLAGS, "--test-batch-sizes and --target-batch-size: give one of them"
        )
    absent = is_absent(config.check)
    if absent:
        check_card(config)  # before anything else
    output_dir = Path(config.control.output_dir)
    with (
        open_output(config, REPORT_NAME, FORMAT) as setup,
        contextlib.ExitStack() as stack,
    ):
        n_ranks = (config.processes.ranks or 1) if absent else count_ranks(config)
        refuse_unshared(setup.config.training, plan_ranks(n_ranks))
        model_config = setup.model_config
        data, source = _find_data(setup, stack)
        folder = output_dir / f"{storage.TEMPORARY_PREFIX}trial"
        spec = TrialSpec(setup.config, model_config, data, folder, n_ranks)
        report = (_predict if absent else _measure)(spec, setup.stop, source)
        report.publish(output_dir / REPORT_NAME)
        if report.result.chosen is None:
            raise explain_no_fit(report.trials)
        target = config.search.target_batch_size
        return ExitCode.DONE if target in (None, report.result.largest) else ExitCode.CHECK_FAILED


def _measure(spec: TrialSpec, stop: StopFlag, source: str) -> BatchSizeReport:
    trials = BatchTrials(spec, stop)
    return BatchSizeReport(trials, trials.search(), source)


def _predict(spec: TrialSpec, stop: StopFlag, source: str) -> BatchSizeReport:
    trials = AbsentTrials(spec, stop)
    return AbsentReport(trials, trials.search(), source)


def _find_data(setup: RunSetup, stack: contextlib.ExitStack) -> tuple[DataFolder | None, str]:
    """The data if it is prepared and fits the run, and in words what the batches are made of."""
    folder = setup.data_dir
    if isinstance(setup, FinetuneSetup):
        return setup.data, f"chats in {folder}"
    if not os.path.exists(folder / METADATA_NAME):
        return None, f"random tokens ({folder} holds no prepared data)"
    stack.enter_context(FolderLock(folder, shared=True))
    try:
        data = load_data_folder(folder, setup.tokenizer_choice)
    except PreflightError as error:
        return None, f"random tokens ({error.lines[0]})"
    if min(data.train.n_tokens, data.val.n_tokens) <= setup.window_length:
        return None, f"random tokens ({folder} is shorter than the context)"
    return data, f"prepared data in {folder}"
