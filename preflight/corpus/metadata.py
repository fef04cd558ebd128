"""``metadata.json`` of a data folder: what it lists is verified, what it holds beyond is accepted.

Format v2. A folder of format v1 has the same keys and no others, so one declaration reads both.
The last key is a checksum over all others, so that any flipped bit shows.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.schema import Schema
from preflight.core.storage import DISK_ERRNOS, open_regular, storage_error
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json

FORMAT = "preflight-shards"
VERSION = 2
SPLITS = ("val", "train")  # in the order of building; each split's ids are one stream
METADATA_NAME = "metadata.json"
TOKENIZER_NAME = "tokenizer"  # the folder of the tokenizer's files, beside the splits
# Beside the shards of chats: which tokens are learned, and where each row begins.
MASK_NAME, OFFSETS_NAME = "mask.npy", "offsets.npy"

Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _check_inside(name: str) -> str:
    """ValueError unless `name` is a plain relative path that stays in the data folder."""
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and path.parts
    if not is_plain or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError("not a path within the data folder")
    return name


class TokenizerEntry(Schema):
    """The tokenizer that made the ids.

    ``kind`` is missing in folders without its files. ``asked_vocab_size``, for one made from the
    text: the ids that it was to have.
    """

    name: str
    fingerprint: str
    vocab_size: Count
    end_of_text_id: Count
    kind: str | None = None
    asked_vocab_size: Count | None = None


class ShardEntry(Schema):
    """One shard. ``n_bytes`` counts its file, header included."""

    name: str
    n_tokens: Count
    n_bytes: Count
    sha256: Sha256
    max_id: Count


class OpenShard(Schema):
    """A shard that is not complete yet, in the journal of a build.

    ``sha256`` is of a full shard's header and the tokens so far.
    """

    n_tokens: Count
    max_id: int
    sha256: Sha256


class SplitEntry(Schema):
    """One part of the data. ``n_bytes`` counts its text."""

    n_documents: Count
    n_tokens: Count
    n_bytes: Count
    shards: list[ShardEntry]


class SplitRule(Schema):
    """How the documents were shared out, see `preflight.corpus.split`."""

    val_split: float
    by: str


class SourceEntry(Schema):
    """One source of text."""

    name: str
    size: Count
    sha256: Sha256


class FileEntry(Schema):
    """A file beside the shards, by its path within the data folder with forward slashes."""

    name: Annotated[str, AfterValidator(_check_inside)]
    n_bytes: Count
    sha256: Sha256


class Metadata(Schema):
    """The whole file. Keys that are not declared here are kept."""

    format: Literal["preflight-shards"]
    version: Annotated[int, Field(ge=1, le=VERSION)]
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    shard_size: Count
    document_separator: str | None
    split: SplitRule
    preparation: dict[str, Any] = Field(default_factory=dict)
    sources: list[SourceEntry]
    train: SplitEntry
    val: SplitEntry
    files: list[FileEntry] = Field(default_factory=list)
    checksum: Sha256

    def get_split(self, name: str) -> SplitEntry:
        """The part called ``train`` or ``val``."""
        return {"train": self.train, "val": self.val}[name]


def read_metadata(data_dir: Path) -> Metadata:
    """The metadata, checked against its checksum and its declaration.

    Raises:
        PreflightError: code DATA.
    """
    path = data_dir / METADATA_NAME
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        content = parse_json(raw)
        _refuse_newer(content, data_dir)
        metadata = Metadata.read(content)
        for name in SPLITS:
            _check_split(metadata.get_split(name), name)
        if render_metadata(content) != raw:
            raise ValueError("its checksum does not match its content")
    except OSError as error:
        raise PreflightError(
            ExitCode.DATA,
            f"{path}: {error.strerror}",
            "give --text-file to build the data folder",
        ) from None
    except ValueError as error:
        raise damaged_error(path, str(error)) from None
    return metadata


def _refuse_newer(content: Any, data_dir: Path) -> None:
    if isinstance(content, dict) and content.get("format") == FORMAT:
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            raise PreflightError(
                ExitCode.DATA,
                f"{data_dir} was made by a newer Preflight (format {str(version)[:20]}, this one "
                f"reads up to {VERSION})",
                "use that one, or choose another --data-dir",
            )


def _check_split(part: SplitEntry, name: str) -> None:
    for index, entry in enumerate(part.shards):
        if entry.name != f"shard_{index:05d}.npy":
            raise ValueError(f"{name}: shard {index} has an unexpected name")
    if sum(entry.n_tokens for entry in part.shards) != part.n_tokens:
        raise ValueError(f"{name}: n_tokens is not the sum over its shards")


def render_metadata(content: dict[str, Any]) -> bytes:
    """metadata.json's bytes, with the checksum of all other keys as the last."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": digest}, indent=2, allow_nan=False).encode() + b"\n"


def damaged_error(path: Path, what: str) -> PreflightError:
    """The error to raise for a damaged file of a data folder."""
    return PreflightError(
        ExitCode.DATA,
        f"{path} is damaged: {what}",
        "give --text-file to rebuild the data folder, or restore the file",
    )


def unreadable_error(path: Path, error: OSError) -> PreflightError:
    """The error to raise for a file that cannot be read: the disk's fault, or the file's."""
    if error.errno in DISK_ERRNOS:
        return storage_error(path, error)
    return damaged_error(path, error.strerror or str(error))
