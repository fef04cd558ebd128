"""Checkpoints of adapters: what they describe, the base that they share, and PEFT's own files.

    <output_dir>/base/                      a checkpoint folder without its training state
    <output_dir>/milestones/checkpoint-<step>/
        adapter_model.safetensors           A and B, by PEFT's names
        adapter_config.json                 rank, alpha and targets, as PEFT describes them
        config.json                         the same, and the SHA-256 of the base's weights

The base is kept once for a run, however many checkpoints it has.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from preflight.checkpoints.adapter_config import AdapterSection, parse_adapter_config
from preflight.checkpoints.damage import damage_error
from preflight.checkpoints.format import Checkpoint, read_checkpoint, verify_checkpoint
from preflight.checkpoints.manifest import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATE_NAME,
    TRAINING_NAMES,
    WEIGHTS_NAME,
    render_json,
    render_manifest,
)
from preflight.checkpoints.ranks import ONE_RANK
from preflight.checkpoints.rows import take_rows
from preflight.checkpoints.tensor_file import TensorFile
from preflight.checkpoints.weights import (
    WEIGHT_DTYPES,
    Shapes,
    check_finite,
    read_shapes,
    read_weights,
)
from preflight.checkpoints.writing import FolderWriter
from preflight.core import storage, strict_json
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings.finetuning import AdapterConfig

BASE_NAME = "base"
_MERGED_FROM = "merged_from"
_MAX_LAYERS = 1024
_PEFT_NAME = re.compile(
    r"base_model\.model\.(layers\.([0-9]{1,4})\.(?:\w+\.)?(\w+))\.lora_([AB])\.weight"
)


def describe_adapter(adapter: AdapterConfig, base: Checkpoint) -> dict[str, Any]:
    """The section ``adapter`` of ``config.json``."""
    return {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "targets": sorted(adapter.targets),
        "base_sha256": base.manifest.files[WEIGHTS_NAME].sha256,
    }


def read_adapter(checkpoint: Checkpoint) -> AdapterConfig | None:
    """The adapters that a checkpoint holds in the place of all weights; ``None`` for all weights.

    Raises:
        PreflightError: code CHECKPOINT, when its files contradict each other.
    """
    section = _read_section(checkpoint)
    return section.adapter if section else None


def _read_section(checkpoint: Checkpoint) -> AdapterSection | None:
    section = checkpoint.config.get("adapter")
    is_adapter = checkpoint.manifest.weights_name == ADAPTER_WEIGHTS_NAME
    if not is_adapter and section is None:
        return None
    path = checkpoint.path / CONFIG_NAME
    if not is_adapter:
        raise damage_error(path, f"describes an adapter, and there is no {ADAPTER_WEIGHTS_NAME}")
    try:
        found = AdapterSection.read(section)
    except ValueError as error:
        raise damage_error(path, f"the adapter section: {error}") from None
    path = checkpoint.path / ADAPTER_CONFIG_NAME
    with checkpoint.open(ADAPTER_CONFIG_NAME) as file:
        raw = file.read(strict_json.MAX_JSON_BYTES + 1)
    try:
        described = parse_adapter_config(strict_json.parse_json(raw))
    except ValueError as error:
        raise damage_error(path, str(error)) from None
    if described != found.adapter:
        raise damage_error(
            path,
            f"contradicts {CONFIG_NAME}",
            f"{ADAPTER_CONFIG_NAME}: {described}",
            f"{CONFIG_NAME}: {found.adapter}",
        )
    return found


def identify_weights(checkpoint: Checkpoint) -> str:
    """A SHA-256 that is the same for the same weights; for adapters, on the same base."""
    section = _read_section(checkpoint)
    digest = checkpoint.manifest.files[checkpoint.manifest.weights_name].sha256
    if section is None:
        return digest
    parts = (section.base_sha256, digest, str(section.adapter))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def find_base(checkpoint: Checkpoint) -> Checkpoint:
    """The verified base of a checkpoint of adapters: the folder ``base`` beside its milestones.

    Raises:
        PreflightError: code CHECKPOINT, when it is missing, damaged or another one.
    """
    section = _read_section(checkpoint)
    if section is None:
        raise ValueError(f"{checkpoint.path} needs no base")
    # The real place, also where a link or a path with ".." led to the checkpoint.
    folder = checkpoint.path.resolve().parent.parent / BASE_NAME
    wanted = f"SHA-256 of its {WEIGHTS_NAME}: expected {section.base_sha256}"
    advice = f"put the checkpoint that was fine-tuned into {folder}, without its {STATE_NAME}"
    if not os.path.lexists(folder):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{checkpoint.path} holds adapters, and the model that they belong to is missing",
            wanted,
            f"nothing was loaded; {advice}",
        )
    base = _read_base(folder)
    found = base.manifest.files[WEIGHTS_NAME].sha256
    if found != section.base_sha256:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{checkpoint.path} holds adapters of another model than {folder}",
            f"{wanted}, found {found}",
            f"nothing was loaded; {advice}",
        )
    verify_checkpoint(base, needs_state=False)
    # Dropout changes no weight, so that a run may have changed it.
    if replace(base.model_config, dropout=0.0) != replace(checkpoint.model_config, dropout=0.0):
        raise damage_error(checkpoint.path / CONFIG_NAME, f"not the model of {folder}")
    return base


def _read_base(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, not verified; adapters are no base."""
    if folder.is_symlink():
        raise damage_error(folder, "a symbolic link, which is not followed")
    base = read_checkpoint(folder)
    if base.manifest.weights_name != WEIGHTS_NAME:
        raise damage_error(folder, f"holds adapters, not the {WEIGHTS_NAME} of a base")
    return base


