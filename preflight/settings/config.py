"""Configuration: every flag, its default, its limits and its help text, written once. No torch.

One frozen dataclass per group of flags. A field's name is its flag (``n_layers`` is
``--n-layers``) and its metadata is its help text and its limits, so that the command line, the
``--config`` file and the reference in the README all come from the same place. ``None`` means
unset: the value is chosen when the work is known, and the choice is printed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import LOG_LEVELS


@dataclass(frozen=True)
class ModelPreset:
    """A named size. ``learning_rate`` is the peak rate that this size trains well with."""

    n_layers: int
    n_heads: int
    n_embeddings: int
    ffn_hid_dim: int
    context_length: int
    learning_rate: float


# small to xl are the shapes published as GPT-2 117M to 1.5B (Radford et al. 2019, table 2);
# their learning rates follow GPT-3 (Brown et al. 2020, table 2.1).
MODEL_PRESETS = {
    "nano": ModelPreset(2, 4, 128, 512, 128, 2e-3),
    "micro": ModelPreset(4, 8, 256, 1024, 256, 1e-3),
    "tiny": ModelPreset(5, 8, 512, 2048, 512, 8e-4),
    "small": ModelPreset(12, 12, 768, 3072, 1024, 6e-4),
    "medium": ModelPreset(24, 16, 1024, 4096, 1024, 3e-4),
    "large": ModelPreset(36, 20, 1280, 5120, 1024, 2.5e-4),
    "xl": ModelPreset(48, 25, 1600, 6400, 1024, 2e-4),
}
CUSTOM_SIZE_FIELDS = ("n_layers", "n_heads", "n_embeddings", "context_length")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULERS = ("cosine", "linear", "onecycle", "none")
OUTPUT_SUFFIXES = (".json", ".jsonl", ".txt")


def _option(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    lower: float | None = None,
    upper: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is also a flag. Limits: lower <= value <= upper, above < v < below."""
    limits = {"lower": lower, "upper": upper, "above": above, "below": below}
    metadata = {"help": help_text, "choices": choices, "metavar": metavar, **limits}
    return field(default=default, metadata=metadata)


