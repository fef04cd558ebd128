"""The configuration of one call: all groups of flags together."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from preflight.core.commands import join_words
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings.check import CheckSettings
from preflight.settings.comparison import ComparisonSettings
from preflight.settings.control import ControlSettings
from preflight.settings.data import DataSettings
from preflight.settings.evaluation import EvaluationSettings
from preflight.settings.finetuning import FinetuningSettings
from preflight.settings.generation import GenerationSettings
from preflight.settings.handover import HandoverSettings
from preflight.settings.model import (
    CUSTOM_SIZE_FIELDS,
    MODEL_FAMILIES,
    ModelSettings,
)
from preflight.settings.options import Option, list_options
from preflight.settings.processes import ProcessSettings
from preflight.settings.reporting import ReportSettings
from preflight.settings.sampling import SamplingConfig
from preflight.settings.search import SearchSettings
from preflight.settings.serving import ServingSettings
from preflight.settings.system import SystemSettings
from preflight.settings.tokens import TokenSettings
from preflight.settings.training import TrainingSettings
from preflight.settings.trials import TrialSettings

FINETUNING_LEARNING_RATE, LORA_LEARNING_RATE = 5e-5, 2e-4
FINETUNING_EPOCHS = 2.0
INIT_LEARNING_RATE = 1e-4  # of weights that are trained: a preset's would unlearn much of them
FINETUNING_OUTPUT = "finetuning_output"  # beside the run that it begins from


@dataclass(frozen=True)
class RunConfig:
    """Everything one call was asked to do. ``sources`` says where non-default values came from."""

    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    finetuning: FinetuningSettings = field(default_factory=FinetuningSettings)
    data: DataSettings = field(default_factory=DataSettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    check: CheckSettings = field(default_factory=CheckSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    trials: TrialSettings = field(default_factory=TrialSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    handover: HandoverSettings = field(default_factory=HandoverSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, else what suits the model's size.

        Runs that begin with trained weights have their own: these want small steps, and adapters
        larger ones.
        """
        if self.finetuning.finetune:
            default = LORA_LEARNING_RATE if self.finetuning.adapter else FINETUNING_LEARNING_RATE
            return self.training.learning_rate or default
        if self.control.init_from:
            return self.training.learning_rate or INIT_LEARNING_RATE
        return self.training.learning_rate or self.model.learning_rate

    def get(self, option: Option) -> Any:
        """The value of a flag."""
        return getattr(getattr(self, option.group), option.name)

    def resolve_training(self) -> TrainingSettings:
        """The training flags, with the learning rate and length that unset ones stand for."""
        training = dataclasses.replace(self.training, learning_rate=self.peak_learning_rate)
        if not self.finetuning.finetune:
            return training
        is_unset = training.num_epochs is None and training.max_steps is None
        epochs = FINETUNING_EPOCHS if is_unset else training.num_epochs
        adapter = self.finetuning.adapter
        return dataclasses.replace(training, num_epochs=epochs, adapter=adapter)


# By the name of the group, in the order of `--help`.
GROUPS: dict[str, Any] = {
    item.name: item.type for item in dataclasses.fields(RunConfig) if item.name != "sources"
}
# What `--help` says of each group. Docstrings would be gone under `python -OO`.
GROUP_SUMMARIES = {
    "model": "The model's architecture; unset values come from the preset or the tokenizer.",
    "training": "Batch size, optimizer, learning rate and length of the run.",
    "finetuning": "What `--finetune` learns from, and which weights learn.",
    "data": "The training text, and the token shards made from it.",
    "control": "Checkpoints, evaluation, logging and resuming.",
    "system": "Device, precision and compilation.",
    "processes": "The processes that share a run, one for each card, and their hosts.",
    "sampling": "How the next token is chosen, and when generation ends.",
    "generation": "The checkpoint, the prompts, and where completions go.",
    "check": "What the report of `--check` holds, and for which GPU.",
    "search": "How `--get-optimal-bs` searches for a batch size.",
    "trials": "How `--find-lr` and `--sweep` try a run before it starts.",
    "comparison": "What `--compare` compares.",
    "tokens": "What `--tokenize` and `--detokenize` show.",
    "evaluation": "What `--evaluate` scores.",
    "report": "The page that `--report` writes.",
    "handover": "Models from other tools (`--import`), and models for them (`--export`).",
    "serving": "The server of `--serve`: its models, its address, who may use it.",
}


