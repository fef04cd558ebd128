"""What a run continues from: its checkpoint, the settings it keeps, and those it may not change."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from preflight.checkpoints import store
from preflight.checkpoints.adapters import read_adapter
from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import CONFIG_NAME
from preflight.checkpoints.ranks import ONE_RANK, Ranks, do_together
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.models.cost import count_adapter_parameters, count_parameters
from preflight.settings import (
    CUSTOM_SIZE_FIELDS,
    PART_NAMES,
    ModelConfig,
    RunConfig,
    TrainingSettings,
    build_config,
)
from preflight.settings.options import list_options
from preflight.tokenization import Tokenizer, is_choice

# What the order of the samples depends on, and what a checkpoint without them was trained with.
ORDER_DEFAULTS = {"window": None, "overlap": 0.0}
_FINETUNING_SETTINGS = ("learn_from", "lora_rank", "lora_alpha", "lora_targets")
LENGTH_FLAGS = {"max_steps", "num_epochs"}  # giving one of them replaces both


def find_origin(
    config: RunConfig,
    output_dir: Path,
    check: store.Check | None = None,
    ranks: Ranks = ONE_RANK,
) -> Checkpoint | None:
    """The checkpoint to continue from: the one that --resume-from names, else the newest, if any.

    `check` raises PreflightError for one that verifies and yet cannot be used: then an older one
    takes its place, unless it is named. All `ranks` call this, and share the hashing.

    Raises:
        PreflightError: code FLAGS, when the output folder holds newer checkpoints than the named
            one, or a run that --no-auto-resume forbids to continue; code CHECKPOINT, when the
            checkpoint is damaged.
    """
    if config.control.resume_from:
        origin = store.open_checkpoint(config.control.resume_from, ranks)
        newer = [c for c in store.list_checkpoints(output_dir) if c.step > origin.step]
        if newer:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--resume-from {config.control.resume_from} is at step {origin.step:,}, but "
                f"{output_dir} holds step {newer[0].step:,}",
                "choose another --output-dir, so that neither run loses its checkpoints",
            )
        if check is not None:
            do_together(ranks, functools.partial(check, origin))
        return origin
    newest = store.find_newest(output_dir, check, ranks)
    if newest is not None and not config.control.auto_resume:
        raise PreflightError(
            ExitCode.FLAGS,
            f"{output_dir} holds a run at step {newest.step:,}",
            "leave out --no-auto-resume to continue it, or choose another --output-dir",
        )
    return newest


def adopt_settings(config: RunConfig, origin: Checkpoint) -> RunConfig:
    """`config` with the checkpoint's settings where no flag is given. Changed ones are logged.

    Raises:
        PreflightError: code CHECKPOINT, for a flag that cannot change within a run.
    """
    check_model_flags(config, origin)
    saved = ORDER_DEFAULTS | read_saved_settings(origin)
    longer = LENGTH_FLAGS & set(config.sources)
    values: dict[str, Any] = {}
    for name, before in saved.items():
        asked = getattr(config.training, name)
        explicit = name in config.sources or (longer and name in LENGTH_FLAGS)
        if name == "window":  # unset means the context length
            context = origin.model_config.context_length
            asked, before = asked or context, before or context
        if not explicit:
            values[name] = saved[name]
        elif asked != before and name in ("seed", "optimizer", *ORDER_DEFAULTS):
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"{origin.path}: --{name} was {before}, now {asked}; it cannot change within a run",
                "leave the flag out, or start a new run in another --output-dir",
            )
        elif asked != before:
            log.info(f"changed since the checkpoint: {name} {before} -> {asked}")
    training = dataclasses.replace(config.training, **values)
    model = dataclasses.replace(config.model, tokenizer=origin.config["tokenizer"]["name"])
    sources = dict.fromkeys(values, "the checkpoint") | config.sources
    return dataclasses.replace(config, training=training, model=model, sources=sources)


def adopt_finetuning(config: RunConfig, origin: Checkpoint) -> RunConfig:
    """`config` with what the checkpoint's run learns from, and which of its weights learn.

    Raises:
        PreflightError: code CHECKPOINT, for a flag that says otherwise, or a checkpoint that does
            not come from a fine-tuning.
    """
    saved = origin.config.get("finetuning")
    if not isinstance(saved, dict):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path} does not come from --finetune: it cannot continue as one",
            "choose another --output-dir, and name it with --from",
        )
    names = [name for name in _FINETUNING_SETTINGS if name in saved]
    before = _read_as_flags(origin, {name: saved[name] for name in names}).finetuning
    for name in names:
        was, asked = getattr(before, name), getattr(config.finetuning, name)
        if name in config.sources and asked != was:
            flag = name.replace("_", "-")
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"{origin.path}: --{flag} was {was}, now {asked}; it cannot change within a run",
                "leave the flag out, or start a new run in another --output-dir",
            )
    values = {name: getattr(before, name) for name in names}
    sources = dict.fromkeys(names, "the checkpoint") | config.sources
    finetuning = dataclasses.replace(config.finetuning, **values)
    return dataclasses.replace(config, finetuning=finetuning, sources=sources)


def read_saved_settings(origin: Checkpoint) -> dict[str, Any]:
    """The training settings in a checkpoint, validated as flags are."""
    saved = origin.config.get("training", {})
    if not isinstance(saved, dict):
        raise damage_error(origin.path / CONFIG_NAME, "the training section is not an object")
    names = [o.name for o in list_options("training", TrainingSettings) if o.name in saved]
    training = _read_as_flags(origin, {name: saved[name] for name in names}).training
    return {name: getattr(training, name) for name in names}


def _read_as_flags(origin: Checkpoint, values: dict[str, Any]) -> RunConfig:
    """Values of ``config.json``, within the limits of the flags of their names."""
    try:
        return build_config(values, {})
    except PreflightError as error:
        raise damage_error(origin.path / CONFIG_NAME, error.lines[0]) from None


def check_model(origin: Checkpoint) -> None:
    """Refuse a model that no flags describe or the weights file cannot hold, before it is built.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    values = dataclasses.asdict(origin.model_config)
    _read_as_flags(origin, values | {"model_size": "custom"})
    parameters = _count_held_parameters(origin)
    name = origin.manifest.weights_name
    held_bytes = origin.manifest.files[name].bytes
    if 2 * parameters > held_bytes:  # no type of weights is smaller than two bytes
        raise damage_error(
            origin.path / CONFIG_NAME,
            f"describes {parameters:,} parameters, and {name} has {held_bytes:,} bytes",
        )


