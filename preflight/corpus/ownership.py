"""Whether a data folder was made by this program. Its content says so, never a name alone."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import TEMPORARY_PREFIX, has_format, open_regular, remove_tree
from preflight.corpus.data_report import JSON_NAME, PAGE_MARK, PAGE_NAME
from preflight.corpus.metadata import (
    FORMAT,
    MASK_NAME,
    METADATA_NAME,
    OFFSETS_NAME,
    SPLITS,
    TOKENIZER_NAME,
    read_metadata,
)
from preflight.corpus.report_content import FORMAT as REPORT_FORMAT
from preflight.corpus.shards import BUILDING_NAME, SHARD_NAME

JOURNAL_NAME = "journal.json"
BUILD_FORMAT = "preflight-build"
_TOKENIZER_FILE = re.compile(r"tokenizer[\w.-]*")  # what every kind calls its files
_SPLIT_FILE = re.compile(
    "|".join([SHARD_NAME.pattern, re.escape(MASK_NAME), re.escape(OFFSETS_NAME)])
)


def refuse_foreign(data_dir: Path) -> None:
    """Look at everything that a build would write to or replace.

    A link is never ours. ``metadata.json`` proves the shards that it lists. Where it is damaged,
    its beginning proves the files that are named like shards.

    Raises:
        PreflightError: code DATA, naming the first file or folder that is not provably ours.
    """
    building, metadata = data_dir / BUILDING_NAME, data_dir / METADATA_NAME
    if _exists(building, folder=True):
        _check_building(building)
    is_ours = _exists(metadata)
    if is_ours and not _begins_with(metadata, FORMAT):
        raise _foreign_error(metadata)
    _check_report(data_dir)
    # A build that is complete may have been moved in part.
    is_ours = is_ours or os.path.lexists(building / METADATA_NAME)
    listed = _list_files(data_dir)
    for inner in (*SPLITS, TOKENIZER_NAME):
        usual = _TOKENIZER_FILE if inner == TOKENIZER_NAME else _SPLIT_FILE
        folder = data_dir / inner
        for name in sorted(os.listdir(folder)) if _exists(folder, folder=True) else ():
            is_known = f"{inner}/{name}" in listed if listed else usual.fullmatch(name)
            if not is_ours or not is_known or not _exists(folder / name):
                raise _foreign_error(folder / name)


def refuse_chats(data_dir: Path) -> None:
    """PreflightError (DATA) for a complete data folder of chats, where text is to be."""
    has_masks = os.path.lexists(data_dir / "train" / MASK_NAME)
    if has_masks and os.path.lexists(data_dir / METADATA_NAME):
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} holds chats, not text",
            "nothing was changed; choose another --data-dir",
        )


def _check_report(data_dir: Path) -> None:
    """PreflightError (DATA) for files that are called as those of a report and are none."""
    path = data_dir / JSON_NAME
    if _exists(path) and not _begins_with(path, REPORT_FORMAT):
        raise _foreign_error(path)
    page = data_dir / PAGE_NAME
    if _exists(page):
        try:
            with open_regular(page) as file:
                is_ours = file.read(len(PAGE_MARK)) == PAGE_MARK
        except OSError as error:
            raise PreflightError(ExitCode.DATA, f"{page}: {error.strerror}") from None
        if not is_ours:
            raise _foreign_error(page)


def _check_building(building: Path) -> None:
    """PreflightError (DATA) unless the folder of a build is empty, or a file in it proves it."""
    for inner in (*SPLITS, TOKENIZER_NAME):
        _exists(building / inner, folder=True)
    names = set(os.listdir(building)) - {TEMPORARY_PREFIX + JOURNAL_NAME}
    proofs = ((JOURNAL_NAME, BUILD_FORMAT), (METADATA_NAME, FORMAT))
    if names and not any(n in names and _begins_with(building / n, form) for n, form in proofs):
        raise _foreign_error(building)


def remove_build(building: Path) -> None:
    """Delete the folder of a build, the journal last: it proves the rest if this is cut."""
    for name in os.listdir(building):
        if name != JOURNAL_NAME:
            remove_tree(building / name)
    remove_tree(building)


def _list_files(data_dir: Path) -> set[str]:
    """The files that the metadata lists, by path; none where it is missing or damaged."""
    with contextlib.suppress(PreflightError):
        metadata = read_metadata(data_dir)
        shards = {f"{s}/{shard.name}" for s in SPLITS for shard in metadata.get_split(s).shards}
        return shards | {entry.name for entry in metadata.files}
    return set()


def _exists(path: Path, *, folder: bool = False) -> bool:
    """Whether there is a regular file, or a folder; PreflightError (DATA) for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PreflightError(ExitCode.DATA, f"{path}: {error.strerror}") from None
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        raise _foreign_error(path)
    return True


def _begins_with(path: Path, form: str) -> bool:
    """`has_format`, with a `PreflightError` (DATA) when the file cannot be read."""
    try:
        return has_format(path, form)
    except OSError as error:
        raise PreflightError(ExitCode.DATA, f"{path}: {error.strerror}") from None


def _foreign_error(path: Path) -> PreflightError:
    return PreflightError(
        ExitCode.DATA,
        f"{path} is not provably Preflight's, and building the data folder would replace it",
        "nothing was changed; choose another --data-dir, or move it away",
    )
