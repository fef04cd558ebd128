"""Writes a checkpoint folder; with several ranks, all of them do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from preflight.checkpoints.adapter_config import render_adapter_config
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint, read_checkpoint
from preflight.checkpoints.manifest import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    OWN_NAMES,
    STATE_NAME,
    WEIGHTS_NAME,
    build_manifest,
    check_plain_name,
    read_manifest,
    render_json,
    render_manifest,
)
from preflight.checkpoints.ranks import ONE_RANK, Ranks, do_first, do_together
from preflight.checkpoints.replacing import (
    REPLACED_PREFIX,
    prepare_parent,
    restore_replaced,
    set_aside,
)
from preflight.checkpoints.rows import Rows, take_rows
from preflight.checkpoints.state import estimate_state_bytes
from preflight.checkpoints.tensor_file import TensorFile
from preflight.checkpoints.weights import STATE_DTYPES, WEIGHT_DTYPES, check_finite
from preflight.checkpoints.writing import FolderWriter
from preflight.core import storage
from preflight.core.errors import PreflightError
from preflight.settings import model_config_from_dict
from preflight.settings.finetuning import AdapterConfig

T = TypeVar("T")
_SPARE_BYTES = 2**20  # manifest, config, file system blocks


@dataclass(frozen=True)
class _Contents:
    """What is to be written: files of tensors, small files by name, and the state of rank 0."""

    tensor_files: list[TensorFile]
    small_files: dict[str, bytes]
    state: dict[str, Any]
    state_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Disk space for all of it."""
        tensors = sum(file.size_bytes for file in self.tensor_files)
        return tensors + sum(map(len, self.small_files.values())) + self.state_bytes + _SPARE_BYTES


def save_checkpoint(
    output_dir: Path,
    step: int,
    weights: Mapping[str, Tensor | Rows],
    training_state: dict[str, Any],
    config: dict[str, Any],
    losses: dict[str, float | None],
    tokenizer: Any | None = None,
    *,
    optimizer: Mapping[str, Tensor | Rows] | None = None,
    adapter: AdapterConfig | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    ranks: Ranks = ONE_RANK,
) -> Checkpoint:
    """Write the state after `step` updates, read it back, and publish it under its name.

    A checkpoint of the same step is replaced. If its weights are equal, its losses are kept.

    Args:
        output_dir: the run's folder. It must exist: if its mount is lost, it is not created again.
        step: updates done.
        weights: floating-point tensors on any device, whole or sharded over the ranks; with
            `adapter`, its tensors alone.
        training_state: tensors and plain types, nested in dicts, lists and tuples; that of rank 0.
        config: plain JSON types; ``model`` holds the architecture.
        losses: nats per token by name, among them ``val_loss``. NaN and infinity become None.
        tokenizer: its ``save(folder)`` writes its files and returns their paths.
        optimizer: its tensors by ``<parameter>.<key>``, like `weights`; unset: there is none.
        adapter: what `weights` are, if not all weights. `config` describes it under ``adapter``.
        extra_files: more files by their plain names, for example ``chat_template.jinja``.
        ranks: all of them call this with the same state, and write it together.

    Raises:
        PreflightError: code STORAGE when the disk is full, failing or read-only, code DIVERGED
            when a weight is not finite; the same on every rank. Every earlier checkpoint is then
            unchanged.
        TypeError, ValueError: the arguments cannot be stored.
    """
    folder = output_dir / MILESTONES_NAME / f"checkpoint-{step}"

    def prepare() -> _Contents:
        model_config_from_dict(config.get("model"))
        small = {CONFIG_NAME: render_json(config), **_check_extra_files(extra_files or {})}
        if adapter is not None:
            small[ADAPTER_CONFIG_NAME] = render_adapter_config(adapter, config, weights)
        name = WEIGHTS_NAME if adapter is None else ADAPTER_WEIGHTS_NAME
        mine = take_rows(weights, ranks)
        files = [TensorFile(name, mine, WEIGHT_DTYPES)]
        check_finite(mine)
        if optimizer is not None:
            files.append(TensorFile(OPTIMIZER_NAME, take_rows(optimizer, ranks), STATE_DTYPES))
        return _Contents(files, small, training_state, estimate_state_bytes(training_state))

    contents = do_together(ranks, prepare)

    def explained(action: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        def act() -> T:
            with storage.explain_errors(folder, contents.needed_bytes):
                return action(*arguments)

        return act

    with contextlib.ExitStack() as stack:
        begin = explained(_begin, stack, folder, contents.needed_bytes)
        temporary = do_first(ranks, begin)
        writer = FolderWriter(temporary)
        do_first(ranks, explained(_write_small, writer, contents, tokenizer))
        for file in contents.tensor_files:
            do_together(ranks, explained(file.write, temporary))
        for file in contents.tensor_files:
            writer.files[file.name] = file.describe(temporary, ranks)
        do_first(ranks, explained(_finish_folder, writer, step, losses, folder))
        do_first(ranks, explained(stack.close))  # it gets its name
    return do_together(ranks, lambda: read_checkpoint(folder))


def _begin(stack: contextlib.ExitStack, folder: Path, needed_bytes: int) -> Path:
    """A temporary folder, which becomes `folder` when `stack` closes without an error."""
    prepare_parent(folder, needed_bytes)
    stack.callback(restore_replaced, folder.parent)
    set_aside(folder)
    return stack.enter_context(storage.publish_folder(folder, needed_bytes))


def _write_small(writer: FolderWriter, contents: _Contents, tokenizer: Any | None) -> None:
    """Write all but the tensors, whose files are made in their full size."""
    for tensor_file in contents.tensor_files:
        tensor_file.create(writer.folder)
    if tokenizer is not None:
        writer.save_tokenizer(tokenizer)
    for name, content in contents.small_files.items():
        writer.write(name, content)
    with writer.create(STATE_NAME, contents.state_bytes) as file:
        torch.save(contents.state, file)  # type: ignore[arg-type]  # it only writes


def _check_extra_files(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """`files`; ValueError for a name that is not plain, or that a checkpoint uses itself."""
    for name in files:
        check_plain_name(name)
        if name in OWN_NAMES:
            raise ValueError(f"{name} is a checkpoint's own file")
    return files


def _finish_folder(
    writer: FolderWriter, step: int, losses: dict[str, float | None], folder: Path
) -> None:
    """Write the manifest, read every file back, and make room for `folder` to get its name."""
    manifest = build_manifest(step, losses, dict(writer.files))
    with contextlib.suppress(PreflightError):  # there is no checkpoint of this step yet
        old = read_manifest(folder)
        if old.files.get(name := manifest.weights_name) == manifest.files[name]:
            new = {name: loss for name, loss in manifest.losses.items() if loss is not None}
            known = manifest.losses | old.losses | new
            manifest = manifest.model_copy(update={"losses": known})
    writer.write(MANIFEST_NAME, render_manifest(manifest.model_dump()))
    writer.read_back()
    if os.path.lexists(folder):
        os.rename(folder, folder.with_name(REPLACED_PREFIX + folder.name))
        storage.fsync_folder(folder.parent)