_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class ModelSettings:
    """The model flags as given; ``None`` follows ``model_size`` or the tokenizer."""

    model_size: str = _option(
        "micro",
        "preset to start from; the flags below override it",
        choices=(*MODEL_PRESETS, "custom"),
    )
    tokenizer: str = _option("gpt2", "gpt2 (built in), or another tiktoken encoding by name")
    vocab_size: int | None = _option(
        None, "rows of the embedding table; unset: the tokenizer's", lower=2, upper=_MAX_COUNT
    )
    context_length: int | None = _option(
        None, "tokens the model sees at once", lower=2, upper=1_048_576
    )
    n_embeddings: int | None = _option(None, "width of the model", lower=1, upper=65_536)
    n_heads: int | None = _option(
        None, "attention heads; must divide the width", lower=1, upper=1024
    )
    n_layers: int | None = _option(None, "transformer blocks", lower=1, upper=1024)
    ffn_hid_dim: int | None = _option(
        None,
        "hidden width of the feed-forward part; unset: the preset's, or 4 x width",
        lower=1,
        upper=262_144,
    )
    activation: str = _option(
        "gelu_tanh", "feed-forward activation; gelu_tanh is GPT-2's", choices=ACTIVATIONS
    )
    dropout: float = _option(0.0, "share of activations dropped in training", lower=0, below=1)

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The model to build, with `vocab_size` ids unless the flags ask for more."""
        preset = MODEL_PRESETS.get(self.model_size)
        shape = {
            name: getattr(self, name) or (getattr(preset, name) if preset else 0)
            for name in CUSTOM_SIZE_FIELDS
        }
        # A new width without a new feed-forward width keeps GPT-2's ratio of four.
        keeps_preset_width = preset is not None and self.n_embeddings is None
        ffn = preset.ffn_hid_dim if preset and keeps_preset_width else 4 * shape["n_embeddings"]
        return ModelConfig(
            vocab_size=self.vocab_size or vocab_size,
            ffn_hid_dim=self.ffn_hid_dim or ffn,
            activation=self.activation,
            dropout=self.dropout,
            **shape,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A model's architecture, complete: what a checkpoint's ``config.json`` holds."""

    vocab_size: int
    context_length: int
    n_embeddings: int
    n_heads: int
    n_layers: int
    ffn_hid_dim: int
    activation: str = "gelu_tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        counts = (f.name for f in fields(self) if f.name not in ("activation", "dropout"))
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.n_embeddings % self.n_heads:
            raise ValueError(
                f"n_heads {self.n_heads} does not divide n_embeddings {self.n_embeddings}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def label(self) -> str:
        """The shape in one word, as in ``12L-768H-12A``."""
        return f"{self.n_layers}L-{self.n_embeddings}H-{self.n_heads}A"


@dataclass(frozen=True)
class TrainingSettings:
    """How the weights are updated."""

    batch_size: int = _option(8, "sequences per micro-step", lower=1, upper=1_048_576)
    gradient_accumulation_steps: int = _option(
        1, "micro-steps per update", lower=1, upper=1_048_576
    )
    learning_rate: float | None = _option(
        None, "peak learning rate; unset: the preset's", above=0, upper=1e30
    )
    weight_decay: float = _option(
        0.1, "decay of the weight matrices (not of biases, norms, embeddings)", lower=0, upper=1e3
    )
    beta1: float = _option(0.9, "Adam's first decay rate; momentum for sgd", lower=0, below=1)
    beta2: float = _option(0.95, "Adam's second decay rate", lower=0, below=1)
    eps: float = _option(1e-8, "Adam's epsilon", above=0, upper=1)
    max_grad_norm: float = _option(
        1.0, "clip the gradient's norm to this; 0: no clipping", lower=0, upper=1e30
    )
    warmup_steps: int | None = _option(
        None,
        "steps of rising learning rate; unset: 5 %% of the run, at most 2,000",
        lower=0,
        upper=_MAX_COUNT,
    )
    max_steps: int | None = _option(
        None,
        "stop after this many updates; with --num-epochs too: the earlier of both",
        lower=1,
        upper=_MAX_COUNT,
    )
    num_epochs: float | None = _option(
        None, "passes over the training data; unset, and no --max-steps: 3", above=0, upper=1e6
    )
    optimizer: str = _option("adamw", "update rule", choices=OPTIMIZERS)
    scheduler: str = _option("cosine", "learning rate after warm-up", choices=SCHEDULERS)
    seed: int = _option(
        42, "seed of initialisation, data order, dropout and sampling", lower=0, upper=2**63 - 1
    )


@dataclass(frozen=True)
class DataSettings:
    """Where the text is and where its shards go."""

    text_file: tuple[str, ...] = _option(
        (),
        "text to learn from: files, folders (each file a document), globs, - for stdin",
        metavar="PATH",
    )
    data_dir: str = _option("data", "folder of the tokenised shards", metavar="DIR")
    shard_size: int = _option(10_000_000, "tokens per shard", lower=1024, upper=_MAX_COUNT)
    val_split: float = _option(0.05, "share of the text kept for validation", above=0, upper=0.5)
    num_workers: int | None = _option(
        None, "processes that tokenise; unset: one per core", lower=1, upper=1024
    )
    document_separator: str | None = _option(
        None, "text between documents within a file, such as '<|endoftext|>'", metavar="TEXT"
    )


@dataclass(frozen=True)
class ControlSettings:
    """What is written, when, and what a run continues from."""

    output_dir: str = _option(
        "training_output", "folder of checkpoints, metrics and plots", metavar="DIR"
    )
    checkpoint_every: int | None = _option(
        None, "steps between checkpoints; unset: a tenth of the run", lower=1, upper=_MAX_COUNT
    )
    checkpoint_minutes: float = _option(
        10.0, "minutes after which a checkpoint is written in any case", above=0, upper=1e6
    )
    eval_every: int | None = _option(
        None,
        "steps between evaluations; unset: with every checkpoint",
        lower=1,
        upper=_MAX_COUNT,
    )
    log_every: int | None = _option(
        None,
        "steps between log lines where there is no progress bar; unset: 1 %% of the run",
        lower=1,
        upper=_MAX_COUNT,
    )
    max_checkpoints: int = _option(
        3, "newest checkpoints kept, besides the best", lower=2, upper=1_000_000
    )
    resume_from: str | None = _option(
        None, "checkpoint to continue from (the folder or a file in it)", metavar="PATH"
    )
    auto_resume: bool = _option(True, "continue from the newest checkpoint in --output-dir")
    allow_batch_change: bool = _option(
        False, "continue a checkpoint with another number of tokens per step"
    )


@dataclass(frozen=True)
class SystemSettings:
    """The machine."""

    device: str = _option("auto", "auto, cpu, cuda, cuda:N or mps")
    mixed_precision: bool | None = _option(
        None,
        "bf16 where the hardware has it, else fp16 with a gradient scaler (CUDA); unset: "
        "where it is faster",
    )
    gradient_checkpointing: bool = _option(
        False, "recompute each block's activations in the backward pass: less memory, slower"
    )
    compile_model: bool | None = _option(
        None, "torch.compile; unset: on CUDA, for runs long enough to gain from it"
    )
    log_level: str = _option("info", "how much is told on stderr", choices=LOG_LEVELS)
    config: str | None = _option(
        None,
        'JSON file of flags, as in {"batch_size": 16}; flags given on the command line win',
        metavar="FILE",
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The whole of what `generate_text` needs besides a prompt."""

    max_new_tokens: int = _option(200, "tokens to write at most", lower=1, upper=10_000_000)
    temperature: float = _option(
        0.8, "below 1 safer, above 1 wilder; 0: always the likeliest", lower=0, upper=1e6
    )
    top_k: int | None = _option(
        50, "choose among the k likeliest; 0: among all", lower=0, upper=_MAX_COUNT
    )
    top_p: float = _option(1.0, "choose among the likeliest that add up to p", above=0, upper=1)
    repetition_penalty: float = _option(
        1.0,
        "divide the score of tokens already there by this (Keskar et al. 2019)",
        above=0,
        upper=1e6,
    )
    stop: tuple[str, ...] = _option(
        (), "texts that end an answer; they are not printed", metavar="TEXT"
    )
    do_sample: bool = _option(True, "draw at random; --no-do-sample: always the likeliest")
    seed: int = 42


@dataclass(frozen=True)
class GenerationSettings:
    """Which checkpoint writes, from what, and where to."""

    checkpoint_path: str | None = _option(
        None,
        "checkpoint to write with (the folder or a file in it); unset: the best in --output-dir",
        metavar="PATH",
    )
    prompts: tuple[str, ...] = _option((), "texts to continue", metavar="TEXT")
    prompts_file: str | None = _option(
        None, 'file of prompts, one a line; .jsonl: objects with a "prompt"', metavar="FILE"
    )
    num_return_sequences: int = _option(1, "answers per prompt", lower=1, upper=100_000)
    generation_batch_size: int = _option(8, "sequences written at once", lower=1, upper=65_536)
    output_file: str | None = _option(
        None, "write the answers there, as .json, .jsonl or .txt by its ending", metavar="FILE"
    )
    interactive: bool | None = _option(
        None, "a prompt to type at; unset: on a terminal, without --output-file, up to 5 prompts"
    )


@dataclass(frozen=True)
class CheckSettings:
    """What `--check` reports, and for which card."""

    json: bool = _option(False, "print the report as JSON")
    measure: bool = _option(True, "time real steps; --no-measure: predictions alone, in seconds")
    target_gpu: str | None = _option(
        None, "predict for this card instead of the one at hand, as in 'RTX 4090'", metavar="CARD"
    )
    gpu_memory: float | None = _option(
        None, "predict for a card with this many GiB", above=0, upper=100_000, metavar="GIB"
    )
    price_per_hour: float | None = _option(
        None, "what an hour of the machine costs, for the cost of the run", lower=0, upper=1e6
    )


@dataclass(frozen=True)
class SearchSettings:
    """How `--get-optimal-bs` searches."""

    test_batch_sizes: tuple[int, ...] = _option(
        (), "try these sizes and no others", lower=1, upper=1_048_576
    )
    target_batch_size: int | None = _option(
        None,
        "say whether this size fits, and what else would keep its tokens per step",
        lower=1,
        upper=1_048_576,
    )
    gpu_safety_margin: float = _option(
        0.15, "share of the device's (or the CPU's) memory left alone", lower=0, below=1
    )
    tokens_per_step: int | None = _option(
        None,
        "print the accumulation that keeps this many tokens per update",
        lower=1,
        upper=_MAX_COUNT,
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything one call was asked to do. ``sources`` says where non-default values came from."""

    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    control: ControlSettings = ControlSettings()
    system: SystemSettings = SystemSettings()
    sampling: SamplingConfig = SamplingConfig()
    generation: GenerationSettings = GenerationSettings()
    check: CheckSettings = CheckSettings()
    search: SearchSettings = SearchSettings()
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, else the preset's (a custom shape takes micro's)."""
        preset = MODEL_PRESETS.get(self.model.model_size, MODEL_PRESETS["micro"])
        return self.training.learning_rate or preset.learning_rate

    def resolve_training(self) -> TrainingSettings:
        """The training flags, with the preset's learning rate where none was given."""
        return dataclasses.replace(self.training, learning_rate=self.peak_learning_rate)


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "training": TrainingSettings,
    "data": DataSettings,
    "control": ControlSettings,
    "system": SystemSettings,
    "sampling": SamplingConfig,
    "generation": GenerationSettings,
    "check": CheckSettings,
    "search": SearchSettings,
}


