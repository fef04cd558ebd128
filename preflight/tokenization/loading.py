"""Tokenizers by name, and from the files in a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings.kinds import TOKENIZERS
from preflight.tokenization.protocol import Tokenizer


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, one object per name and process.

    Raises:
        PreflightError: code FLAGS for an unknown name, or for a vocabulary that is neither cached
            nor reachable (the message says which file to put where); code STORAGE for a damaged
            built-in vocabulary.
    """
    return TOKENIZERS.load(name).load(name)


def load_saved_tokenizer(folder: Path, facts: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint, from the files that `Tokenizer.save` wrote there.

    Args:
        folder: the checkpoint's.
        facts: the ``tokenizer`` section of its ``config.json``. Without a ``kind`` it is of format
            v1, which has no files: the tokenizer is then loaded by its name.

    Raises:
        PreflightError: code CHECKPOINT for an unknown kind, and for files that are missing,
            damaged or not those of the tokenizer that `facts` describe; for format v1 as
            `load_tokenizer`.
    """
    if "kind" not in facts:
        return load_tokenizer(facts["name"])
    # The tokenizer's own row first: to look at another imports the library that it needs.
    for name in sorted(TOKENIZERS.names(), key=lambda name: name != facts["name"]):
        kind = TOKENIZERS.load(name)
        if kind.kind == facts["kind"]:
            return kind.load_saved(folder, facts)
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"{folder} needs a tokenizer of kind {str(facts['kind'])[:60]!r}, which is unknown here",
        "it was made by a newer Preflight; use that one",
    )
