"""What a run is made of, assembled once for every mode.

Each part of `RunSetup` is made when it is first asked for. A part that cannot be made raises the
same `PreflightError` every time, so that a report can continue with the parts that do not need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from generate import build_empty_model, load_model
from preflight.checkpoints.adapters import read_adapter
from preflight.checkpoints.format import Checkpoint, load_weights
from preflight.checkpoints.rows import list_rows
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core.commands import join_words
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.corpus.build import prepare_data
from preflight.corpus.shards import DataFolder, Split
from preflight.corpus.windows import choose_window, count_run_windows
from preflight.device.ranks import Ranks, local_ranks
from preflight.device.runtime import MIN_STEPS_TO_COMPILE, Runtime, build_runtime
from preflight.device.token_store import DataPlace, measure_free_bytes
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.fits import check_memory
from preflight.foresight.memory import MemoryOptions
from preflight.models.base import TokenModel
from preflight.models.lora import add_adapters
from preflight.models.loss import Targets
from preflight.modes.base_checkpoint import (
    check_same_base,
    describe_base,
    describe_provenance,
    find_template,
    load_base_weights,
    open_base,
    refuse_other_ids,
)
from preflight.modes.choosing_way import choose_run_way
from preflight.settings import (
    ControlSettings,
    ModelConfig,
    RunConfig,
    SystemSettings,
    TrainingSettings,
)
from preflight.tokenization import (
    Tokenizer,
    TokenizerChoice,
    TokenizerRecipe,
    choose_tokenizer,
    load_saved_tokenizer,
)
from preflight.tokenization.chat_template import TEMPLATE_NAME
from preflight.training.changes import describe_changes, describe_runtime, describe_schedule
from preflight.training.plan import TrainingPlan, build_plan
from preflight.training.resume import (
    adopt_settings,
    check_model_flags,
    check_tokenizer,
    find_origin,
    read_saved_settings,
    resolve_model,
)
from preflight.training.saved_state import load_saved_state
from preflight.training.sharing import (
    choose_samples_per_step,
    count_micro_steps,
    read_samples_per_step,
)
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

T = TypeVar("T")


class part(Generic[T]):
    """A part of a set-up: made at its first use and kept, and so is its `PreflightError`."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, setup: Any, owner: type | None = None) -> T:
        made = setup.__dict__.setdefault("_parts", {})
        if self._name not in made:
            try:
                made[self._name] = self._make(setup)
            except PreflightError as error:
                made[self._name] = error
        if isinstance(made[self._name], PreflightError):
            raise made[self._name]
        return made[self._name]


