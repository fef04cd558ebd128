"""Where a run begins: its flags, the checkpoint that it continues or starts from, its settings.

All of it is known before a text is read. See `preflight.modes.setup` for what is made of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from generate import build_empty_model
from preflight.checkpoints.adapters import read_adapter
from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device.ranks import Ranks, local_ranks
from preflight.models.lora import add_adapters
from preflight.modes.base_checkpoint import (
    check_same_base,
    describe_base,
    describe_provenance,
    find_template,
    open_base,
)
from preflight.modes.part import part
from preflight.settings import RunConfig, TrainingSettings
from preflight.tokenization import load_saved_tokenizer
from preflight.tokenization.chat_template import TEMPLATE_NAME
from preflight.training.resume import (
    adopt_settings,
    check_model_flags,
    check_tokenizer,
    find_origin,
    read_saved_settings,
)
from preflight.training.saved_state import load_saved_state
from preflight.training.sharing import (
    choose_samples_per_step,
    count_micro_steps,
    read_samples_per_step,
)


class RunSettings:
    """A run's origin and base, and the settings that follow from them and from its flags.

    Args:
        given: the flags, before a checkpoint's settings are adopted.
        stop: signals end a preparation of data.
        continues: the run would continue from a checkpoint in the output folder.
        resumes: the training state of that checkpoint is read. Otherwise the run is only
            foreseen, and where it stands is taken from the manifest.
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
        ranks: Ranks | None = None,
        measures: bool = False,
    ) -> None:
        self.given, self.stop, self.measures = given, stop, measures
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
    def saved(self) -> dict[str, Any]:
        """What the origin's ``checkpoint.pt`` holds; nothing without one."""
        return self._saved if self.origin is not None else {}

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

    def describe_extra(self) -> dict[str, Any]:
        """What ``config.json`` says besides: see `train.describe_run`."""
        base = {} if self.base_facts is None else {"base": self.base_facts}
        return base | describe_provenance(self.known_source)

    def list_extra_files(self) -> dict[str, bytes]:
        """Files that a checkpoint holds besides, by name: the chat template that came with it."""
        source = self.known_source
        template = None if source is None else find_template(source)
        return {} if template is None else {TEMPLATE_NAME: template.source.encode()}
