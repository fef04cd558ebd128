"""All weights of a checkpoint's model, whether it holds them itself or adapters of a base."""

from __future__ import annotations

from torch import Tensor

from preflight.checkpoints.adapters import find_base, read_adapter
from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import Checkpoint, load_weights
from preflight.checkpoints.manifest import ADAPTER_WEIGHTS_NAME
from preflight.checkpoints.weights import Shapes
from preflight.models.base import TokenModel
from preflight.models.lora import derive_adapter_shapes, merge_adapter


def load_merged_weights(checkpoint: Checkpoint, model: TokenModel) -> dict[str, Tensor]:
    """The weights of `model` on the CPU; adapters are added to those of their base in fp32.

    Args:
        checkpoint: verified.
        model: of its architecture, without adapters, on any device.

    Raises:
        PreflightError: code CHECKPOINT, when a file is damaged or of another model, or when the
            base is missing or another one.
    """
    shapes: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    adapter = read_adapter(checkpoint)
    if adapter is None:
        return load_weights(checkpoint, shapes)
    # The adapters first: what is wrong with them shows before the base is read.
    adapter_weights = load_weights(checkpoint, derive_adapter_shapes(shapes, adapter))
    weights = load_weights(find_base(checkpoint), shapes)
    try:
        merge_adapter(weights, adapter_weights, adapter)
    except ValueError as error:
        raise damage_error(checkpoint.path / ADAPTER_WEIGHTS_NAME, str(error)) from None
    return weights
