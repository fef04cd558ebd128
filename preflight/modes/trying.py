"""What the modes share that try a run before it starts: locks, data, progress, the command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preflight.checkpoints.store import remove_leftovers
from preflight.core import storage
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.core.strict_json import read_json
from preflight.core.units import format_seconds
from preflight.corpus.sources import find_sources
from preflight.device.host_memory import available_host_bytes
from preflight.foresight.child import ChildRules
from preflight.foresight.short_training import TrainingResult, TrainingSpec, describe_training
from preflight.foresight.target import is_absent
from preflight.modes.finetune_setup import build_setup
from preflight.modes.run_memory import check_memory
from preflight.modes.setup import RunSetup
from preflight.modes.start import check_machine
from preflight.settings import RunConfig, build_options
from preflight.training.time_left import TimeLeft

_OF_A_RUN = ("model", "training", "finetuning", "data", "control", "system")
_KNOWN_AFTER = 4  # steps; then their time is told


@dataclass(frozen=True)
class Workshop:
    """Where trials run: the run's parts, and its output folder, which is locked."""

    setup: RunSetup
    output_dir: Path

    def build_rules(self, name: str, *stopped: str) -> ChildRules:
        """For a child called `name`; `stopped` is told when a signal ends it."""
        folder = self.output_dir / f"{storage.TEMPORARY_PREFIX}trial"
        return ChildRules(name, folder, available_host_bytes(), self.setup.stop, stopped)

    def build_spec(self, n_steps: int) -> TrainingSpec:
        """A short training with the run's own flags, evaluated as the run is at its end."""
        setup = self.setup
        return TrainingSpec(
            setup.config,
            setup.model_config,
            setup.data,
            n_steps,
            setup.plan.total_steps,
            setup.plan.eval_windows,
        )


@contextlib.contextmanager
def open_workshop(config: RunConfig, report_name: str, report_format: str) -> Iterator[Workshop]:
    """Lock the folders and prepare the data; the run's own checkpoints and log are not touched.

    Raises:
        PreflightError: with the code of whatever keeps a run from starting; code FLAGS for
            `--init-from`.
    """
    if config.control.init_from is not None:
        raise PreflightError(
            ExitCode.FLAGS,
            "--init-from: short trainings begin with random weights",
            "leave it out here; --check and --get-optimal-bs take it",
        )
    find_sources(config.data)  # a misspelt file is told before any folder is made
    with open_output(config, report_name, report_format) as setup:
        setup.check_before_data()
        setup.data  # noqa: B018
        with FolderLock(Path(config.data.data_dir), shared=True):
            check_memory(setup, setup.runtime, setup.plan.window_tokens)
            yield Workshop(setup, Path(config.control.output_dir))


@contextlib.contextmanager
def open_output(config: RunConfig, report_name: str, report_format: str) -> Iterator[RunSetup]:
    """Lock the output folder for trials, whose report must not replace a file that is not ours.

    Raises:
        PreflightError: with the code of whatever keeps a run from starting.
    """
    if not is_absent(config.check):
        check_machine(config.system)
    output_dir = Path(config.control.output_dir)
    storage.make_folder(output_dir)
    with StopFlag() as stop, FolderLock(output_dir):
        storage.check_writable(output_dir)  # under the lock: two probes would disturb each other
        storage.refuse_foreign_json(output_dir / report_name, report_format)
        remove_leftovers(output_dir)
        yield build_setup(config, stop, continues=False)


class Progress:
    """A bar over the steps of all trials on a terminal, else lines; and the time they take."""

    def __init__(self, total_steps: int, what: str) -> None:
        self.total_steps, self.what = total_steps, what
        self._done = 0
        self._left = TimeLeft(total_steps)
        self._told = False
        self._last = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            unit="step",
            desc=what,
            dynamic_ncols=True,
            disable=not is_progress_shown(),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def record(self, message: tuple[int, float]) -> None:
        """One more step, as a trial reports it: its number, and its loss."""
        now = time.monotonic()
        if message[0] > 1:  # a trial's first step holds the start of its process
            self._left.add_step(now - self._last)
        self._last = now
        self._done += 1
        self._bar.update()
        left = self._left.estimate(self._done)
        if left is None:
            return
        if self._done >= _KNOWN_AFTER and not self._told:
            self._told = True
            log.info(f"{self.what}: about {format_seconds(left)} from here")
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {message[1]:.3f}, ETA {format_seconds(left)}")
        elif self._done % max(1, self.total_steps // 10) == 0:
            log.info(
                f"{self.what}: step {self._done:,}/{self.total_steps:,}, loss {message[1]:.4f}, "
                f"ETA {format_seconds(left)}"
            )

    def skip(self, n_steps: int) -> None:
        """Steps that are not needed: of a trial that ended early."""
        self._done += n_steps
        self._bar.update(n_steps)


def describe_result(spec: TrainingSpec, result: TrainingResult) -> dict[str, Any]:
    """A short training in a report, from which `find_result` takes it again."""
    return {
        "trained": describe_training(spec),
        **dataclasses.asdict(result),
        "losses": list(result.losses),
        "tokens_per_second": result.tokens_per_second,
    }


def find_result(saved: Any, spec: TrainingSpec) -> TrainingResult | None:
    """The result of a training that an earlier call has done; not of one that lacked memory.

    Args:
        saved: rows of a report, which a person may have changed.
        spec: the training.
    """
    wanted = json.loads(json.dumps(describe_training(spec)))  # as it is read back
    names = {field.name for field in dataclasses.fields(TrainingResult)}
    rows = [row for row in saved if isinstance(row, dict)] if isinstance(saved, list) else []
    for row in rows:
        is_whole = row.get("trained") == wanted and names <= {*row}
        if is_whole and not str(row["failure"]).startswith("out of memory"):
            known = {name: row[name] for name in names}
            return TrainingResult(**known | {"losses": tuple(known["losses"])})
    return None


def read_report(path: Path) -> dict[str, Any]:
    """The report of an earlier call; an empty one where there is none, or none that is whole."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        log.warning(f"{path} cannot be read ({error}): what it held is done again")
        return {}
    return content if isinstance(content, dict) else {}


def format_train_command(config: RunConfig, *flags: str, without: tuple[str, ...] = ()) -> str:
    """The command that trains, and then `flags`: see `list_train_words`."""
    return format_command(*list_train_words(config, without), *flags)


def list_train_words(
    config: RunConfig, without: tuple[str, ...] = (), also: tuple[str, ...] = ()
) -> list[str]:
    """`--train` or `--finetune`, and the run's flags of this call but those in `without`.

    Args:
        config: the flags.
        without: flags to leave out.
        also: flags of other groups to take too.
    """
    words = ["--train"]
    if config.finetuning.finetune:
        words = ["--finetune", *config.finetuning.finetune]
    for option in build_options().values():
        if (
            config.sources.get(option.name) == "the command line"
            and (option.group in _OF_A_RUN or option.name in also)
            and option.name not in ("finetune", *without)
        ):
            words += option.spell(config.get(option))
    return words