@dataclass(frozen=True)
class Option:
    """One flag: where it lives, what it takes, and what may be given."""

    group: str
    name: str
    kind: type  # bool, int, float or str
    many: bool
    default: Any
    metadata: Any

    @property
    def flag(self) -> str:
        """How the option is spelled on the command line."""
        return "--" + self.name.replace("_", "-")


def build_options() -> dict[str, Option]:
    """Every flag by field name, in the order of `--help`."""
    options = {}
    for group, settings in GROUPS.items():
        for item in fields(settings):
            if not item.metadata:  # SamplingConfig.seed: filled from TrainingSettings.seed
                continue
            declared = str(item.type)
            kind = next(k for k in (bool, int, float, str) if k.__name__ in declared)
            many = declared.startswith("tuple")
            options[item.name] = Option(group, item.name, kind, many, item.default, item.metadata)
    return options


def build_config(given: dict[str, Any], sources: dict[str, str]) -> RunConfig:
    """Turn raw values (text from the command line, JSON values from a file) into a `RunConfig`.

    Args:
        given: raw value by field name; only what was given.
        sources: where each came from, by field name.

    Raises:
        PreflightError: code FLAGS, listing every fault at once, each with its flag.
    """
    options = build_options()
    faults: list[str] = []
    values: dict[str, Any] = {}
    for name, raw in given.items():
        try:
            values[name] = _read_value(options[name], raw)
        except ValueError as error:
            faults.append(str(error))
    by_group: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        by_group[options[name].group][name] = value
    if "seed" in values:
        by_group["sampling"]["seed"] = values["seed"]
    groups = {group: GROUPS[group](**by_group[group]) for group in GROUPS}
    config = RunConfig(**groups, sources=dict(sources))
    faults += _find_cross_faults(config)
    if faults:
        raise PreflightError(ExitCode.FLAGS, *faults)
    return config


