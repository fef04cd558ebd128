"""Files of chats to a data folder of ids and masks: reuse it, or build it anew.

The first reading shows all faults before anything is written, and which chats are for validation.
The second encodes, and writes into ``<data_dir>/.building``; a complete build is then renamed into
place as one of text is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import make_folder
from preflight.corpus.build import MayReplace, finish_swap, is_begun
from preflight.corpus.chats.builder import SHARD_TOKENS, ChatJob, begin_build
from preflight.corpus.chats.data import ChatData, compute_chat_fingerprint, load_chat_folder
from preflight.corpus.chats.facts import (
    ChatFacts,
    Encoder,
    build_text_error,
    read_facts,
)
from preflight.corpus.chats.reading import open_chat_file
from preflight.corpus.metadata import (
    MASK_NAME,
    METADATA_NAME,
    Metadata,
    read_metadata,
)
from preflight.corpus.ownership import refuse_foreign, remove_build
from preflight.corpus.shards import (
    BUILDING_NAME,
    compute_fingerprint,
    find_tokenizer_change,
)
from preflight.corpus.sources import ScannedSource, describe_sources


def prepare_chats(
    files: Sequence[str | Path],
    encoder: Encoder,
    folder: Path,
    *,
    val_split: float,
    stop: StopFlag | None = None,
    may_replace: MayReplace | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> ChatData:
    """Make, reuse or rebuild the data folder of these chats, and return it verified.

    A complete folder is taken as it is when the files, `val_split` and the encoder's fingerprint
    are those that it was made of. Without files, or when all of them are gone, the encoder alone
    decides. The log says what is done and why.

    Args:
        files: ``.jsonl``, ``.json`` (both also compressed) and ``.parquet``.
        encoder: turns chats into ids and masks.
        folder: the data folder.
        val_split: share of the chats for validation. The hash of a chat's content decides, so that
            equal chats are on one side; where there are two chats, each side has one.
        stop: a signal that comes ends the build.
        may_replace: raises when a complete folder must stay as it is, see `prepare_data`.
        shard_tokens: tokens of a shard.

    Raises:
        PreflightError: TEXT for files that are missing or at fault, and for a single chat; DATA for
            a folder that cannot be used; STORAGE; LOCKED when another run uses the folder; SIGINT
            or SIGTERM when `stop` says so.
    """
    paths = [Path(file) for file in files]
    if not any(map(os.path.lexists, paths)):
        found = _find_without_files(paths, encoder, folder)
        if found is not None:
            return found
    sources = [open_chat_file(path) for path in paths]
    scanned = [ScannedSource(source, source.scan(stop)) for source in sources]
    job = ChatJob(sources, scanned, encoder, folder, val_split, stop, shard_tokens)
    building = folder / BUILDING_NAME
    # Before the lock, so that several runs can share a data folder that needs no change.
    if not os.path.lexists(building) and os.path.lexists(folder / METADATA_NAME):
        complete = _load_if_same(job)
        if isinstance(complete, ChatData):
            return _reuse(complete)
    _refuse_text(folder)
    refuse_foreign(folder)  # before the lock writes a file there
    make_folder(folder)
    with FolderLock(folder):
        refuse_foreign(folder)
        finish_swap(folder)
        _refuse_text(folder)
        complete = "" if not os.path.lexists(folder / METADATA_NAME) else _load_if_same(job)
        if isinstance(complete, ChatData):
            if os.path.lexists(building):
                remove_build(building)
            return _reuse(complete)
        return _build(job, complete, may_replace)


def _build(
    job: ChatJob, replaced: str | PreflightError, may_replace: MayReplace | None
) -> ChatData:
    """Build the folder, whose lock is held.

    Args:
        replaced: what has changed since the complete folder was built, or its damage; empty where
            there is none.
    """
    folder, tokenizer = job.folder, job.encoder.tokenizer
    building = folder / BUILDING_NAME
    if replaced and may_replace is not None and isinstance(replaced, str):
        may_replace(replaced, _compute_old_fingerprint(folder), None)
    reason = replaced.lines[0] if isinstance(replaced, PreflightError) else replaced
    checked = job.check()  # all faults show before anything is written
    if reason:
        log.info(f"rebuilding {folder} because {reason}")
    begin_build(building)
    try:
        job.build(checked)
        if reason and may_replace is not None:
            may_replace(reason, None, load_chat_folder(building, tokenizer))
    except PreflightError:
        with contextlib.suppress(OSError):
            remove_build(building)
        raise
    finish_swap(folder)
    return load_chat_folder(folder, tokenizer)


def _reuse(chats: ChatData) -> ChatData:
    log.info(f"reusing {chats.path} ({chats.n_rows:,} training rows of chats)")
    return chats


def _refuse_text(folder: Path) -> None:
    """PreflightError (DATA) for a data folder of text, complete, damaged or being built."""
    if _holds_text(folder) or is_begun(folder / BUILDING_NAME):
        raise build_text_error(folder)


def _holds_text(folder: Path) -> bool:
    """Whether it is a complete data folder without masks; its metadata may be damaged."""
    has_masks = os.path.lexists(folder / "train" / MASK_NAME)
    return os.path.lexists(folder / METADATA_NAME) and not has_masks


def _compute_old_fingerprint(folder: Path) -> str:
    metadata = read_metadata(folder)
    return compute_chat_fingerprint(compute_fingerprint(metadata), metadata)


def _find_without_files(paths: list[Path], encoder: Encoder, folder: Path) -> ChatData | None:
    """The complete folder that was made of these files, or with no name given any.

    None: there is none, and the files are missing.

    Raises:
        PreflightError: code DATA, when there is none and no file is named, or when it was made with
            another encoder.
    """
    if os.path.lexists(folder / BUILDING_NAME / METADATA_NAME):  # killed when it was complete
        refuse_foreign(folder)
        with FolderLock(folder):
            finish_swap(folder)
    if not os.path.lexists(folder / METADATA_NAME):
        if paths:
            return None
        raise PreflightError(
            ExitCode.DATA, f"{folder} holds no chats", "name the files: --finetune CHATS.jsonl"
        )
    if paths and _holds_text(folder):
        return None
    with _telling_what_mends():
        metadata = read_metadata(folder)
        facts = read_facts(folder, metadata)
    names = [entry.name for entry in metadata.sources]
    if paths and names != [path.name for path in paths]:
        return None
    changed = find_encoder_change(metadata, facts, encoder)
    if changed:
        raise PreflightError(
            ExitCode.DATA,
            f"{folder} cannot be used: {changed}",
            f"it was made of {', '.join(names[:3])}, and the files are not there",
            "give the files of chats to rebuild it, or undo the change",
        )
    if paths:
        log.info(f"{paths[0]}: no such file; {folder}, which was made of it, is complete")
    with _telling_what_mends():
        return _reuse(load_chat_folder(folder, encoder.tokenizer))


@contextlib.contextmanager
def _telling_what_mends() -> Iterator[None]:
    """Damage is mended with the files of chats, not with those of text."""
    try:
        yield
    except PreflightError as error:
        fix = "give the files of chats to rebuild the data folder, or restore the file"
        raise PreflightError(error.code, error.lines[0], fix) from None


def find_encoder_change(metadata: Metadata, facts: ChatFacts, encoder: Encoder) -> str:
    """How the encoder of a folder differs from this one, in words; empty if it does not."""
    if facts.encoder == encoder.fingerprint:
        return ""
    changed = find_tokenizer_change(metadata, encoder.tokenizer)
    if changed:
        return changed
    if facts.template.fingerprint != encoder.template.fingerprint:
        old, new = facts.template.name, encoder.template.name
        return f"the chat template changed from {old} to {'another ' * (old == new)}{new}"
    if facts.context_length != encoder.context_length:
        old_length, new_length = facts.context_length, encoder.context_length
        return f"--context-length changed from {old_length:,} to {new_length:,}"
    if facts.learn_from != encoder.learn_from:
        return f"--learn-from changed from {facts.learn_from} to {encoder.learn_from}"
    return "this version encodes chats in another way"


def _load_if_same(job: ChatJob) -> ChatData | str | PreflightError:
    """The folder when it is what the job would build.

    Else what has changed since it was built, or the error when it is damaged.
    """
    try:
        metadata = read_metadata(job.folder)
        changed = _find_change(job, metadata, read_facts(job.folder, metadata))
        return changed or load_chat_folder(job.folder, job.encoder.tokenizer)
    except PreflightError as error:
        return error


def _find_change(job: ChatJob, metadata: Metadata, facts: ChatFacts) -> str:
    changed = find_encoder_change(metadata, facts, job.encoder)
    if changed:
        return changed
    described = describe_sources(job.scanned)
    known = [entry.model_dump(include={"name", "size", "sha256"}) for entry in metadata.sources]
    if described != known:
        pairs = zip(described, known, strict=False)
        name = next((now["name"] for now, then in pairs if now != then), None)
        return f"the chats changed ({name or f'{len(known)} files before, {len(described)} now'})"
    if metadata.split.val_split != job.val_split:
        return f"--val-split changed from {metadata.split.val_split} to {job.val_split}"
    return ""
