"""`--export PATH --weights-only`: a checkpoint of Preflight's own without its training state.

It is a folder that every mode takes, and a third of the size: AdamW's state is two thirds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from generate import load_model
from preflight.checkpoints.format import (
    MILESTONES_NAME,
    Checkpoint,
    read_checkpoint,
    verify_checkpoint,
)
from preflight.checkpoints.manifest import FOLDER_NAME
from preflight.checkpoints.saving import save_checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.models.base import TokenModel
from preflight.modes.base_checkpoint import find_template
from preflight.tokenization import Tokenizer
from preflight.tokenization.chat_template import TEMPLATE_NAME


def export_weights(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Write the checkpoint's model to the folder `path`, read it back, and compare.

    Adapters are merged. Weights of 16 bits become fp32, which holds them exactly.

    Returns:
        What was compared, a line each.

    Raises:
        PreflightError: code CHECK_FAILED, when it is not the model; code FLAGS, for the name of
            another step's checkpoint. Nothing is then written.
    """
    if FOLDER_NAME.fullmatch(path.name) and path.name != f"checkpoint-{checkpoint.step}":
        raise PreflightError(
            ExitCode.FLAGS,
            f"--export {path}: the checkpoint is of step {checkpoint.step:,}",
            "choose another name",
        )
    model, tokenizer = _load(checkpoint)
    with storage.publish_folder(path) as temporary:
        _write(checkpoint, model, tokenizer, temporary)
        return _prove(read_checkpoint(temporary), model, tokenizer)


def _load(checkpoint: Checkpoint) -> tuple[TokenModel, Tokenizer]:
    return load_model(checkpoint, torch.device("cpu"), torch.float32)


def _write(checkpoint: Checkpoint, model: TokenModel, tokenizer: Tokenizer, folder: Path) -> None:
    config = {key: value for key, value in checkpoint.config.items() if key != "adapter"}
    config["tokenizer"] = tokenizer.describe()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    losses: dict[str, float | None] = dict(checkpoint.manifest.losses)
    template = find_template(checkpoint)
    made = save_checkpoint(
        *(folder, checkpoint.step, weights, {}, config, losses, tokenizer),
        extra_files=None if template is None else {TEMPLATE_NAME: template.source.encode()},
    )
    for name in os.listdir(made.path):
        os.rename(made.path / name, folder / name)
    os.rmdir(made.path)
    os.rmdir(folder / MILESTONES_NAME)


def _prove(found: Checkpoint, model: TokenModel, tokenizer: Tokenizer) -> list[str]:
    verify_checkpoint(found)
    again, its_tokenizer = _load(found)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    different: Any = [n for n in first if n not in second or not torch.equal(first[n], second[n])]
    if again.config != model.config or first.keys() != second.keys() or different:
        raise PreflightError(
            ExitCode.CHECK_FAILED,
            f"the export is not the model: {next(iter(different), 'the architecture')} differs",
            "nothing was written",
        )
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise PreflightError(
            ExitCode.CHECK_FAILED, "the export has another tokenizer", "nothing was written"
        )
    n_weights = sum(weight.numel() for weight in first.values())
    n_files = len(found.manifest.files)
    return [
        f"all {n_weights:,} weights are bit-equal, the tokenizer and the architecture are equal",
        f"the SHA-256 of {n_files} files is that of the manifest",
    ]