def _read_value(option: Option, raw: Any) -> Any:
    """`raw` as the option's type, within its limits; ValueError says what is wrong."""
    if option.many:
        items = raw if isinstance(raw, (list, tuple)) else [raw]
        return tuple(_read_single(option, item) for item in items)
    if raw is None:
        if option.default is None:
            return None
        raise ValueError(f"{option.flag} has no value")
    return _read_single(option, raw)


def _read_single(option: Option, raw: Any) -> Any:
    kind, flag = option.kind, option.flag
    if kind is bool:
        if not isinstance(raw, bool):
            raise ValueError(f"{flag} takes true or false, got {raw!r}")
        return raw
    if kind is str:
        if not isinstance(raw, str):
            raise ValueError(f"{flag} takes text, got {raw!r}")
        if "\0" in raw or not raw:
            raise ValueError(f"{flag} is empty or holds a NUL character")
        choices = option.metadata["choices"]
        if choices and raw not in choices:
            raise ValueError(f"{flag} {raw}: choose one of {', '.join(choices)}")
        return raw
    return _read_number(option, raw)


def _read_number(option: Option, raw: Any) -> int | float:
    flag, kind = option.flag, option.kind
    what = "a whole number" if kind is int else "a number"
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise ValueError(f"{flag} takes {what}, got {raw!r}")
    try:
        # float("1e9") is fine for a rate but not for a count; int(2.5) would cut silently.
        value = kind(raw) if isinstance(raw, str) or kind is float else raw
    except (ValueError, OverflowError):
        raise ValueError(f"{flag} takes {what}, got {str(raw)[:40]!r}") from None
    if kind is int and not isinstance(value, int):
        raise ValueError(f"{flag} takes a whole number, got {raw!r}")
    if not math.isfinite(value):
        raise ValueError(f"{flag} takes a finite number, got {raw!r}")
    limits = option.metadata
    tests = (
        ("lower", "at least", lambda v, limit: v >= limit),
        ("upper", "at most", lambda v, limit: v <= limit),
        ("above", "more than", lambda v, limit: v > limit),
        ("below", "less than", lambda v, limit: v < limit),
    )
    for key, words, holds in tests:
        limit = limits[key]
        if limit is not None and not holds(value, limit):
            raise ValueError(f"{flag} must be {words} {limit:,}, got {str(raw)[:40]}")
    return value


