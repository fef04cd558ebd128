"""The checkpoint whose weights a run begins with: `--init-from`, or `--from` of a fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from generate import build_empty_model
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.ranks import ONE_RANK, Ranks
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.metadata import METADATA_NAME, read_metadata
from preflight.corpus.shards import find_tokenizer_change
from preflight.settings import ControlSettings, DataSettings
from preflight.tokenization import TokenizerChoice
from preflight.tokenization.chat_template import (
    MAX_TEMPLATE_BYTES,
    TEMPLATE_NAME,
    ChatTemplate,
    parse_chat_template,
)
from preflight.training.merging import load_merged_weights


def open_base(
    named: str | None, output_dir: Path, flag: str, ranks: Ranks = ONE_RANK
) -> Checkpoint:
    """The checkpoint that `flag` names; unset: the best of the default run.

    All `ranks` call this, and share the hashing.

    Raises:
        PreflightError: code CHECKPOINT, when there is none; code FLAGS, when the run would write
            beside its checkpoints.
    """
    default = Path(ControlSettings.output_dir)
    found = open_checkpoint(named, ranks) if named else find_best(default, ranks)
    if found.path.parent.parent.resolve() == output_dir.resolve():
        raise PreflightError(
            ExitCode.FLAGS,
            f"--output-dir {output_dir} holds the run that {flag} names",
            "choose another --output-dir, so that neither run loses its checkpoints",
        )
    return found


def describe_base(base: Checkpoint) -> dict[str, Any]:
    """A base as the checkpoints of its run remember it."""
    return {
        "path": str(base.path),
        "step": base.step,
        "weights_sha256": _digest_weights(base),
        "data_fingerprint": (base.config.get("data") or {}).get("fingerprint"),
    }


def describe_provenance(source: Checkpoint | None) -> dict[str, Any]:
    """The ``origin`` section of ``config.json``, which a model keeps through every later run.

    It says which other tool the model came from, and how its weights were quantised there.
    """
    origin = None if source is None else source.config.get("origin")
    return {"origin": origin} if isinstance(origin, dict) else {}


def check_same_base(named: Checkpoint, began: Any, origin: Checkpoint, flag: str) -> None:
    """Refuse a base that is not what the run of `origin` began from.

    Args:
        named: by `flag`.
        began: what `origin` remembers of its base; ``None``: it began with random weights.
        origin: the checkpoint to continue from.
        flag: such as ``--from``.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    known = began if isinstance(began, dict) else {"path": "random weights"}
    if _digest_weights(named) != known.get("weights_sha256"):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{origin.path} began from {str(known.get('path'))[:200]}, and {flag} names other "
            "weights",
            f"leave {flag} out to continue, or choose another --output-dir for a new run",
        )


def refuse_other_ids(base: Checkpoint, tokenizer: TokenizerChoice, settings: DataSettings) -> None:
    """Refuse a data folder of another tokenizer than the base's, where no text is given to rebuild.

    Raises:
        PreflightError: code DATA.
    """
    data_dir = Path(settings.data_dir)
    if settings.has_text or not os.path.lexists(data_dir / METADATA_NAME):
        return
    metadata = read_metadata(data_dir)
    if find_tokenizer_change(metadata, tokenizer):
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} was made with another tokenizer ({metadata.tokenizer.name}) than that of "
            f"{base.path}",
            "the ids mean other text to the model; give --text-file and another --data-dir, to "
            "prepare the text with the checkpoint's tokenizer",
        )


def load_base_weights(base: Checkpoint) -> dict[str, Tensor]:
    """All weights of a base on the CPU; adapters are merged.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    return load_merged_weights(base, build_empty_model(base))


def find_template(checkpoint: Checkpoint) -> ChatTemplate | None:
    """The chat template inside a checkpoint, if it has one.

    Raises:
        PreflightError: code CHECKPOINT, when it cannot be used.
    """
    if TEMPLATE_NAME not in checkpoint.manifest.files:
        return None
    with checkpoint.open(TEMPLATE_NAME) as file:
        content = file.read(MAX_TEMPLATE_BYTES + 1)
    name = f"that of {checkpoint.path}"
    return parse_chat_template(content, name, ExitCode.CHECKPOINT)


def _digest_weights(checkpoint: Checkpoint) -> str:
    return checkpoint.manifest.files[checkpoint.manifest.weights_name].sha256
