"""What a sweep tries: every combination of the values that were given, as configurations."""

from __future__ import annotations

import itertools
import math
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import suggest
from preflight.settings import RunConfig, build_config, build_options
from preflight.settings.options import Option

SWEPT_GROUPS = ("model", "training")
# What makes losses of other data or of another length, which say nothing about each other.
_NOT_SWEPT = {
    "tokenizer": "the data folder belongs to one tokenizer",
    "max_steps": "every training reads the same tokens: --sweep-steps",
    "num_epochs": "every training reads the same tokens: --sweep-steps",
}
Values = dict[str, Any]


def parse_sweep(words: tuple[str, ...]) -> dict[str, list[Any]]:
    """The values to try of each flag: ``learning_rate=1e-3,2e-3`` is one word.

    Raises:
        PreflightError: code FLAGS, naming every fault.
    """
    options = {o.name: o for o in build_options().values() if o.group in SWEPT_GROUPS}
    found: dict[str, list[Any]] = {}
    faults: list[str] = []
    for word in words:
        given, is_complete, values = word.partition("=")
        name = given.lstrip("-").replace("-", "_")
        flag = "--" + name.replace("_", "-")
        if not is_complete or not values:
            faults.append(f"--sweep {word}: write --sweep FLAG=VALUE,VALUE")
        elif name in _NOT_SWEPT:
            faults.append(f"--sweep cannot vary {flag}: {_NOT_SWEPT[name]}")
        elif name not in options:
            hint = suggest(name, options)
            faults.append(f"--sweep: {flag} is no flag of the model or the training{hint}")
        elif name in found:
            faults.append(f"--sweep: {flag} is given twice; write all its values after one =")
        else:
            found[name], told = _read_values(options[name], values)
            faults += told
    if faults:
        raise PreflightError(ExitCode.FLAGS, *faults)
    return found


def _read_values(option: Option, text: str) -> tuple[list[Any], list[str]]:
    """The values of one flag, each once, and what is wrong with them."""
    values, faults = [], []
    for item in text.split(","):
        try:
            raw = {"true": True, "false": False}.get(item, item) if option.kind is bool else item
            values.append(option.read(raw))
        except ValueError as error:
            faults.append(f"--sweep: {error}")
    return list(dict.fromkeys(values)), faults


def list_combinations(found: dict[str, list[Any]]) -> list[Values]:
    """Every combination; the last flag varies fastest."""
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]


def build_combination(config: RunConfig, values: Values) -> RunConfig:
    """The call's configuration with these values, checked as if they had been typed.

    Raises:
        PreflightError: code FLAGS, naming every fault.
    """
    options = build_options()
    given = {name: config.get(options[name]) for name in config.sources if name in options}
    return build_config(given | values, config.sources | dict.fromkeys(values, "--sweep"))


def spell_values(values: Values) -> list[str]:
    """The words that set them on the command line."""
    options = build_options()
    return [word for name, value in values.items() for word in options[name].spell(value)]


def choose_steps(total_tokens: int, tokens_per_step: int) -> int:
    """Steps of a training that reads `total_tokens`, whatever its batch is."""
    return max(1, math.floor(total_tokens / tokens_per_step + 0.5))
