"""Checkpoints as format v2 wrote them: the optimizer within ``checkpoint.pt``, by index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from generate import build_empty_model
from preflight.checkpoints.format import read_checkpoint
from preflight.checkpoints.manifest import render_manifest
from preflight.models.protocol import LanguageModel
from preflight.settings import TrainingSettings
from preflight.training.optimizers import build_optimizer


def list_names(model: LanguageModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """The model's parameters in the order of the optimizer's indices."""
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def make_early(folder: Path, optimizer: str = "adamw") -> None:
    """Rewrite a checkpoint of a training in format v2."""
    model = build_empty_model(read_checkpoint(folder))
    built = build_optimizer(model, TrainingSettings(optimizer=optimizer), 1e-3)
    order = list_names(model, built)
    held: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in load_file(folder / "optimizer.safetensors").items():
        name, _, key = full_name.rpartition(".")
        held.setdefault(order.index(name), {})[key] = tensor
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    groups = built.state_dict()["param_groups"]
    state["trainer"]["optimizer"] = {"state": dict(sorted(held.items())), "param_groups": groups}
    torch.save(state, folder / "checkpoint.pt")
    (folder / "optimizer.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["checksum"], manifest["files"]["optimizer.safetensors"]
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_bytes(render_manifest(manifest | {"format_version": 2}))
