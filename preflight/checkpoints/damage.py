"""What a user is told about a checkpoint that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError


def damage_error(path: Path, reason: str, *details: str) -> PreflightError:
    """The error for a damaged file or folder of a checkpoint: code CHECKPOINT."""
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{path}: {_make_printable(reason)}",
        *map(_make_printable, details),
        "nothing was changed or loaded",
        "restore it, or name another checkpoint with --resume-from or --checkpoint-path",
    )


def unequal_error(path: Path) -> PreflightError:
    """The error for a file that holds something else than what was just written: code STORAGE."""
    return PreflightError(
        ExitCode.STORAGE,
        f"{path} differs from what was written when it is read back",
        "the disk or the memory of this machine is failing",
        "earlier checkpoints are kept; choose another --output-dir",
    )


def describe_path(path: Path, expected_name: str) -> str:
    """What a path that is no checkpoint seems to be, judged by its first bytes.

    Args:
        path: what the user named, or what a checkpoint should hold.
        expected_name: the file that a folder would need to be a checkpoint.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return "there is no such file or folder"
    except OSError as error:
        return error.strerror or str(error)
    if os.path.isdir(path):
        return f"a folder without {expected_name}"
    try:
        with storage.open_regular(path) as file:
            head = file.read(64)
    except OSError as error:
        return error.strerror or str(error)
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in place of the file (fetch it: git lfs pull)"
    if head.startswith((b"PK", b"\x80")) or path.suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        return "a pickle or an archive of pickles, which is never loaded unverified"
    return "a file"


def first_line(error: Exception) -> str:
    """The first line of a library's error message, printable and short."""
    return _make_printable((str(error) or type(error).__name__).splitlines()[0])[:120]


def _make_printable(text: str) -> str:
    """`text` without what could move the cursor of a terminal: a stranger may have written it."""
    return "".join(c for c in text if c.isprintable())
