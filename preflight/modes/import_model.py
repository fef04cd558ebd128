"""`--import`: a model of another tool becomes a checkpoint of step 0, which every mode takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from generate import load_model
from preflight.checkpoints.damage import describe_path
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.checkpoints.manifest import MANIFEST_NAME
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import open_checkpoint, remove_leftovers, scan_checkpoints
from preflight.core import storage
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.formats.hf_import import TEMPLATE_NAME
from preflight.formats.protocol import ImportedModel, Importer
from preflight.models.cost import count_parameters
from preflight.settings import RunConfig, model_config_to_dict
from preflight.settings.kinds import IMPORTERS


def run(config: RunConfig) -> int:
    """Import what was asked for and return the exit code.

    Raises:
        PreflightError: code CHECKPOINT, for a model that is damaged or has parts that we lack;
            code STORAGE, also where the output folder holds a run already.
    """
    path = Path(config.handover.import_path or "")
    output_dir = Path(config.control.output_dir)
    _refuse_run(output_dir)
    model = find_importer(path).read(path)
    for line in _describe(model):
        log.info(line)
    storage.make_folder(output_dir)
    with FolderLock(output_dir):
        _refuse_run(output_dir)
        storage.check_writable(output_dir)
        remove_leftovers(output_dir)
        checkpoint = _save(model, output_dir)
    load_model(open_checkpoint(str(checkpoint.path)), torch.device("cpu"), torch.float32)
    print(checkpoint.path, flush=True)
    log.info(f"try it: {format_command('--generate', '--checkpoint-path', checkpoint.path)}")
    return int(ExitCode.DONE)


def find_importer(path: Path) -> Importer:
    """The importer for what is at `path`.

    Raises:
        PreflightError: code CHECKPOINT, when no format fits.
    """
    if os.path.lexists(path / MANIFEST_NAME) or os.path.isdir(path / MILESTONES_NAME):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path} is Preflight's own: every mode takes it as it is",
            f"for example: {format_command('--generate', '--checkpoint-path', path)}",
        )
    for name in IMPORTERS.names() if os.path.exists(path) else ():
        importer: Importer = IMPORTERS.load(name)()
        if importer.accepts(path):
            return importer
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"--import {path}: {describe_path(path, 'config.json')}",
        "expected a Hugging Face folder (config.json, safetensors, tokenizer.json), a .gguf file, "
        "or a state dict such as nanoGPT's ckpt.pt",
    )


def _refuse_run(output_dir: Path) -> None:
    """An import begins a folder: it never stands beside the checkpoints of a run."""
    found, damaged = scan_checkpoints(output_dir)
    if found or damaged:
        raise PreflightError(
            ExitCode.STORAGE,
            f"{output_dir} holds checkpoints already",
            "nothing was changed; choose another --output-dir",
        )


def _describe(model: ImportedModel) -> list[str]:
    config, origin = model.config, model.origin
    kind = origin.get("quantization") or str(next(iter(model.weights.values())).dtype)
    template = "a chat template" if model.chat_template else "no chat template"
    return [
        f"{origin['source']} ({origin['format']}): {config.label}, "
        f"{count_parameters(config):,} parameters, context {config.context_length:,}, "
        f"{kind.removeprefix('torch.')}",
        f"tokenizer: {model.tokenizer.vocab_size:,} ids, end of text "
        f"{model.tokenizer.end_of_text_id}; {template}",
    ]


def _save(model: ImportedModel, output_dir: Path) -> Checkpoint:
    """Write the checkpoint of step 0. It has no training state to continue from."""
    config: dict[str, Any] = {
        "model": model_config_to_dict(model.config),
        "tokenizer": model.tokenizer.describe(),
        "origin": model.origin,
    }
    template = model.chat_template
    extra = {} if template is None else {TEMPLATE_NAME: template.encode()}
    losses: dict[str, float | None] = {"val_loss": None}
    return save_checkpoint(
        output_dir, 0, model.weights, {}, config, losses, model.tokenizer, extra_files=extra
    )