def link_base(
    checkpoint: Checkpoint, output_dir: Path, merge: Callable[[], dict[str, Tensor]] | None = None
) -> Checkpoint:
    """Keep `checkpoint` in ``<output_dir>/base``, without its training state.

    Its files are hard links where the file system has them, else copies. The folder appears whole
    and verified, or not at all. It stays as it is when it is there already.

    Args:
        checkpoint: verified.
        output_dir: the run's folder, which exists and is locked.
        merge: for adapters: all weights of their model, which are written in their place.

    Raises:
        PreflightError: code CHECKPOINT, when another base is there or that is damaged; code
            STORAGE.
    """
    folder = output_dir / BASE_NAME
    if storage.refuse_other_kind(folder, folder=True):
        return _check_kept(folder, checkpoint)
    manifest = checkpoint.manifest
    names = manifest.files.keys() - set(TRAINING_NAMES)
    weights: dict[str, Tensor] = {}
    if manifest.weights_name != WEIGHTS_NAME:
        if merge is None:
            raise ValueError(f"{checkpoint.path} holds adapters, which are no base by themselves")
        names -= {ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME, CONFIG_NAME}
        weights = merge()
    size_bytes = sum(manifest.files[name].bytes for name in names)
    size_bytes += sum(tensor.nbytes for tensor in weights.values())
    with storage.publish_folder(folder, size_bytes) as temporary:
        for name in names:
            checkpoint.open(name, hashed=False).close()  # a plain file of its size
            _link_or_copy(checkpoint.path / name, temporary / name)
        content = manifest.model_dump()
        if weights:
            absent = manifest.files.keys() & set(TRAINING_NAMES)
            kept = {name: content["files"][name] for name in (*names, *sorted(absent))}
            content["files"] = kept | _write_merged(checkpoint, temporary, weights)
            content["format_version"] = FORMAT_VERSION
            content[_MERGED_FROM] = identify_weights(checkpoint)
        (temporary / MANIFEST_NAME).write_bytes(render_manifest(content))
        verify_checkpoint(read_checkpoint(temporary), needs_state=False)
    return read_checkpoint(folder)


