"""A checkpoint folder: save it, verify it, and load what it holds.

    <output_dir>/milestones/checkpoint-<step>/
        model.safetensors  the weights; or adapters, see adapters.py
        checkpoint.pt      the training state: tensors and plain types only
        config.json        model, tokenizer and training settings
        (any name)         the files of the tokenizer
        manifest.json      step, losses, versions, and the size and SHA-256 of the other files

A folder is built beside its final place and is renamed into it after every byte has been read back.
Damage that happens later shows in the hashes. Nothing in a checkpoint is ever executed.
``docs/formats.md`` describes the format for other programs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from preflight.checkpoints import v1
from preflight.checkpoints.adapter_config import render_adapter_config
from preflight.checkpoints.damage import damage_error, describe_path
from preflight.checkpoints.manifest import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    OWN_NAMES,
    STATE_NAME,
    WEIGHTS_NAME,
    Manifest,
    build_manifest,
    check_plain_name,
    drop_non_finite,
    read_manifest,
    render_json,
    render_manifest,
)
from preflight.checkpoints.replacing import (
    REPLACED_PREFIX,
    prepare_parent,
    restore_replaced,
    set_aside,
)
from preflight.checkpoints.state import estimate_state_bytes, read_state
from preflight.checkpoints.weights import Shapes, build_header, iterate_bytes, read_weights
from preflight.checkpoints.writing import FolderWriter
from preflight.core import storage, strict_json
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.settings import ModelConfig, model_config_from_dict
from preflight.settings.finetuning import AdapterConfig

MILESTONES_NAME = "milestones"
_SPARE_BYTES = 2**20  # manifest, config, file system blocks
# The files whose hash this process has checked, by identity: a start hashes each file once.
_verified: set[tuple[int | str, ...]] = set()


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


_Name = Annotated[str, Field(max_length=1000), AfterValidator(_check_printable)]


class _TokenizerSection(Schema):
    name: _Name
    fingerprint: _Name
    kind: _Name = ""  # format v1 has none


class _ConfigSections(Schema):
    """The parts of ``config.json`` that every reader relies on."""

    model: dict[str, Any]
    tokenizer: _TokenizerSection


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with a valid manifest. Its other files are verified when opened."""

    path: Path
    manifest: Manifest = field(repr=False, compare=False)

    @property
    def step(self) -> int:
        """Updates done."""
        return self.manifest.step

    @property
    def val_loss(self) -> float | None:
        """Validation loss in nats per token. None: not evaluated."""
        return self.manifest.losses.get("val_loss")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, which describes a possible model and a tokenizer.

        Raises:
            PreflightError: code CHECKPOINT.
        """
        with self.open(CONFIG_NAME) as file:
            raw = file.read(strict_json.MAX_JSON_BYTES + 1)
        try:
            config = strict_json.parse_json(raw)
            model_config_from_dict(_ConfigSections.read(config).model)
        except ValueError as error:
            raise damage_error(self.path / CONFIG_NAME, str(error)) from None
        return config

    @property
    def model_config(self) -> ModelConfig:
        """The architecture that ``config.json`` describes."""
        return model_config_from_dict(self.config["model"])

    def open(self, name: str, *, hashed: bool = True) -> IO[bytes]:
        """Open a file of the checkpoint at its beginning, after comparing it with the manifest.

        Args:
            name: as the manifest lists it; ``name in checkpoint.manifest.files`` asks for it.
            hashed: compare the SHA-256 too, and not the size alone. A file is hashed once per
                process as long as its size and times stay the same.

        Raises:
            PreflightError: code CHECKPOINT, when the manifest does not list the file, or when the
                file is missing, is no plain file or differs.
        """
        path = self.path / name
        if name not in self.manifest.files:
            raise damage_error(path, f"{MANIFEST_NAME} does not list it")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(storage.open_regular(path))
                self._compare(name, file, hashed)
                file.seek(0)
            except OSError as error:
                raise damage_error(path, error.strerror or str(error)) from None
            stack.pop_all()
        return file

    def _compare(self, name: str, file: Any, hashed: bool) -> None:
        """Raise PreflightError (code CHECKPOINT) where an open file differs from the manifest."""
        path, entry = self.path / name, self.manifest.files[name]
        info = os.fstat(file.fileno())
        if info.st_size != entry.bytes:
            raise damage_error(
                path,
                f"{describe_path(path, MANIFEST_NAME)} of another size",
                f"bytes: expected {entry.bytes:,}, found {info.st_size:,}",
            )
        times = info.st_mtime_ns, info.st_ctime_ns
        identity = (name, entry.sha256, info.st_dev, info.st_ino, info.st_size, *times)
        if hashed and identity not in _verified:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise damage_error(
                    path,
                    "its content has changed",
                    f"SHA-256: expected {entry.sha256}, found {found}",
                )
            _verified.add(identity)


def forget_verified() -> None:
    """Make every file be hashed again when it is next opened."""
    _verified.clear()


def read_checkpoint(folder: Path) -> Checkpoint:
    """The folder as its manifest describes it. No other file is opened.

    Raises:
        PreflightError: code CHECKPOINT, when the manifest is missing or not valid.
    """
    return Checkpoint(folder, read_manifest(folder))


def verify_checkpoint(checkpoint: Checkpoint, *, needs_state: bool = True) -> None:
    """Compare every file that the manifest lists with it: all sizes, then all SHA-256.

    Args:
        checkpoint: its manifest is valid.
        needs_state: False accepts a folder from which ``checkpoint.pt`` was removed.

    Raises:
        PreflightError: code CHECKPOINT, naming the file, what was expected and what was found.
    """
    names = list(checkpoint.manifest.files)
    if not needs_state and not os.path.lexists(checkpoint.path / STATE_NAME):
        names.remove(STATE_NAME)
    for hashed in (False, True):
        for name in names:
            checkpoint.open(name, hashed=hashed).close()


def load_weights(
    checkpoint: Checkpoint, expected_shapes: Shapes | None = None
) -> dict[str, Tensor]:
    """The weights on the CPU: verified, finite, and of the expected names and shapes.

    Of adapters, these alone. The names are those of format v2, also for a checkpoint of format v1.

    Raises:
        PreflightError: code CHECKPOINT, naming the first tensors that differ.
    """
    is_v1 = checkpoint.manifest.format_version == 1
    rename = v1.rename_weight if is_v1 else lambda name: name
    name = checkpoint.manifest.weights_name
    with checkpoint.open(name) as file:
        return read_weights(checkpoint.path / name, file, rename, expected_shapes)


class WeightsOnlyError(PreflightError):
    """A checkpoint has no training state. Nothing is damaged."""


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training state on the CPU: tensors and plain types. Nothing in the file is executed.

    Raises:
        PreflightError: code CHECKPOINT, also for a folder that holds the weights only.
    """
    path = checkpoint.path / STATE_NAME
    state: dict[str, Any] = {}
    if os.path.lexists(path):
        with checkpoint.open(STATE_NAME) as file:
            state = read_state(path, file)
    if not state:  # that of a model that was imported is empty
        what = "is empty" if os.path.lexists(path) else "is missing"
        raise WeightsOnlyError(
            ExitCode.CHECKPOINT,
            f"{path} {what}: training cannot continue from weights only",
            "weights are enough to generate: "
            + format_command("--generate", "--checkpoint-path", checkpoint.path),
            "to continue training, name another checkpoint with --resume-from; to begin a run with "
            "these weights, another --output-dir and --init-from",
        )
    return state