def _count_held_parameters(origin: Checkpoint) -> int:
    """Those that its weights file must hold: all, or its adapters'."""
    adapter = read_adapter(origin)
    if adapter is None:
        return count_parameters(origin.model_config)
    try:
        return count_adapter_parameters(origin.model_config, adapter)
    except PreflightError as error:  # there it is a flag's fault, here the checkpoint says so
        raise damage_error(origin.path / CONFIG_NAME, *error.lines[:2]) from None


def resolve_model(
    config: RunConfig, tokenizer: Tokenizer, origin: Checkpoint | None
) -> ModelConfig:
    """The architecture: the checkpoint's if there is one, else that of the flags.

    Raises:
        PreflightError: code CHECKPOINT, when the tokenizer is not the checkpoint's; code FLAGS,
            when --vocab-size is smaller than the tokenizer's vocabulary.
    """
    if origin is None:
        if config.model.vocab_size and config.model.vocab_size < tokenizer.vocab_size:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--vocab-size {config.model.vocab_size} is smaller than the "
                f"{tokenizer.vocab_size:,} ids of {tokenizer.name}; raise it or leave it out",
            )
        return config.model.resolve(tokenizer.vocab_size)
    check_tokenizer(origin, tokenizer)
    # Dropout changes no shape, so that a flag may change it.
    saved = origin.model_config
    dropout = config.model.dropout if "dropout" in config.sources else saved.dropout
    return dataclasses.replace(saved, dropout=dropout)


def check_tokenizer(origin: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the one of the checkpoint.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    expected = origin.config["tokenizer"]["fingerprint"]
    if expected != tokenizer.fingerprint:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path} was trained with another vocabulary than that of {tokenizer.name}",
            f"fingerprint in the checkpoint: {expected[:64]}",
            f"fingerprint of {tokenizer.name} here: {tokenizer.fingerprint}",
        )
    n_rows = origin.model_config.vocab_size
    if n_rows < tokenizer.vocab_size:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path}: {n_rows:,} embeddings are too few for the "
            f"{tokenizer.vocab_size:,} ids of {tokenizer.name}",
        )


def check_model_flags(config: RunConfig, origin: Checkpoint) -> None:
    """Refuse model flags that differ from the checkpoint.

    Raises:
        PreflightError: code CHECKPOINT, with both values of each flag.
    """
    saved = origin.model_config
    names = {f.name for f in dataclasses.fields(ModelConfig)} - {"dropout"}
    given = names & set(config.sources)
    # What no flag says is as it was; a family that is another one brings its own parts.
    parts = ("activation", *PART_NAMES)
    if config.model.model_family != saved.model_family and "model_family" in given:
        given |= set(parts)
    kept = {name: getattr(saved, name) for name in parts if name not in given}
    # Not as a `ModelConfig`: flags of another model need not fit the parts of this one.
    asked = dataclasses.replace(config.model, **kept).choose_values(saved.vocab_size)
    if "model_size" in config.sources:
        given |= {"ffn_hid_dim", *CUSTOM_SIZE_FIELDS}
    different = [
        f"{name}: checkpoint {getattr(saved, name)}, flags {asked[name]}"
        for name in sorted(given)
        if asked[name] != getattr(saved, name)
    ]
    tokenizer = origin.config["tokenizer"]["name"]
    facts = origin.config["tokenizer"]
    if "tokenizer" in config.sources and not is_choice(config.model.tokenizer, facts):
        different.append(f"tokenizer: checkpoint {tokenizer}, flags {config.model.tokenizer}")
    if different:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path} holds another model than the flags describe",
            "; ".join(different),
            "leave these flags out, or choose another --output-dir",
        )
