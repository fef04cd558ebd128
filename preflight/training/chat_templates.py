"""The chat template in a checkpoint: that of the chats on which its model was fine-tuned."""

from __future__ import annotations

from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode
from preflight.tokenization.chat_template import (
    MAX_TEMPLATE_BYTES,
    TEMPLATE_NAME,
    ChatTemplate,
    parse_chat_template,
)


def read_checkpoint_template(checkpoint: Checkpoint) -> ChatTemplate | None:
    """The checkpoint's own template, verified; None where it has none.

    Raises:
        PreflightError: code CHECKPOINT, when the file is damaged or no text of at most 64 KiB.
    """
    if TEMPLATE_NAME not in checkpoint.manifest.files:
        return None
    with checkpoint.open(TEMPLATE_NAME) as file:
        content = file.read(MAX_TEMPLATE_BYTES + 1)
    return parse_chat_template(content, str(checkpoint.path / TEMPLATE_NAME), ExitCode.CHECKPOINT)