class RunSetup:
    """One run's parts: origin, settings, tokenizer, model, data, state, plan, runtime.

    Args:
        given: the flags, before a checkpoint's settings are adopted.
        stop: signals end a preparation of data.
        continues: the run would continue from a checkpoint in the output folder.
        resumes: the training state of that checkpoint is read. Otherwise the run is only
            foreseen, and where it stands is taken from the manifest.
        trains: training steps will run. Otherwise nothing is compiled.
        ranks: the processes of the run; unset: one.
        measures: a short trial may choose precision and compilation. Otherwise they are those of
            an earlier trial, or a rule's.
    """

    def __init__(
        self,
        given: RunConfig,
        stop: StopFlag,
        *,
        continues: bool = True,
        resumes: bool = False,
        trains: bool = True,
        ranks: Ranks | None = None,
        measures: bool = False,
    ) -> None:
        self.given, self.stop, self.trains, self.measures = given, stop, trains, measures
        self.continues, self.resumes = continues, resumes
        self.ranks = ranks or local_ranks()
        self.output_dir = Path(given.control.output_dir)

    @property
    def data_dir(self) -> Path:
        """The folder of the run's data."""
        return Path(self.given.data.data_dir)

    @part
    def origin(self) -> Checkpoint | None:
        """The checkpoint that `--train` continues from, if any: the newest that can be used."""
        if not self.continues:
            return None
        check = self._check_origin
        return find_origin(self.given, self.output_dir, check, self.ranks.present)

    def _check_origin(self, origin: Checkpoint) -> None:
        """Refuse a checkpoint that a run cannot continue from, and keep the state of another."""
        settings = read_saved_settings(origin)
        model = build_empty_model(origin)
        adapter = read_adapter(origin)
        if adapter is not None:
            add_adapters(model, adapter)
        if self.resumes:
            if "kind" in (facts := origin.config["tokenizer"]):  # format v1 has no files of it
                check_tokenizer(origin, load_saved_tokenizer(origin.path, facts))
            training = dataclasses.replace(self.given.training, **settings)
            samples = read_samples_per_step(origin)
            self._saved = load_saved_state(origin, model, training, samples, self.ranks.shard_place)
            if self.ranks.present is not self.ranks:
                del self._saved["optimizer"]  # the ranks to come read it themselves

    @part
    def base(self) -> Checkpoint | None:
        """The checkpoint whose weights a new run begins with: that of `--init-from`, if any.

        Raises:
            PreflightError: code CHECKPOINT, when there is none, when flags describe another model,
                or when a run that continues began from another one; code FLAGS.
        """
        flag, named = "--init-from", self.given.control.init_from
        if named is None:
            return None
        base = open_base(named, self.output_dir, flag, self.ranks.present)
        check_model_flags(self.given, base)
        origin = self.known_origin
        if origin is not None:
            check_same_base(base, origin.config.get("base"), origin, flag)
        return base

    @property
    def known_source(self) -> Checkpoint | None:
        """The checkpoint that says what the model is: the origin, else the base, if any."""
        return self.known_origin or self.base

    @part
    def base_facts(self) -> dict[str, Any] | None:
        """From where the run began, as its checkpoints say it; none: random weights."""
        if self.origin is not None:
            found = self.origin.config.get("base")
            return found if isinstance(found, dict) else None
        return None if self.base is None else describe_base(self.base)

    @part
    def adopted(self) -> RunConfig:
        """The flags, with the origin's settings where no flag says otherwise."""
        return self.adopt(self.origin) if self.origin else self.given

    def adopt(self, origin: Checkpoint) -> RunConfig:
        """The flags, with the settings of a checkpoint where no flag says otherwise."""
        return adopt_settings(self.given, origin)

    @part
    def config(self) -> RunConfig:
        """`adopted`, with what unset training flags stand for."""
        training = self.resolve_training(self.adopted)
        n_micro_steps = count_micro_steps(self.samples_per_step, training, self.ranks.world)
        training = dataclasses.replace(training, gradient_accumulation_steps=n_micro_steps)
        return dataclasses.replace(self.adopted, training=training)

    @part
    def samples_per_step(self) -> int:
        """Samples of an update, over all ranks.

        Raises:
            PreflightError: code FLAGS, for more ranks than samples.
        """
        adopted, origin = self.known_adopted, None
        with contextlib.suppress(PreflightError):
            origin = self.origin if self.adopted else None
        return choose_samples_per_step(adopted, origin, self.ranks.world)

    def resolve_training(self, config: RunConfig) -> TrainingSettings:
        """The training flags, with what unset ones stand for in this run."""
        return config.resolve_training()

    @property
    def known_config(self) -> RunConfig:
        """`config`, or the flags as given where the origin is refused."""
        with contextlib.suppress(PreflightError):
            return self.config
        known = self.known_adopted
        return dataclasses.replace(known, training=known.resolve_training())

    @property
    def known_adopted(self) -> RunConfig:
        """`adopted`, or the flags as given where the origin is refused."""
        with contextlib.suppress(PreflightError):
            return self.adopted
        return self.given

    @property
    def known_origin(self) -> Checkpoint | None:
        """`origin`, or none where it or its settings are refused."""
        with contextlib.suppress(PreflightError):
            return self.origin if self.config else None
        return None

    @part
    def tokenizer_choice(self) -> TokenizerChoice:
        """The tokenizer inside the checkpoint that the run continues or begins from.

        Else that of the flags, which may need the text first.
        """
        if self.known_source is not None:
            return self.load_tokenizer_of(self.known_source)
        return choose_tokenizer(self.known_config.model)

    @staticmethod
    def load_tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer inside a checkpoint."""
        return load_saved_tokenizer(checkpoint.path, checkpoint.config["tokenizer"])

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
    def window_length(self) -> int:
        """Tokens of a window: `--window`, or the context length.

        Raises:
            PreflightError: code FLAGS, when `--window` is longer than the context.
        """
        window, context = self.known_config.training.window, self.context_length
        if window is not None and window > context:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--window {window}: the model's context is {context:,} tokens",
                "give a shorter --window, or leave it out; a new model may have a longer "
                "--context-length",
            )
        return window or context

    @part
    def context_length(self) -> int:
        """Tokens of the model's context, known even where the rest of the model is refused."""
        if self.known_source is not None:
            return self.known_source.model_config.context_length
        own = dataclasses.replace(self.known_config.model, vocab_size=None)
        return own.resolve(vocab_size=2).context_length

    @part
    def data(self) -> DataFolder:
        """The data folder, prepared where it is not yet, and verified."""
        if self.known_origin is None and self.base is not None:
            refuse_other_ids(self.base, self.tokenizer_choice, self.known_config.data)
        return prepare_data(
            self.known_config.data,
            self.tokenizer_choice,
            self.stop,
            may_replace=self._check_replacement,
        )

    def _check_replacement(
        self, reason: str, old_fingerprint: str | None, built: DataFolder | None
    ) -> None:
        """Keep a data folder from being replaced for a run that is refused afterwards.

        See `preflight.corpus.build.MayReplace`.
        """
        if built is not None and self.resumes:
            window = choose_window(built.train.n_tokens, self.window_length)
            model = resolve_model(self.known_config, built.load_tokenizer(), self.known_source)
            runtime = build_runtime(self.given.system)
            device = runtime.device
            place = self.place_data(built, device.type, measure_free_bytes(device))
            self.check_memory(runtime, window, model, place.n_bytes)
        origin, flags = self.known_origin, self.given
        if origin is None or flags.control.resume_from:
            return
        trained_on = (origin.config.get("data") or {}).get("fingerprint")
        if trained_on is None or trained_on == (built and built.fingerprint):
            return
        if built is None and trained_on != old_fingerprint:
            return  # the old one is of another run; the new one may be this run's
        raise PreflightError(
            ExitCode.DATA,
            f"{flags.data.data_dir} would be rebuilt because {reason}, and the result is not what "
            f"{origin.path} was trained on",
            "nothing was changed; restore the text, or leave out --text-file, to continue exactly",
            "to train a new model on the new text: another --data-dir and --output-dir",
            f"to continue on the new text: {join_words('--resume-from', origin.path)}",
        )

    @part
    def saved(self) -> dict[str, Any]:
        """What the origin's ``checkpoint.pt`` holds; nothing without one."""
        return self._saved if self.origin is not None else {}

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
        return _restore_state(self, origin)

    @part
    def plan(self) -> TrainingPlan:
        """The run in numbers.

        Raises:
            PreflightError: code CHECKPOINT, when the tokens per step are not the origin's and
                `--allow-batch-change` is not given.
        """
        plan = self._build_plan(self.known_config.training)
        if self.resumes:
            before = self.saved.get("tokens_per_step", plan.tokens_per_step)
            _check_tokens_per_step(self, before, plan.tokens_per_step)
            if before != plan.tokens_per_step:
                log.info(f"tokens per step change from {before:,} to {plan.tokens_per_step:,}")
        return plan

    def _build_plan(self, training: TrainingSettings) -> TrainingPlan:
        return self.build_plan_of(training, self.known_config.control)

    def build_plan_of(self, training: TrainingSettings, control: ControlSettings) -> TrainingPlan:
        """The plan with these settings, on the run's data and from where it stands."""
        windows = count_run_windows(self.data, training, self.window_length)
        return build_plan(
            training,
            control,
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

    def describe_changes(self) -> list[str]:
        """What this run does otherwise than the one before it, besides the settings."""
        if self.origin is None or not self.state.step:
            return []
        lines = describe_changes(self.origin.config.get("runtime"), self.describe_machine())
        dropouts = [{"dropout": m.dropout} for m in (self.origin.model_config, self.model_config)]
        lines += describe_changes(*dropouts)
        before = dataclasses.replace(self.config.training, **read_saved_settings(self.origin))
        schedule = describe_schedule(self.state.step, self._build_plan(before), self.plan)
        return [*lines, *([schedule] if schedule else [])]

    def check_memory(
        self,
        runtime: Runtime,
        window_tokens: int,
        model: ModelConfig | None = None,
        data_bytes: int | None = None,
    ) -> None:
        """Refuse a run that cannot fit: see `fits.check_memory`."""
        check_memory(**self.describe_memory(runtime, window_tokens, model, data_bytes))

    def describe_memory(
        self,
        runtime: Runtime,
        window_tokens: int,
        model: ModelConfig | None = None,
        data_bytes: int | None = None,
    ) -> dict[str, Any]:
        """What the functions of `fits` need to know of the run.

        Args:
            runtime: of the run.
            window_tokens: tokens of a training window.
            model: the architecture, where the data is not made yet.
            data_bytes: of `data_place`, where the data is not made yet.
        """
        options = MemoryOptions.of(
            runtime,
            self.config.system.gradient_checkpointing,
            window_tokens,
            self.data_place.n_bytes if data_bytes is None else data_bytes,
            self.target_share,
            self.sharing,
        )
        return {
            "model_config": model or self.model_config,
            "training": self.config.training,
            "runtime": runtime,
            "options": options,
            "last_checkpoint": self.origin.path if self.origin else "none yet",
        }

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

    def describe_extra(self) -> dict[str, Any]:
        """What ``config.json`` says besides: see `train.describe_run`."""
        base = {} if self.base_facts is None else {"base": self.base_facts}
        return base | describe_provenance(self.known_source)

    def list_extra_files(self) -> dict[str, bytes]:
        """Files that a checkpoint holds besides, by name: the chat template that came with it."""
        source = self.known_source
        template = None if source is None else find_template(source)
        return {} if template is None else {TEMPLATE_NAME: template.source.encode()}

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
            _check_tokens_per_step(self, before, window * self.samples_per_step)

    @part
    def runtime(self) -> Runtime:
        """Device, precision and compilation for the steps to come."""
        if not self.trains:
            return build_runtime(self._system)
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

    @part
    def checkpoint(self) -> Checkpoint:
        """The checkpoint to generate with: the one that is named, else the best."""
        path = self.given.generation.checkpoint_path
        return open_checkpoint(path) if path else find_best(self.output_dir)

    def load_model(self) -> tuple[TokenModel, Tokenizer]:
        """The model of `checkpoint`, ready to generate, and its tokenizer.

        Raises:
            PreflightError: code CHECKPOINT, when it is damaged, or not the model that flags name.
        """
        try:
            loaded = load_model(self.checkpoint, self.runtime.device, self.runtime.dtype)
        except PreflightError:
            if os.path.lexists(self.checkpoint.path):
                raise
            del self.__dict__["_parts"]["checkpoint"]  # a run has just deleted it: look again
            return self.load_model()
        check_model_flags(self.given, self.checkpoint)
        model, tokenizer = loaded
        replaces = self.given.generation.replace_unknown
        return model, tokenizer.replacing_unknown() if replaces else tokenizer

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


def _restore_state(setup: RunSetup, origin: Checkpoint) -> TrainState:
    """Where the origin's run stood; at the beginning of its data, where that is new."""
    state = TrainState.restore(setup.saved["state"])
    fingerprint = setup.saved["data_fingerprint"]
    if fingerprint == setup.data.fingerprint:
        return state
    if not setup.given.control.resume_from:
        raise PreflightError(
            ExitCode.DATA,
            f"{setup.given.data.data_dir} is not the data that {origin.path} was trained on "
            f"(fingerprint {fingerprint[:12]}, now {setup.data.fingerprint[:12]})",
            "start anew with another --output-dir, or continue on the new data: "
            + join_words("--resume-from", origin.path),
        )
    log.info("the data is new to this checkpoint: training starts at its beginning")
    return dataclasses.replace(
        state, cursor=0, eval_windows=0, best_val_loss=None, stale_evaluations=0
    )


def _check_tokens_per_step(setup: RunSetup, before: int, now: int) -> None:
    """Refuse another number of tokens per step than the origin's, unless flags allow it."""
    if before != now and not setup.given.control.allow_batch_change:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"the checkpoint has {before:,} tokens per step, this run would have {now:,}",
            "keep --batch-size x --gradient-accumulation-steps, or give --allow-batch-change",
        )
