"""What a run is made of, assembled once for every mode.

Each part of `RunSetup` is made when it is first asked for. A part that cannot be made raises the
same `PreflightError` every time, so that a report can continue with the parts that do not need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.format import load_weights
from preflight.checkpoints.rows import list_rows
from preflight.core.errors import PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.corpus.build import prepare_data
from preflight.corpus.shards import DataFolder, Split
from preflight.corpus.windows import count_run_windows
from preflight.device.runtime import MIN_STEPS_TO_COMPILE, Runtime, build_runtime
from preflight.device.token_store import DataPlace, measure_free_bytes
from preflight.foresight.absent_ranks import Sharing
from preflight.models.loss import Targets
from preflight.modes.base_checkpoint import load_base_weights, refuse_other_ids
from preflight.modes.choosing_way import choose_run_way
from preflight.modes.continuing import check_replacement, check_tokens_per_step, restore_state
from preflight.modes.part import part
from preflight.modes.run_settings import RunSettings
from preflight.settings import ControlSettings, ModelConfig, SystemSettings, TrainingSettings
from preflight.tokenization import (
    Tokenizer,
    TokenizerChoice,
    TokenizerRecipe,
    choose_tokenizer,
    load_saved_tokenizer,
)
from preflight.training.changes import describe_runtime
from preflight.training.plan import TrainingPlan, build_plan
from preflight.training.resume import resolve_model
from preflight.training.sharing import read_samples_per_step
from preflight.training.state import TrainState
from train_utils import (
    Loader,
    Shares,
    choose_data_place,
    iterate_windows,
    open_training_loader,
    split_update,
)
from trainer import Trainer, build_trainer


class RunSetup(RunSettings):
    """One run's parts: tokenizer, model, data, state, plan, runtime, and what trains with them."""

    @part
    def tokenizer_choice(self) -> TokenizerChoice:
        """The tokenizer inside the checkpoint that the run continues or begins from.

        Else that of the flags, which may need the text first.
        """
        source = self.known_source
        if source is not None:
            return load_saved_tokenizer(source.path, source.config["tokenizer"])
        return choose_tokenizer(self.known_config.model)

    @part
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; one that is made from the text comes with the data."""
        choice = self.tokenizer_choice
        return self.data.load_tokenizer() if isinstance(choice, TokenizerRecipe) else choice

    @part
    def model_config(self) -> ModelConfig:
        """The architecture: the origin's or the base's, or that of the flags."""
        return resolve_model(self.known_config, self.tokenizer, self.known_source)

    @property
    def least_model_config(self) -> ModelConfig:
        """`model_config`; before the data is made, with the fewest ids that it can have."""
        if isinstance(self.tokenizer_choice, TokenizerRecipe):
            return self.known_config.model.resolve(self.tokenizer_choice.least_vocab_size)
        return self.model_config

    @property
    def known_model_config(self) -> ModelConfig:
        """`model_config`, or where it is refused the flags' with the tokenizer's vocabulary."""
        with contextlib.suppress(PreflightError):
            return self.model_config
        own = dataclasses.replace(self.known_config.model, vocab_size=None)
        return own.resolve(self.tokenizer.vocab_size)

    @part
    def data(self) -> DataFolder:
        """The data folder, prepared where it is not yet, and verified."""
        if self.known_origin is None and self.base is not None:
            refuse_other_ids(self.base, self.tokenizer_choice, self.known_config.data)
        return prepare_data(
            self.known_config.data,
            self.tokenizer_choice,
            self.stop,
            may_replace=functools.partial(check_replacement, self),
        )

    @part
    def state(self) -> TrainState:
        """Where the run stands.

        Raises:
            PreflightError: code DATA, when the origin was trained on other data and
                `--resume-from` does not name it.
        """
        origin = self.known_origin
        if origin is None:
            return TrainState()
        if not self.resumes:
            return TrainState(step=origin.step, cursor=origin.step * self.samples_per_step)
        return restore_state(self, origin)

    @part
    def plan(self) -> TrainingPlan:
        """The run in numbers.

        Raises:
            PreflightError: code CHECKPOINT, when the tokens per step are not the origin's and
                `--allow-batch-change` is not given.
        """
        plan = self.build_plan_of(self.known_config.training)
        if self.resumes:
            before = self.saved.get("tokens_per_step", plan.tokens_per_step)
            check_tokens_per_step(self, before, plan.tokens_per_step)
            if before != plan.tokens_per_step:
                log.info(f"tokens per step change from {before:,} to {plan.tokens_per_step:,}")
        return plan

    @property
    def control(self) -> ControlSettings:
        """The flags of steps and intervals."""
        return self.known_config.control

    def build_plan_of(self, training: TrainingSettings) -> TrainingPlan:
        """The plan with these settings, on the run's data and from where it stands."""
        windows = count_run_windows(self.data, training, self.window_length)
        return build_plan(
            training,
            self.control,
            windows.window_tokens,
            windows.n_train,
            windows.n_val,
            self.state,
            stride_tokens=windows.stride_tokens,
            tokens_per_sample=windows.mean_tokens,
            samples_per_step=self.samples_per_step,
        )

    def describe_machine(self) -> dict[str, Any]:
        """What a checkpoint remembers of how the steps were computed."""
        checkpointing = self.config.system.gradient_checkpointing
        return describe_runtime(self.runtime, gradient_checkpointing=checkpointing)

    @property
    def sharing(self) -> Sharing:
        """How the ranks share the model, for predictions."""
        return Sharing(self.ranks.world, self.ranks.hosts)

    @property
    def target_share(self) -> float:
        """Of the tokens of the largest micro-batch, those that are learned."""
        return 1.0

    def measure_tokens_per_byte(self, split: str) -> float:
        """Targets of a split for each byte that they spell, for bits per byte."""
        part: Split = getattr(self.data, split)
        return part.n_tokens / max(1, part.n_bytes)

    def lock_data(self) -> AbstractContextManager[Any]:
        """Readers share the data folder; a preparation that would replace it is locked out."""
        return FolderLock(self.data_dir, shared=True)

    def check_before_data(self) -> None:
        """Raise whatever can refuse the run before its data is made or replaced."""
        origin = self.origin
        self.base  # noqa: B018
        self.least_model_config  # noqa: B018
        window = self.window_length
        if origin is not None:
            self.saved  # noqa: B018
            before = window * read_samples_per_step(origin)
            check_tokens_per_step(self, before, window * self.samples_per_step)

    @part
    def runtime(self) -> Runtime:
        """Device, precision and compilation for the steps to come."""
        # The plan, and with it the data, is needed only to choose.
        chosen = choose_run_way(self)
        decided = self.given.system.compile_model is not None or chosen is not None
        n_steps = 1 if decided else max(1, self.n_steps_to_come)
        return build_runtime(self._system, n_steps, chosen, self.ranks)

    @property
    def _system(self) -> SystemSettings:
        """The flags of the machine, with the card of this rank."""
        system = self.given.system
        if self.ranks.world > 1 and torch.cuda.is_available() and system.device != "cpu":
            return dataclasses.replace(system, device=f"cuda:{self.ranks.local_rank}")
        return system

    @part
    def data_place(self) -> DataPlace:
        """Where the training tokens are kept; asked for before the model is on the device."""
        device = self.runtime.device
        return self.place_data(self.data, device.type, measure_free_bytes(device))

    def place_data(self, data: DataFolder, device_type: str, free_bytes: int) -> DataPlace:
        """Where training tokens are kept on a device with so much free memory."""
        config = self.known_config
        return choose_data_place(
            data, config.training, config.system, self.window_length, device_type, free_bytes
        )

    @property
    def n_steps_to_come(self) -> int:
        """Steps left in the plan; where there is no plan, what the flags say."""
        with contextlib.suppress(PreflightError):
            return self.plan.total_steps - self.state.step
        return self.given.training.max_steps or MIN_STEPS_TO_COMPILE

    def build_trainer(self) -> Trainer:
        """A trainer at the run's state: of a new model, or of the origin's."""
        trainer = build_trainer(
            self.model_config,
            self.config.training,
            self.plan,
            self.runtime,
            gradient_checkpointing=self.config.system.gradient_checkpointing,
            weights=self.load_base_weights(),
            ranks=self.ranks,
        )
        if self.origin is not None and self.resumes:
            own = trainer.list_weights()
            shapes = {name: tuple(w.shape) for name, w in own.items()}
            weights = load_weights(self.origin, shapes, list_rows(own))
            # Taken out, not kept: on CUDA the run would hold a second copy in the host's memory.
            optimizer, state = self.saved.pop("optimizer", {}), self.saved.pop("trainer", {})
            trainer.load_state_dict(weights, optimizer, state)
        return trainer

    def load_base_weights(self) -> dict[str, Tensor] | None:
        """What a new model begins with; none: random weights, or those of the origin."""
        if self.origin is not None or self.base is None:
            return None
        return load_base_weights(self.base)

    def open_loader(self, cursor: int = 0, batch_size: int | None = None) -> Loader:
        """The training part, read from sample `cursor` on.

        With a `batch_size` as one process reads it, else this rank's share.
        """
        training = self.known_config.training
        sizes = split_update(self.samples_per_step, training.gradient_accumulation_steps)
        return open_training_loader(
            self.data,
            dataclasses.replace(training, batch_size=batch_size or training.batch_size),
            self.window_length,
            self.runtime.device,
            on_device=self.data_place.on_device,
            cursor=cursor,
            shares=None if batch_size else Shares(sizes, self.ranks),
        )

    def list_validation(
        self, n_windows: int, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Evenly spaced windows of the validation part, the same every time: this rank's."""
        return iterate_windows(
            self.data,
            "val",
            batch_size=batch_size or self.known_config.training.batch_size,
            context_length=self.window_length,
            n_windows=n_windows,
            device=self.runtime.device,
            ranks=self.ranks,
        )
