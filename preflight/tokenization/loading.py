"""Tokenizers by name, and from the files in a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings.kinds import TOKENIZER_FILES, TOKENIZERS
from preflight.tokenization.protocol import Tokenizer


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, or in the file of that name, one object per process.

    Raises:
        PreflightError: code FLAGS for an unknown name, for a file that holds no tokenizer or needs
            a library that is not there, or for a vocabulary that is neither cached nor reachable
            (the message says which file to put where); code STORAGE for a damaged built-in
            vocabulary.
    """
    return (find_file_kind(name) or TOKENIZERS.load(name)).load(name)


def find_file_kind(name: str) -> type[Tokenizer] | None:
    """The kind of tokenizer that a file of this name holds, or None if it is no file's name."""
    suffix = Path(name).suffix
    return TOKENIZER_FILES.load(suffix) if suffix in TOKENIZER_FILES.names() else None


def load_saved_tokenizer(folder: Path, facts: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint, from the files that `Tokenizer.save` wrote there.

    Args:
        folder: the checkpoint's, or that of the tokenizer in a data folder.
        facts: `Tokenizer.describe` of it, as ``config.json`` or ``metadata.json`` has it. Without a
            ``kind`` it is of format v1, which has no files: the tokenizer is loaded by its name.

    Raises:
        PreflightError: code CHECKPOINT for an unknown kind, and for files that are missing,
            damaged or not those of the tokenizer that `facts` describe; for format v1 as
            `load_tokenizer`.
    """
    if "kind" not in facts:
        return load_tokenizer(facts["name"])
    # The tokenizer's own row first: to look at another imports the library that it needs.
    names = sorted(TOKENIZERS.names(), key=lambda name: name != facts["name"])
    rows = [(TOKENIZERS, name) for name in names]
    for registry, name in rows + [(TOKENIZER_FILES, name) for name in TOKENIZER_FILES.names()]:
        kind = registry.load(name)
        if kind.kind == facts["kind"]:
            return kind.load_saved(folder, facts)
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"{folder} needs a tokenizer of kind {str(facts['kind'])[:60]!r}, which is unknown here",
        "it was made by a newer Preflight; use that one",
    )
