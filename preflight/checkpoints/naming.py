"""Names for checkpoints that are used side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint


def name_checkpoints(
    checkpoints: Sequence[Checkpoint], spell: Callable[[str, Checkpoint], str]
) -> list[str]:
    """A name for each: its run's folder, with as many of the folders above as tell them apart.

    Args:
        checkpoints: different ones.
        spell: the name, from the folder and the checkpoint.
    """
    paths = [checkpoint.path.absolute() for checkpoint in checkpoints]
    folders = [p.parent.parent if p.parent.name == MILESTONES_NAME else p for p in paths]
    for n_parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [
            spell("/".join(folder.parts[-n_parts:]), checkpoint)
            for folder, checkpoint in zip(folders, checkpoints, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
