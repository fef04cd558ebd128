"""What a fine-tuning run is made of: a base, a chat template, and chats in place of a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from preflight.checkpoints.adapters import describe_adapter, find_base
from preflight.checkpoints.format import Checkpoint
from preflight.core.signals import StopFlag
from preflight.corpus.chats.build import prepare_chats
from preflight.corpus.chats.data import ChatData
from preflight.device.runtime import Runtime, build_runtime, choose_device
from preflight.models.cost import resolve_adapter
from preflight.modes.base_checkpoint import (
    check_same_base,
    describe_base,
    describe_provenance,
    find_template,
    load_base_weights,
    open_base,
)
from preflight.modes.choosing_way import find_kept_way
from preflight.modes.part import part
from preflight.modes.setup import RunSetup
from preflight.settings import ControlSettings, RunConfig, TrainingSettings
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_NAME,
    ChatTemplate,
    load_chat_template,
)
from preflight.training.merging import keep_base
from preflight.training.resume import adopt_finetuning
from train_utils import measure_target_share

CHATS_NAME = "chats"  # the folder of the prepared chats, in the output folder
EVALUATIONS_PER_EPOCH = 5


def build_setup(given: RunConfig, stop: StopFlag, **choices: Any) -> RunSetup:
    """The parts of a run: of a fine-tuning where the flags name chats."""
    kind = FinetuneSetup if given.finetuning.finetune else RunSetup
    return kind(given, stop, **choices)


class FinetuneSetup(RunSetup):
    """`RunSetup` of a run that begins from a trained model and learns from chats.

    It continues from a checkpoint of its own as every run does. Then the base is asked for only by
    adapters, and it is the one that the run began from.
    """

    @property
    def data_dir(self) -> Path:
        """The folder of the prepared chats."""
        return self.output_dir / CHATS_NAME

    @part
    def named_base(self) -> Checkpoint:
        """The checkpoint that `--from` names, or the best of the default run.

        Raises:
            PreflightError: code CHECKPOINT, when there is none; code FLAGS, when the run would
                write beside its checkpoints.
        """
        named = self.given.finetuning.from_checkpoint
        return open_base(named, self.output_dir, "--from", self.ranks.present)

    def resolve_training(self, config: RunConfig) -> TrainingSettings:
        """The training flags; adapters only for layers that the model has."""
        training = super().resolve_training(config)
        if training.adapter is None:
            return training
        model = (self.origin or self.named_base).model_config
        return dataclasses.replace(training, adapter=resolve_adapter(model, training.adapter))

    @part
    def base(self) -> Checkpoint:
        """The checkpoint whose weights the run begins with.

        Raises:
            PreflightError: code CHECKPOINT, when there is none, or it is not the one that the run
                began from.
        """
        origin = self.known_origin
        if origin is None:
            return self.named_base
        if self.given.finetuning.from_checkpoint is not None:
            began = origin.config["finetuning"]["base"]
            check_same_base(self.named_base, began, origin, "--from")
        return find_base(origin) if self.config.training.adapter else origin

    @property
    def known_source(self) -> Checkpoint:
        """The checkpoint that says what the model is: the origin's, else the base's."""
        return self.known_origin or self.base

    def adopt(self, origin: Checkpoint) -> RunConfig:
        """The flags, with the settings of a checkpoint where no flag says otherwise."""
        return adopt_finetuning(super().adopt(origin), origin)

    @part
    def template(self) -> ChatTemplate:
        """The chat template: of the flag, else the checkpoint's, else the default one."""
        named = self.given.finetuning.chat_template
        if named is not None:
            return load_chat_template(named)
        return find_template(self.known_source) or DEFAULT_TEMPLATE

    @part
    def encoder(self) -> ChatEncoder:
        """What turns chats into ids and masks."""
        return ChatEncoder(
            self.tokenizer,
            self.template,
            self.window_length,
            learn_from=self.known_config.finetuning.learn_from,
        )

    @part
    def data(self) -> ChatData:
        """The chats, prepared where they are not yet, and verified."""
        return prepare_chats(
            self.given.finetuning.finetune,
            self.encoder,
            self.data_dir,
            val_split=self.given.data.val_split,
            stop=self.stop,
        )

    @property
    def control(self) -> ControlSettings:
        """As of any run; evaluated every fifth of an epoch where no flag says otherwise."""
        control = super().control
        if control.eval_every is not None:
            return control
        every = self.data.n_rows / self.samples_per_step / EVALUATIONS_PER_EPOCH
        return dataclasses.replace(control, eval_every=max(1, math.ceil(every)))

    @property
    def target_share(self) -> float:
        """Of the tokens of the largest micro-batch, those that are learned."""
        return measure_target_share(self.data, self.known_config.training)

    @part
    def runtime(self) -> Runtime:
        """Device and precision; a run that continues keeps its own.

        Nothing is compiled unasked: every length would be anew.
        """
        system, kept = self._system, None
        if self.known_origin is not None:
            saved = self.known_origin.config.get("runtime")
            kept = find_kept_way(saved, choose_device(system.device))
        return build_runtime(system, planned_steps=1, chosen=kept, ranks=self.ranks)

    def check_before_data(self) -> None:
        """Raise whatever can refuse the run before its chats are read."""
        self.base  # noqa: B018
        self.model_config  # noqa: B018
        self.encoder  # noqa: B018
        if self.origin is not None:
            self.saved  # noqa: B018

    def measure_tokens_per_byte(self, split: str) -> float:
        """Targets of a split for each byte that they spell."""
        return self.data.measure_tokens_per_byte(split)

    def load_base_weights(self) -> dict[str, Tensor] | None:
        """The base's weights; a full run that resumes has its own."""
        if self.origin is not None and self.config.training.adapter is None:
            return None
        return load_base_weights(self.base)

    @part
    def kept_base(self) -> Checkpoint | None:
        """The base as it is kept beside the adapters, which are nothing without it."""
        if self.config.training.adapter is None:
            return None
        if self.origin:
            return self.base
        return self.ranks.decide(lambda: keep_base(self.base, self.output_dir))

    @part
    def base_facts(self) -> dict[str, Any]:
        """From where the run began, as its checkpoints say it."""
        if self.origin is not None:
            return dict(self.origin.config["finetuning"]["base"])
        return describe_base(self.base)

    @property
    def bits_before(self) -> float | None:
        """Bits per byte of the base on its own text, where they were measured."""
        return self.base_facts.get("text_bits_per_byte")

    def describe_extra(self) -> dict[str, Any]:
        """How the run learns, and from where it began."""
        finetuning, adapter = self.config.finetuning, self.config.training.adapter
        sections: dict[str, Any] = {}
        if adapter is not None and self.kept_base is not None:
            sections["adapter"] = describe_adapter(adapter, self.kept_base)
        return (
            sections
            | describe_provenance(self.known_source)
            | {
                "finetuning": {
                    "learn_from": finetuning.learn_from,
                    "lora_rank": finetuning.lora_rank,
                    "lora_alpha": finetuning.lora_alpha,
                    "lora_targets": list(finetuning.lora_targets),
                    "template": self.template.name,
                    "base": self.base_facts,
                }
            }
        )

    def list_extra_files(self) -> dict[str, bytes]:
        """The chat template, so that whoever talks to the model uses the one that it learned."""
        return {TEMPLATE_NAME: self.template.source.encode()}
