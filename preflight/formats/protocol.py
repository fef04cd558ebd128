"""What an exporter is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from preflight.checkpoints.format import Checkpoint


@runtime_checkable
class Exporter(Protocol):
    """Writes a checkpoint in another tool's format, and proves that the result is the model.

    `name` is the format's, as a user writes it.
    """

    name: str

    def export(self, checkpoint: Checkpoint, folder: Path) -> list[Path]:
        """Write a verified checkpoint into `folder`, which is empty; return the files.

        Raises:
            PreflightError: code CHECKPOINT, when the format lacks a part of the model, which is
                named; code STORAGE.
        """

    def verify(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Read the files back and compare them with the checkpoint.

        Raises:
            PreflightError: code CHECKPOINT, naming the first tensor or file that differs.
        """
