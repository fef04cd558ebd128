"""``manifest.json``: the step, the losses, the versions, and the size and SHA-256 of every file.

The format is open. A manifest may list any files beside the required ones and hold any further
keys: readers verify every file that it lists, never read a file that it does not list, and keep
the keys that they do not know. SHA-256 detects accidents, not attackers, so a forged manifest must
be harmless too: file names are plain names within the folder, and their number is limited.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    field_validator,
    model_serializer,
)

from preflight import __version__
from preflight.checkpoints.damage import damage_error
from preflight.core import storage, strict_json
from preflight.core.schema import Schema

WEIGHTS_NAME = "model.safetensors"
# In its place, in the names of the library PEFT, where adapters alone were trained.
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
STATE_NAME = "checkpoint.pt"
OPTIMIZER_NAME = "optimizer.safetensors"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
REQUIRED_NAMES = (WEIGHTS_NAME, STATE_NAME, CONFIG_NAME)
# What only a run that continues needs: a folder without them is enough to generate.
TRAINING_NAMES = (STATE_NAME, OPTIMIZER_NAME)
OWN_NAMES = (
    *REQUIRED_NAMES,
    OPTIMIZER_NAME,
    ADAPTER_WEIGHTS_NAME,
    ADAPTER_CONFIG_NAME,
    MANIFEST_NAME,
)
FOLDER_NAME = re.compile(r"checkpoint-([0-9]+)")
FORMAT_VERSION = 3
OPTIMIZER_FILE_VERSION = 3  # before, the optimizer was within checkpoint.pt
MAX_FILES = 256

Count = Annotated[int, Field(ge=0, lt=2**63)]
Step = Annotated[int, Field(ge=0, le=2**53)]  # exact as a float, too
Loss = Annotated[float, Field(allow_inf_nan=False)]
# One path component of portable characters; neither a hidden file nor "." nor "..".
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
_FILE_NAME = TypeAdapter(FileName)


class FileEntry(Schema):
    """Size and SHA-256 (lower-case hexadecimal) of one file.

    With `chunk_bytes` the SHA-256 is that of the SHA-256s (32 bytes each) of the file's chunks of
    that size, so that several ranks can hash a file at once.
    """

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    chunk_bytes: Annotated[int, Field(ge=2**10, lt=2**40)] | None = None

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.chunk_bytes is None:
            del content["chunk_bytes"]
        return content


class Manifest(Schema):
    """The content of ``manifest.json`` except its own checksum. Losses are nats per token."""

    format: Literal["preflight-checkpoint"]
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    step: Step
    losses: dict[str, Loss | None]
    files: Annotated[dict[FileName, FileEntry], Field(max_length=MAX_FILES)]
    versions: dict[str, str]

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        is_adapter = ADAPTER_WEIGHTS_NAME in files
        if is_adapter and WEIGHTS_NAME in files:
            raise ValueError(f"{WEIGHTS_NAME} and {ADAPTER_WEIGHTS_NAME} exclude each other")
        weights = (ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME) if is_adapter else (WEIGHTS_NAME,)
        missing = [name for name in (*weights, STATE_NAME, CONFIG_NAME) if name not in files]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be listed")
        if MANIFEST_NAME in files:
            raise ValueError(f"{MANIFEST_NAME} cannot list itself")
        return files

    @property
    def weights_name(self) -> str:
        """The file with what was trained: all weights, or adapters."""
        return ADAPTER_WEIGHTS_NAME if ADAPTER_WEIGHTS_NAME in self.files else WEIGHTS_NAME


def build_manifest(
    step: int, losses: Mapping[str, float | None], files: dict[str, FileEntry]
) -> Manifest:
    """The manifest of a checkpoint that this version writes.

    Raises:
        ValueError: it would not be valid, for example because it lists too many files.
    """
    versions = {
        "preflight": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return Manifest(
        format="preflight-checkpoint",
        format_version=FORMAT_VERSION,
        step=step,
        losses=drop_non_finite(losses),
        files=files,
        versions=versions,
    )


def check_plain_name(name: str) -> None:
    """Raise ValueError for a file name that a manifest may not list."""
    _FILE_NAME.validate_python(name)


def drop_non_finite(losses: Mapping[str, float | None]) -> dict[str, float | None]:
    """The losses as JSON can hold them: None in place of NaN and infinity."""
    return {
        name: float(loss) if loss is not None and math.isfinite(loss) else None
        for name, loss in losses.items()
    }


def render_json(content: Any) -> bytes:
    """Readable JSON that ends with a newline."""
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def render_manifest(content: dict[str, Any]) -> bytes:
    """The bytes of ``manifest.json``. Its last key is the SHA-256 of the rendering without it.

    A flipped bit in a step or a loss therefore shows as well.
    """
    return render_json(content | {"checksum": hashlib.sha256(render_json(content)).hexdigest()})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. No other file is opened.

    Raises:
        PreflightError: code CHECKPOINT, when it is missing, damaged, impossible or of a newer
            format.
    """
    path = folder / MANIFEST_NAME
    try:
        with storage.open_regular(path) as file:
            raw = file.read(strict_json.MAX_JSON_BYTES + 1)
        content = strict_json.parse_json(raw)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        _refuse_newer_version(content.get("format_version"))
        checksum = content.pop("checksum", None)
        manifest = Manifest.read(content)
        if checksum is None or render_manifest(content) != raw:
            raise ValueError("its checksum does not match its content")
        if FOLDER_NAME.fullmatch(folder.name) and folder.name != f"checkpoint-{manifest.step}":
            raise ValueError(f"it belongs to step {manifest.step}")
    except RecursionError:
        raise damage_error(path, "nested too deeply") from None
    except (OSError, ValueError) as error:
        raise damage_error(path, getattr(error, "strerror", None) or str(error)) from None
    return manifest


def _refuse_newer_version(version: Any) -> None:
    if isinstance(version, int) and FORMAT_VERSION < version < 2**63:
        raise ValueError(
            f"written by a newer Preflight (format {version}, this one reads up to "
            f"{FORMAT_VERSION}): update Preflight"
        )