def build_options() -> dict[str, Option]:
    """Every flag by field name, in the order of `--help`."""
    return {
        option.name: option
        for group, settings in GROUPS.items()
        for option in list_options(group, settings)
    }


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
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, raw in given.items():
        option = options[name]
        try:
            values[option.group][name] = option.read(raw)
        except ValueError as error:
            faults.append(str(error))
    if "seed" in values["training"]:
        values["sampling"]["seed"] = values["training"]["seed"]
    if values["finetuning"].get("finetune"):
        values["control"].setdefault("output_dir", FINETUNING_OUTPUT)
        sources = {"output_dir": "the default of --finetune"} | sources
    values["data"]["output_dir"] = values["control"].get("output_dir", ControlSettings.output_dir)
    groups = {group: settings(**values[group]) for group, settings in GROUPS.items()}
    config = RunConfig(**groups, sources=dict(sources))
    faults += _find_model_faults(config.model, set(given)) + _find_conflicts(config)
    if faults:
        raise PreflightError(ExitCode.FLAGS, *faults)
    return config


def _find_model_faults(model: ModelSettings, given: set[str]) -> list[str]:
    """A custom size that is not complete, or parts that do not fit together."""
    family = MODEL_FAMILIES.get(model.model_family, {})
    needed = [name for name in CUSTOM_SIZE_FIELDS if name not in family]
    unset = [name for name in needed if getattr(model, name) is None]
    if model.model_size == "custom" and unset:
        # One that was given is unset here only when its value is at fault, which is reported.
        flags = " ".join("--" + name.replace("_", "-") for name in unset if name not in given)
        return [f"--model-size custom also needs {flags}"] if flags else []
    try:
        model.resolve(vocab_size=2)
    except ValueError as error:
        return [f"--{fault.replace('_', '-')}" for fault in str(error).split("; ")]
    return []


def _find_conflicts(config: RunConfig) -> list[str]:
    """Faults that one flag alone does not show, each with the flag to change."""
    faults = config.processes.find_faults()
    control, generation = config.control, config.generation
    for flag, value in (("--data-dir", config.data.data_dir), ("--output-dir", control.output_dir)):
        if os.path.exists(value) and not os.path.isdir(value):
            faults.append(f"{flag} {value}: there is a file of that name, not a folder")
    if control.resume_from and not control.auto_resume:
        faults.append("--resume-from and --no-auto-resume contradict each other: drop one")
    if control.resume_from and control.init_from:
        faults.append("--resume-from continues a run, and --init-from begins one: drop one")
    if generation.output_file and generation.interactive:
        faults.append("--output-file and --interactive contradict each other: drop one")
    if generation.prompts and generation.prompts_file:
        faults.append("--prompts and --prompts-file: give one of them")
    beams = config.sampling.beams
    if generation.chat:
        excluded = {
            "--output-file": generation.output_file,
            "--prompts": generation.prompts,
            "--prompts-file": generation.prompts_file,
            "--beams": beams > 1,
            "--num-return-sequences": generation.num_return_sequences > 1,
        }
        faults += [f"--chat and {flag}: give one of them" for flag in excluded if excluded[flag]]
    if 1 < beams < generation.num_return_sequences:
        faults.append(
            f"--num-return-sequences {generation.num_return_sequences} must be at most --beams "
            f"{beams}: a search gives one completion for each beam"
        )
    if config.trials.find_lr_min >= config.trials.find_lr_max:
        faults.append("--find-lr-min must be less than --find-lr-max")
    return faults


def describe_choices(config: RunConfig) -> list[str]:
    """One line for each non-default value: the flag as it is typed, and where it came from."""
    lines = []
    for option in build_options().values():
        value = config.get(option)
        if value != option.default:
            source = config.sources.get(option.name, "a caller")
            lines.append(f"{join_words(*option.spell(value))} (from {source})")
    return lines
