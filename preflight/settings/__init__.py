"""Every flag: its default, its limits and its help, written once. No torch."""

from preflight.settings.check import CheckSettings
from preflight.settings.comparison import ComparisonSettings
from preflight.settings.control import ControlSettings
from preflight.settings.data import DataSettings
from preflight.settings.finetuning import AdapterConfig, FinetuningSettings
from preflight.settings.generation import OUTPUT_SUFFIXES, GenerationSettings
from preflight.settings.model import (
    CUSTOM_SIZE_FIELDS,
    MODEL_FAMILIES,
    MODEL_PRESETS,
    PART_NAMES,
    ModelConfig,
    ModelPreset,
    ModelSettings,
    model_config_from_dict,
    model_config_to_dict,
)
from preflight.settings.options import Option
from preflight.settings.processes import ProcessSettings
from preflight.settings.run import (
    GROUP_SUMMARIES,
    GROUPS,
    RunConfig,
    build_config,
    build_options,
    describe_choices,
)
from preflight.settings.sampling import SamplingConfig
from preflight.settings.search import SearchSettings
from preflight.settings.system import SystemSettings
from preflight.settings.training import TrainingSettings

__all__ = [
    "CUSTOM_SIZE_FIELDS",
    "GROUPS",
    "GROUP_SUMMARIES",
    "MODEL_FAMILIES",
    "MODEL_PRESETS",
    "OUTPUT_SUFFIXES",
    "PART_NAMES",
    "AdapterConfig",
    "CheckSettings",
    "ComparisonSettings",
    "ControlSettings",
    "DataSettings",
    "FinetuningSettings",
    "GenerationSettings",
    "ModelConfig",
    "ModelPreset",
    "ModelSettings",
    "Option",
    "ProcessSettings",
    "RunConfig",
    "SamplingConfig",
    "SearchSettings",
    "SystemSettings",
    "TrainingSettings",
    "build_config",
    "build_options",
    "describe_choices",
    "model_config_from_dict",
    "model_config_to_dict",
]