def _check_kept(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The verified base in `folder`, which is that of `checkpoint`, or is `checkpoint` itself."""
    base = _read_base(folder)
    wanted, found = identify_weights(checkpoint), base.manifest.files[WEIGHTS_NAME].sha256
    # Numbers that are merged again on another machine may differ in the last bit. Where they came
    # from says which they are.
    merged_from = (base.manifest.model_extra or {}).get(_MERGED_FROM)
    if wanted not in (found, merged_from):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{folder} holds another model than {checkpoint.path}",
            f"SHA-256 of its weights: there {merged_from or found}, here {wanted}",
            "nothing was changed; choose another --output-dir",
        )
    verify_checkpoint(base, needs_state=False)
    return base


def _write_merged(
    checkpoint: Checkpoint, folder: Path, weights: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """All weights and a ``config.json`` without adapters, in the place of the adapters' files."""
    check_finite(weights)
    file = TensorFile(WEIGHTS_NAME, take_rows(weights, ONE_RANK), WEIGHT_DTYPES)
    file.create(folder)
    file.write(folder)
    writer = FolderWriter(folder)
    writer.files[file.name] = file.describe(folder, ONE_RANK)
    config = {key: value for key, value in checkpoint.config.items() if key != "adapter"}
    writer.write(CONFIG_NAME, render_json(config))
    return {name: entry.model_dump() for name, entry in writer.files.items()}


def _link_or_copy(source: Path, target: Path) -> None:
    """Neither of the two names changes its file: checkpoints are written once."""
    try:
        if not os.access(source, os.W_OK):  # what is published is opened again to be fsynced
            raise PermissionError
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another disk, or a file system without hard links
        shutil.copyfile(source, target, follow_symlinks=False)


def read_peft_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter that PEFT saved: what it describes, and its weights by PEFT's names.

    Raises:
        PreflightError: code CHECKPOINT, when a file is missing or damaged, or when the adapter is
            of a kind or for layers that models here do not have.
    """
    path = folder / ADAPTER_CONFIG_NAME
    try:
        with storage.open_regular(path) as file:
            raw = file.read(strict_json.MAX_JSON_BYTES + 1)
        adapter = parse_adapter_config(strict_json.parse_json(raw))
    except (OSError, ValueError) as error:
        raise damage_error(path, getattr(error, "strerror", None) or str(error)) from None
    path = folder / ADAPTER_WEIGHTS_NAME
    try:
        with storage.open_regular(path) as file:
            shapes = read_shapes(path, file)
            adapter = _check_peft_shapes(shapes, adapter)
            file.seek(0)
            return adapter, read_weights(path, file, str, shapes)
    except (OSError, ValueError) as error:
        raise damage_error(path, getattr(error, "strerror", None) or str(error)) from None


def _check_peft_shapes(shapes: Shapes, adapter: AdapterConfig) -> AdapterConfig:
    """`adapter` with the targets that there are tensors of.

    Raises:
        ValueError: tensors are no adapters of its targets and its rank, or not in pairs.
    """
    halves: dict[str, set[str]] = {}
    found = set()
    for name, shape in shapes.items():
        match = _PEFT_NAME.fullmatch(name)
        if not match or match[3] not in adapter.targets or int(match[2]) >= _MAX_LAYERS:
            raise ValueError(f"no adapter of {', '.join(adapter.targets)}: {name[:100]!r}")
        rank_place = 0 if match[4] == "A" else 1
        if len(shape) != 2 or shape[rank_place] != adapter.rank:
            raise ValueError(f"{name[:100]!r} of {shape} is not of rank {adapter.rank}")
        halves.setdefault(match[1], set()).add(match[4])
        found.add(match[3])
    odd = sorted(layer for layer, half in halves.items() if len(half) < 2)
    if odd or not found:
        raise ValueError(f"A or B is missing: {odd[0][:100] if odd else 'there are no tensors'}")
    return replace(adapter, targets=tuple(sorted(found)))