def save_checkpoint(
    output_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    training_state: dict[str, Any],
    config: dict[str, Any],
    losses: dict[str, float | None],
    tokenizer: Any | None = None,
    *,
    adapter: AdapterConfig | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Write the state after `step` updates, read it back, and publish it under its name.

    A checkpoint of the same step is replaced. If its weights are equal, its losses are kept.

    Args:
        output_dir: the run's folder. It must exist: if its mount is lost, it is not created again.
        step: updates done.
        weights: floating-point tensors on any device; with `adapter`, its tensors alone.
        training_state: tensors and plain types, nested in dicts, lists and tuples.
        config: plain JSON types; ``model`` holds the architecture.
        losses: nats per token by name, among them ``val_loss``. NaN and infinity become None.
        tokenizer: its ``save(folder)`` writes its files and returns their paths.
        adapter: what `weights` are, if not all weights. `config` describes it under ``adapter``.
        extra_files: more files by their plain names, for example ``chat_template.jinja``.

    Raises:
        PreflightError: code STORAGE when the disk is full, failing or read-only, code DIVERGED
            when a weight is not finite. Every earlier checkpoint is then unchanged.
        TypeError, ValueError: the arguments cannot be stored.
    """
    model_config_from_dict(config.get("model"))
    more = {CONFIG_NAME: render_json(config), **_check_extra_files(extra_files or {})}
    weights_name = WEIGHTS_NAME
    if adapter is not None:
        weights_name = ADAPTER_WEIGHTS_NAME
        more[ADAPTER_CONFIG_NAME] = render_adapter_config(adapter, config, weights)
    header = build_header(weights)
    weights_bytes = len(header) + sum(tensor.nbytes for tensor in weights.values())
    state_bytes = estimate_state_bytes(training_state)
    needed_bytes = weights_bytes + state_bytes + sum(map(len, more.values())) + _SPARE_BYTES
    folder = output_dir / MILESTONES_NAME / f"checkpoint-{step}"
    prepare_parent(folder, needed_bytes)
    try:
        set_aside(folder)
        with storage.publish_folder(folder, needed_bytes) as temporary:
            writer = FolderWriter(temporary)
            if tokenizer is not None:
                writer.save_tokenizer(tokenizer)
            for name, content in more.items():
                writer.write(name, content)
            chunks = itertools.chain([header], iterate_bytes(weights))
            writer.write_chunks(weights_name, chunks, weights_bytes)
            with writer.create(STATE_NAME, state_bytes) as file:
                torch.save(training_state, file)  # type: ignore[arg-type]  # it only writes
            _finish_folder(writer, step, losses, folder)
    finally:
        restore_replaced(folder.parent)
    return read_checkpoint(folder)


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


def record_validation(checkpoint: Checkpoint, val_loss: float) -> Checkpoint:
    """Add the validation loss, known only after the save, to the manifest in one step.

    Raises:
        PreflightError: code STORAGE; the manifest is then unchanged.
    """
    losses = checkpoint.manifest.losses | drop_non_finite({"val_loss": val_loss})
    manifest = checkpoint.manifest.model_copy(update={"losses": losses})
    content = render_manifest(manifest.model_dump())
    with storage.publish_file(checkpoint.path / MANIFEST_NAME, len(content)) as file:
        file.write(content)
    return Checkpoint(checkpoint.path, manifest)
