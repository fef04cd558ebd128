"""``adapter_config.json`` as the library PEFT writes and reads it, for adapters that we have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from preflight.checkpoints.manifest import render_json
from preflight.core.schema import Schema
from preflight.settings.finetuning import ADAPTER_TARGETS, AdapterConfig

MAX_RANK = 4096


def _check_target(name: str) -> str:
    if name not in ADAPTER_TARGETS:
        raise ValueError(f"{name[:40]!r} is none of {', '.join(ADAPTER_TARGETS)}")
    return name


_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Target = Annotated[str, AfterValidator(_check_target)]
_Targets = Annotated[list[_Target], Field(min_length=1, max_length=8)]
# What says nothing of how an adapter computes: where it came from, and how it was trained.
_NEUTRAL_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Beginnings of A and B that leave the base as it is; others (pissa, olora, loftq) change it.
_NEUTRAL_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


class AdapterSection(Schema):
    """The section ``adapter`` of a checkpoint's ``config.json``."""

    rank: _Rank
    alpha: _Alpha
    targets: _Targets
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def adapter(self) -> AdapterConfig:
        """What it describes."""
        return AdapterConfig(self.rank, self.alpha, tuple(sorted(self.targets)))

    def check(self, adapter: AdapterConfig, weights: Iterable[str]) -> None:
        """Raise ValueError unless this describes `adapter`, and its targets are those of `weights`.

        PEFT would give more layers an adapter where it finds more targets.
        """
        found = {name.removesuffix(".weight").split(".")[-2] for name in weights}
        targets = set(adapter.targets)
        if (self.rank, self.alpha, set(self.targets)) != (adapter.rank, adapter.alpha, targets):
            raise ValueError(f"{adapter} is not what the configuration describes")
        if found != targets:
            raise ValueError(f"adapters of {sorted(found)} are not of {sorted(targets)}")


class _PeftConfig(Schema):
    """The keys of PEFT's that an adapter of ours has a use for."""

    peft_type: Literal["LORA"]
    rank: Annotated[_Rank, Field(alias="r")]
    lora_alpha: _Alpha
    target_modules: _Targets
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str = True


def render_adapter_config(
    adapter: AdapterConfig, config: Mapping[str, Any], weights: Iterable[str]
) -> bytes:
    """The file for a checkpoint, whose base is the folder ``base`` beside its milestones.

    Raises:
        ValueError: `config` does not describe these adapters, or `weights` are of other targets.
    """
    AdapterSection.read(config.get("adapter")).check(adapter, weights)
    return render_json(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "../../base",
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": sorted(adapter.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
    )


def parse_adapter_config(content: Any) -> AdapterConfig:
    """What a file of PEFT describes, where a plain adapter computes the same.

    Raises:
        ValueError: naming the first key that asks for something else, or that cannot be.
    """
    config = _PeftConfig.read(content)
    if config.init_lora_weights not in _NEUTRAL_BEGINNINGS:
        raise ValueError(f"init_lora_weights {str(config.init_lora_weights)[:40]} changes the base")
    known = {"r", *_PeftConfig.model_fields, *_NEUTRAL_KEYS}
    for key in sorted(content.keys() - known):
        if content[key]:  # left at null, false or nothing, a key asks for nothing
            raise ValueError(f"{key[:40]} is set, which adapters here do not have")
    targets = tuple(sorted(set(config.target_modules)))
    return AdapterConfig(config.rank, config.lora_alpha, targets)