def _find_cross_faults(config: RunConfig) -> list[str]:
    """Faults that one value alone does not show, each with the flag that mends it."""
    faults = []
    model, control, generation = config.model, config.control, config.generation
    missing = [name for name in CUSTOM_SIZE_FIELDS if getattr(model, name) is None]
    if model.model_size == "custom" and missing:
        flags = " ".join("--" + name.replace("_", "-") for name in missing)
        faults.append(f"--model-size custom also needs {flags}")
    else:
        try:
            model.resolve(vocab_size=2)
        except ValueError as error:
            faults.append(f"--n-heads: {error}; choose a divisor of the width")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", config.system.device):
        faults.append(f"--device {config.system.device}: choose auto, cpu, cuda, cuda:N or mps")
    for flag, value in (("--data-dir", config.data.data_dir), ("--output-dir", control.output_dir)):
        if Path(value).exists() and not Path(value).is_dir():
            faults.append(f"{flag} {value}: there is a file of that name, not a folder")
    if control.resume_from and not control.auto_resume:
        faults.append("--resume-from and --no-auto-resume contradict each other: drop one")
    if generation.output_file and Path(generation.output_file).suffix not in OUTPUT_SUFFIXES:
        faults.append(
            f"--output-file {generation.output_file}: end it in " + " or ".join(OUTPUT_SUFFIXES)
        )
    if generation.output_file and generation.interactive:
        faults.append("--output-file and --interactive contradict each other: drop one")
    if generation.prompts and generation.prompts_file:
        faults.append("--prompts and --prompts-file: give one of them")
    return faults


def describe_choices(config: RunConfig) -> list[str]:
    """One line for each non-default value: flag, value and where it came from."""
    lines = []
    for option in build_options().values():
        value = getattr(getattr(config, option.group), option.name)
        if value != option.default:
            source = config.sources.get(option.name, "a caller")
            lines.append(f"{option.flag} {value} (from {source})")
    return lines


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def model_config_from_dict(values: Any) -> ModelConfig:
    """The architecture in a checkpoint's ``config.json``.

    Raises:
        ValueError: a key is missing, unknown, or holds an impossible value.
    """
    if not isinstance(values, dict):
        raise ValueError("the model section is not an object")
    known = {f.name for f in fields(ModelConfig)}
    required = known - {"activation", "dropout"}
    if set(values) - known or required - set(values):
        odd = sorted((set(values) - known) | (required - set(values)), key=str)
        raise ValueError(f"unknown or missing keys: {', '.join(map(str, odd))}")
    return ModelConfig(**values)
