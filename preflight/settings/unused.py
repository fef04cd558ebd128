"""Which flags a call does not use: those of other modes, and those that another flag makes idle."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

from preflight.settings.finetuning import FINETUNING_MODES
from preflight.settings.options import Option
from preflight.settings.run import RunConfig, build_options

# What each mode uses: groups of flags, and single flags of other groups. A run's own flags apply to
# every mode that foresees or tries that run. A mode without a row uses all.
_OF_A_RUN = ("model", "training", "data", "control", "system")
_OF_A_FINETUNING = (
    *("finetuning", "ranks", "training", "control", "system"),
    *("dropout", "val_split", "data_dir", "log_level", "config"),
)
_OF_A_TOKENIZER = ("tokenizer", "checkpoint_path", "output_dir", "data_dir", "log_level", "config")
# Modes that may stand beside another, which is then foreseen, tried or described, not done.
PAIRED_MODES = {"finetune": FINETUNING_MODES, "serve": ("check",), "compare": ("report",)}
MODE_FLAGS: dict[str, tuple[str, ...]] = {
    "check": (*_OF_A_RUN, "processes", "finetuning", "check", "serving"),
    "validate-only": (*_OF_A_RUN, "json"),
    "train": (*_OF_A_RUN, "ranks"),
    "finetune": _OF_A_FINETUNING,
    "prepare": ("model", "data", "seed", "output_dir", "log_level", "config", "json"),
    "get-optimal-bs": (
        *(*_OF_A_RUN, "processes", "finetuning", "search", "json"),
        *("target_gpu", "gpu_memory"),
    ),
    "find-lr": (*_OF_A_RUN, "find_lr_steps", "find_lr_min", "find_lr_max", "json"),
    "sweep": (*_OF_A_RUN, "sweep", "sweep_steps", "json"),
    "forecast": (*_OF_A_RUN, "json", "price_per_hour"),
    "generate": (
        *("model", "sampling", "generation", "chat_template", "quantize"),
        *("seed", "output_dir", "device", "mixed_precision", "log_level", "config"),
        *("data_dir", "text_file"),  # no output may replace them
    ),
    "evaluate": (
        *("evaluation", "checkpoint_path", "replace_unknown", "output_dir", "data_dir"),
        "quantize",
        *("text_file", "device", "mixed_precision", "log_level", "config", "json"),
    ),
    "serve": (
        *("serving", "chat_template", "temperature", "top_k", "top_p", "min_p"),
        *("device", "mixed_precision", "log_level", "config", "quantize", "data_dir"),
    ),
    "report": ("report", "compare", "output_dir", "data_dir", "log_level", "config"),
    "compare": (
        *("comparison", "sampling", "prompts", "prompts_file", "num_return_sequences"),
        *("tasks", "tasks_dir", "evaluation_batch_tokens"),  # for --with-evaluation
        *("output_file", "overwrite", "replace_unknown", "interactive"),
        *("seed", "output_dir", "device", "mixed_precision", "log_level", "config"),
        *("data_dir", "text_file"),  # no output may replace them; for --with-evaluation
    ),
    "import": ("import_path", "output_dir", "log_level", "config"),
    "export": (
        *("export", "quantize", "weights_only", "force", "checkpoint_path"),
        *("output_dir", "data_dir", "log_level", "config"),
    ),
    "tokenize": ("tokenize", "replace_unknown", *_OF_A_TOKENIZER),
    "detokenize": ("detokenize", *_OF_A_TOKENIZER),
}


def is_used(option: Option, mode: str) -> bool:
    """Whether a mode uses the flag at all."""
    row = MODE_FLAGS.get(mode)
    return row is None or option.group in row or option.name in row


@dataclass(frozen=True)
class IdleFlags:
    """Flags that say nothing in some calls, and why."""

    names: tuple[str, ...]
    why: str
    applies: Callable[[RunConfig], bool]
    modes: tuple[str, ...] = tuple(MODE_FLAGS)


def _has_no_text(config: RunConfig) -> bool:
    return not config.data.has_text


def _reuses_data(config: RunConfig) -> bool:
    """Whether the data folder is taken as it is: there is no text to make another from."""
    return _has_no_text(config) and os.path.exists(
        os.path.join(config.data.data_dir, "metadata.json")
    )


def _is_for_absent_gpu(config: RunConfig) -> bool:
    return config.check.target_gpu is not None or config.check.gpu_memory is not None


def _learns_from_text(config: RunConfig) -> bool:
    return not config.finetuning.finetune


def _is_of_a_run(config: RunConfig) -> bool:
    return not config.serving.serve


# What foreseeing a server has no use for.
_OF_A_TRAINING = tuple(
    option.name
    for option in build_options().values()
    if option.group in (*_OF_A_RUN, "processes", "finetuning", "check")
    and option.name not in (*MODE_FLAGS["serve"], "json")
)
# What `--finetune` takes from the checkpoint or does not have.
_OF_A_NEW_MODEL = tuple(
    option.name
    for option in build_options().values()
    if option.group in ("model", "data") and option.name not in _OF_A_FINETUNING
)
IDLE_FLAGS = (
    IdleFlags(
        ("host", "port", "serve_rows", "api_key_file", "cors_origin"),
        "no --serve is given",
        _is_of_a_run,
        ("check",),
    ),
    IdleFlags(
        _OF_A_TRAINING,
        "--serve takes checkpoints as they are",
        lambda config: not _is_of_a_run(config),
        ("check",),
    ),
    IdleFlags(
        (
            *("from_checkpoint", "chat_template", "learn_from"),
            *("lora_rank", "lora_alpha", "lora_targets"),
        ),
        "no --finetune is given",
        lambda config: _learns_from_text(config) and _is_of_a_run(config),
        FINETUNING_MODES,
    ),
    IdleFlags(
        _OF_A_NEW_MODEL,
        "--finetune takes the model from the checkpoint, and its data from the chats",
        lambda config: not _learns_from_text(config),
        FINETUNING_MODES,
    ),
    IdleFlags(("overlap",), "chats do not overlap", lambda config: True, ("finetune",)),
    IdleFlags(
        ("init_from",),
        "--finetune begins with the checkpoint that --from names",
        lambda config: not _learns_from_text(config),
        ("finetune", *FINETUNING_MODES),
    ),
    IdleFlags(
        ("lora_alpha", "lora_targets"),
        "--lora-rank is not given: all weights learn",
        lambda config: not config.finetuning.lora_rank,
        ("finetune", *FINETUNING_MODES),
    ),
    IdleFlags(
        (
            *("shard_size", "val_split", "num_workers", "val_file", "mix", "clean", "filter"),
            *("deduplicate", "show_dropped", "limit_documents", "test_mode", "license"),
        ),
        "no --text-file is given, and the data folder is used as it is",
        _reuses_data,
    ),
    IdleFlags(
        ("document_separator", "text_column", "allow_bad_rows"),
        "no --text-file is given",
        _has_no_text,
    ),
    IdleFlags(
        ("source_config", "workers"),
        "no --source is given",
        lambda config: config.data.source is None,
    ),
    IdleFlags(
        ("val_split",),
        "--val-file names the validation text",
        lambda config: bool(config.data.val_file),
    ),
    IdleFlags(
        ("beta2", "eps"),
        "--optimizer sgd has none",
        lambda config: config.training.optimizer == "sgd",
    ),
    IdleFlags(
        ("batch_size",), "--get-optimal-bs tries its own", lambda config: True, ("get-optimal-bs",)
    ),
    IdleFlags(
        ("learning_rate", "scheduler", "warmup_steps"),
        "--find-lr sets the learning rate of each step",
        lambda config: True,
        ("find-lr",),
    ),
    IdleFlags(
        ("resume_from", "auto_resume", "allow_batch_change"),
        "trials begin with a new model",
        lambda config: True,
        ("find-lr", "sweep", "forecast"),
    ),
    IdleFlags(
        ("device",),
        "the report is for a GPU that is not here",
        _is_for_absent_gpu,
        ("check", "get-optimal-bs"),
    ),
    IdleFlags(
        ("measure",),
        "the report is for a GPU that is not here",
        lambda config: config.check.measure and _is_for_absent_gpu(config),
        ("check",),
    ),
    IdleFlags(
        ("network_gbits",),
        "one host has no network to others: give --hosts",
        lambda config: config.processes.hosts == 1,
        ("check", "get-optimal-bs"),
    ),
    IdleFlags(
        ("hosts", "network_gbits"),
        "real trials run on this host: give --target-gpu to predict instead",
        lambda config: not _is_for_absent_gpu(config),
        ("get-optimal-bs",),
    ),
    IdleFlags(
        ("price_per_hour",),
        "--gpu-memory alone implies no speed: name the card with --target-gpu",
        lambda config: config.check.gpu_memory is not None and config.check.target_gpu is None,
        ("check",),
    ),
    IdleFlags(
        ("quantize", "force", "data_dir"),
        "--weights-only writes the weights as they are",
        lambda config: config.handover.weights_only,
        ("export",),
    ),
    IdleFlags(
        ("output_dir",),
        "--checkpoint-path names the checkpoint",
        lambda config: config.generation.checkpoint_path is not None,
        ("generate", "tokenize", "detokenize", "export"),
    ),
    IdleFlags(
        ("data_dir",),
        "--checkpoint-path names the checkpoint",
        lambda config: config.generation.checkpoint_path is not None,
        ("tokenize", "detokenize"),
    ),
    IdleFlags(
        ("temperature", "top_k", "top_p", "min_p", "seed"),
        "--no-do-sample always takes the most probable token",
        lambda config: not config.sampling.do_sample and config.sampling.beams == 1,
        ("generate",),
    ),
    IdleFlags(
        ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed"),
        "--beams searches for the most probable text and draws nothing",
        lambda config: config.sampling.beams > 1,
        ("generate",),
    ),
    IdleFlags(
        ("system_prompt", "chat_template"),
        "it belongs to a conversation: give --chat",
        lambda config: not config.generation.chat,
        ("generate",),
    ),
    IdleFlags(
        ("interactive", "generation_batch_size"),
        "--chat answers one message after the other",
        lambda config: config.generation.chat,
        ("generate",),
    ),
    IdleFlags(
        ("length_penalty",),
        "one beam is no search: give --beams",
        lambda config: config.sampling.beams == 1,
        ("generate",),
    ),
)


def drop_unused(mode: str, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The configuration without the flags that this call does not use.

    Returns:
        The configuration, in which those flags have their defaults, so that nothing announces
        them; and what is said of each flag that was given and is not used, by its name.
    """
    options = build_options()
    of_other_modes = {
        name: f"is not used by --{mode}"
        for name, option in options.items()
        if name in config.sources and not is_used(option, mode)
    }
    config = _reset(config, of_other_modes)
    idle = {
        name: f"is not used: {flags.why}"
        for flags in IDLE_FLAGS
        if mode in flags.modes and flags.applies(config)
        for name in flags.names
        if name in config.sources
    }
    return _reset(config, idle), of_other_modes | idle


def _reset(config: RunConfig, names: dict[str, str]) -> RunConfig:
    """The configuration with the defaults of these flags."""
    options = build_options()
    for name in names:
        group = getattr(config, options[name].group)
        changed = dataclasses.replace(group, **{name: options[name].default})
        config = dataclasses.replace(config, **{options[name].group: changed})
    sources = {name: source for name, source in config.sources.items() if name not in names}
    return dataclasses.replace(config, sources=sources)
