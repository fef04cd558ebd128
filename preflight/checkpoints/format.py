"""A checkpoint folder: verify it, and load what it holds.

    <output_dir>/milestones/checkpoint-<step>/
        model.safetensors      the weights; or adapters, see adapters.py
        optimizer.safetensors  the optimizer's tensors
        checkpoint.pt          the rest of the training state: tensors and plain types only
        config.json            model, tokenizer and training settings
        (any name)             the files of the tokenizer
        manifest.json          step, losses, versions, and the size and SHA-256 of the other files

All ranks write the files of tensors together, and rank 0 the others. A folder is built beside its
final place and is renamed into it after every byte has been read back.
Damage that happens later shows in the hashes. Nothing in a checkpoint is ever executed.
``docs/formats.md`` describes the format for other programs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import AfterValidator, Field
from torch import Tensor

from preflight.checkpoints import v1
from preflight.checkpoints.damage import damage_error, describe_path
from preflight.checkpoints.hashing import hash_opened, hash_together
from preflight.checkpoints.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    TRAINING_NAMES,
    FileEntry,
    Manifest,
    drop_non_finite,
    read_manifest,
    render_manifest,
)
from preflight.checkpoints.ranks import ONE_RANK, Ranks, do_together
from preflight.checkpoints.state import read_state
from preflight.checkpoints.weights import (
    STATE_DTYPES,
    Shapes,
    read_shapes,
    read_weights,
)
from preflight.core import storage, strict_json
from preflight.core.commands import format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.settings import ModelConfig, model_config_from_dict

MILESTONES_NAME = "milestones"
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
        identity = _identify(name, entry, info)
        if hashed and identity not in _verified:
            self._compare_hash(name, hash_opened(file, entry.chunk_bytes))
            _verified.add(identity)

    def _compare_hash(self, name: str, found: str) -> None:
        """Raise PreflightError (code CHECKPOINT) where a file's SHA-256 is not the manifest's."""
        expected = self.manifest.files[name].sha256
        if found != expected:
            raise damage_error(
                self.path / name,
                "its content has changed",
                f"SHA-256: expected {expected}, found {found}",
            )

    def verify_together(self, name: str, ranks: Ranks) -> None:
        """Compare the SHA-256 of a file with the manifest; each rank hashes a share of its chunks.

        Raises:
            PreflightError: code CHECKPOINT, on every rank.
        """
        entry = self.manifest.files[name]

        def look() -> tuple[int | str, ...]:
            with self.open(name, hashed=entry.chunk_bytes is None) as file:
                return _identify(name, entry, os.fstat(file.fileno()))

        identity = do_together(ranks, look)
        if entry.chunk_bytes is None or all(ranks.gather(identity in _verified)):
            return
        opening = functools.partial(self.open, name, hashed=False)
        self._compare_hash(name, hash_together(opening, entry.chunk_bytes, ranks))
        _verified.add(identity)


def _identify(name: str, entry: FileEntry, info: os.stat_result) -> tuple[int | str, ...]:
    """The same for the same file as long as its size and its times are the same."""
    times = info.st_mtime_ns, info.st_ctime_ns
    return name, entry.sha256, info.st_dev, info.st_ino, info.st_size, *times


def forget_verified() -> None:
    """Make every file be hashed again when it is next opened."""
    _verified.clear()


def read_checkpoint(folder: Path) -> Checkpoint:
    """The folder as its manifest describes it. No other file is opened.

    Raises:
        PreflightError: code CHECKPOINT, when the manifest is missing or not valid.
    """
    return Checkpoint(folder, read_manifest(folder))


def verify_checkpoint(
    checkpoint: Checkpoint, *, needs_state: bool = True, ranks: Ranks = ONE_RANK
) -> None:
    """Compare every file that the manifest lists with it: all sizes, then all SHA-256.

    Args:
        checkpoint: its manifest is valid.
        needs_state: False accepts a folder from which ``checkpoint.pt`` or
            ``optimizer.safetensors`` was removed.
        ranks: all of them call this, and share the hashing.

    Raises:
        PreflightError: code CHECKPOINT, naming the file, what was expected and what was found; the
            same on every rank.
    """

    def compare_sizes() -> list[str]:
        names = list(checkpoint.manifest.files)
        if not needs_state:
            gone = [n for n in TRAINING_NAMES if not os.path.lexists(checkpoint.path / n)]
            names = [name for name in names if name not in gone]
        for name in names:
            checkpoint.open(name, hashed=False).close()
        return names

    for name in do_together(ranks, compare_sizes):
        checkpoint.verify_together(name, ranks)


def load_weights(
    checkpoint: Checkpoint,
    expected_shapes: Shapes | None = None,
    rows: Mapping[str, slice] | None = None,
) -> dict[str, Tensor]:
    """The weights on the CPU: verified, finite, and of the expected names and shapes.

    Of adapters, these alone. The names are those since format v2, also for a checkpoint of format
    v1.

    Args:
        checkpoint: verified by all ranks together, where there are several: this hashes alone.
        expected_shapes: of the whole tensors; None accepts all.
        rows: that are read of each tensor (see `rows.find_rows`); of any other, all.

    Raises:
        PreflightError: code CHECKPOINT, naming the first tensors that differ.
    """
    is_v1 = checkpoint.manifest.format_version == 1
    rename = v1.rename_weight if is_v1 else lambda name: name
    name = checkpoint.manifest.weights_name
    with checkpoint.open(name) as file:
        return read_weights(checkpoint.path / name, file, rename, expected_shapes, rows)


def load_optimizer(
    checkpoint: Checkpoint, rows: Mapping[str, slice] | None = None
) -> dict[str, Tensor]:
    """The optimizer's tensors on the CPU by ``<parameter>.<key>``: verified and finite.

    Since format v3; before, they are in the training state.

    Args:
        checkpoint: as in `load_weights`.
        rows: as in `load_weights`.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    with checkpoint.open(OPTIMIZER_NAME) as file:
        path = checkpoint.path / OPTIMIZER_NAME
        return read_weights(path, file, str, None, rows, STATE_DTYPES.keys())


def read_optimizer_shapes(checkpoint: Checkpoint) -> Shapes:
    """Those of the tensors of `load_optimizer`, none of which is read.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    with checkpoint.open(OPTIMIZER_NAME) as file:
        return read_shapes(checkpoint.path / OPTIMIZER_NAME, file)


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
