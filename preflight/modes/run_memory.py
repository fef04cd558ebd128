"""Whether a run fits in the memory at hand, from the parts of its set-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preflight.device.runtime import Runtime
from preflight.foresight import fits
from preflight.foresight.memory import MemoryOptions
from preflight.settings import ModelConfig

if TYPE_CHECKING:
    from preflight.modes.setup import RunSetup


def check_memory(
    setup: RunSetup,
    runtime: Runtime,
    window_tokens: int,
    model: ModelConfig | None = None,
    data_bytes: int | None = None,
) -> None:
    """Refuse a run that cannot fit: see `fits.check_memory`."""
    fits.check_memory(**describe_memory(setup, runtime, window_tokens, model, data_bytes))


def describe_memory(
    setup: RunSetup,
    runtime: Runtime,
    window_tokens: int,
    model: ModelConfig | None = None,
    data_bytes: int | None = None,
) -> dict[str, Any]:
    """What the functions of `fits` need to know of a run.

    Args:
        setup: of the run.
        runtime: of the run.
        window_tokens: tokens of a training window.
        model: the architecture, where the data is not made yet.
        data_bytes: of `data_place`, where the data is not made yet.
    """
    options = MemoryOptions.of(
        runtime,
        setup.config.system.gradient_checkpointing,
        window_tokens,
        setup.data_place.n_bytes if data_bytes is None else data_bytes,
        setup.target_share,
        setup.sharing,
    )
    return {
        "model_config": model or setup.model_config,
        "training": setup.config.training,
        "runtime": runtime,
        "options": options,
        "last_checkpoint": setup.origin.path if setup.origin else "none yet",
    }
