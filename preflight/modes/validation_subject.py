"""What the checks of `--validate-only` share: the subject that they try, and how they fail.

Each check is a small function that returns what it saw, or raises `Fault` with the fix. None stops
the others, and what a check writes is gone when it ends; only the data folder may be built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.shards import DataFolder
from preflight.device.runtime import Runtime
from preflight.models.loss import count_targets
from preflight.modes.report import describe_error
from preflight.modes.setup import RunSetup
from preflight.settings import ControlSettings, RunConfig
from preflight.tokenization import Tokenizer, TokenizerRecipe
from preflight.training.plan import build_plan
from train_utils import Loader
from trainer import Trainer, build_trainer

MAX_SEQUENCES = 2


class Fault(Exception):
    """What a check found wrong, each with its fix."""

    def __init__(self, *faults: tuple[str, str]) -> None:
        super().__init__(faults[0][0])
        self.faults = faults

    @classmethod
    def of(cls, what: str, fix: str) -> Fault:
        """The one thing that is wrong."""
        return cls((what, fix))


class Lacking(Exception):
    """A check that cannot run because the check of that number did not pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"needs check {number}")


class Subject:
    """What the checks share: the run's set-up, and a trainer with a small batch."""

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.warnings: list[str] = []

    @property
    def config(self) -> RunConfig:
        """The flags, with what a checkpoint to continue from adds."""
        return self.setup.known_config

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.setup.output_dir

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; the data answers for one that is made from the text."""
        choice = self._need("tokenizer_choice", 1)
        return self._need("tokenizer", 4 if isinstance(choice, TokenizerRecipe) else 1)

    @property
    def data(self) -> DataFolder:
        """The prepared and verified data folder.

        Raises:
            PreflightError: it cannot be had.
        """
        self._need("tokenizer_choice", 1)  # without one, the data is not at fault
        data = self.setup.data
        self.setup.stop.leave_if_stopping("stopped; the data folder is complete")
        return data

    def _need(self, name: str, check: int) -> Any:
        """A part of the set-up for which the `check` of that number answers."""
        try:
            return getattr(self.setup, name)
        except PreflightError:
            raise Lacking(check) from None

    @property
    def runtime(self) -> Runtime:
        """The run's device and precision."""
        return self._need("runtime", 1)

    @property
    def batch_size(self) -> int:
        """At most two sequences: these checks ask whether, not how fast."""
        return min(MAX_SEQUENCES, self.config.training.batch_size)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The real model at its full learning rate from the first step, with a small batch."""
        training = dataclasses.replace(
            self.config.training,
            batch_size=self.batch_size,
            warmup_steps=0,
            max_steps=1000,
            num_epochs=None,
            scheduler="none",
            gradient_accumulation_steps=min(2, self.config.training.gradient_accumulation_steps),
        )
        model_config = self.setup.model_config
        plan = build_plan(training, ControlSettings(), model_config.context_length, 1, 1)
        return build_trainer(
            model_config,
            training,
            plan,
            self.runtime,
            gradient_checkpointing=self.config.system.gradient_checkpointing,
        )

    @functools.cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets: the user's own text, or random ids where it cannot be had."""
        try:
            with self.open_loader() as loader:
                return take_windows(loader)
        except (PreflightError, Lacking):
            model_config = self.setup.model_config
            shape = (self.batch_size, model_config.context_length + 1)
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(model_config.vocab_size, shape, generator=draw)
            ids = ids.to(self.runtime.device)
            return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def open_loader(self, cursor: int = 0) -> Loader:
        """The training part as a run reads it."""
        self.runtime  # noqa: B018  # without one, the loader is not at fault
        self.data  # noqa: B018
        return self.setup.open_loader(cursor, self.batch_size)

    def compute_loss(self, *, mixed: bool = False) -> Tensor:
        """The model's loss on the batch, in fp32 or as a training step computes it."""
        context = self.trainer.runtime.autocast() if mixed else contextlib.nullcontext()
        with context:
            return self.trainer.model(*self.batch) / count_targets(self.batch[1])


def take_windows(loader: Loader) -> tuple[Tensor, Tensor]:
    """The next batch of a text: inputs and targets (B T)."""
    inputs, targets = loader.next_batch()
    assert isinstance(targets, Tensor)
    return inputs, targets


@contextlib.contextmanager
def collected(faults: list[tuple[str, str]]) -> Iterator[None]:
    """A `PreflightError` joins `faults` instead of ending the check; signals still do."""
    try:
        yield
    except PreflightError as error:
        faults.append(describe_error(error))


@contextlib.contextmanager
def borrow_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents, and remove those that are empty afterwards."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
        yield
    except OSError as error:
        raise PreflightError(
            ExitCode.STORAGE, f"cannot write {folder}: {error.strerror}", "choose another folder"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
