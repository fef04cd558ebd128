"""Text to a data folder: reuse it, finish it or build it anew, and swap it into place.

The first pass over the text shows faults in it before anything is written. The second tokenises
it and writes the shards in ``<data_dir>/.building``, with a journal entry per finished shard; a
complete build is then renamed into place. No torch: workers stay light.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import fsync_folder, make_folder, make_own_folder, remove_tree
from preflight.core.strict_json import read_json
from preflight.corpus.blocks import BLOCK_BYTES
from preflight.corpus.builder import Builder, Job
from preflight.corpus.collector import write_journal
from preflight.corpus.data_report import REPORT_NAMES
from preflight.corpus.metadata import (
    METADATA_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Metadata,
    read_metadata,
)
from preflight.corpus.ownership import JOURNAL_NAME, refuse_chats, refuse_foreign, remove_build
from preflight.corpus.plan import build_plan, describe_preparation
from preflight.corpus.shards import (
    BUILDING_NAME,
    DataFolder,
    check_long_enough,
    compute_fingerprint,
    find_tokenizer_change,
    load_data_folder,
)
from preflight.corpus.sources import (
    ScannedSource,
    Source,
    describe_sources,
    find_sources,
    scan_sources,
)
from preflight.corpus.sources.builtin import SAMPLE_NAME
from preflight.corpus.sources.token_arrays import TokenArray
from preflight.corpus.training_text import SourceText
from preflight.settings import DataSettings
from preflight.tokenization import TokenizerChoice, TokenizerRecipe

# Called before a complete data folder is replaced: with the reason, the old one's fingerprint where
# it is known, and None; and with the new one before it takes the old one's place. It raises
# PreflightError to keep the old one.
MayReplace = Callable[[str, str | None, DataFolder | None], None]


def prepare_data(
    settings: DataSettings,
    tokenizer: TokenizerChoice,
    stop: StopFlag | None = None,
    *,
    may_replace: MayReplace | None = None,
    block_bytes: int = BLOCK_BYTES,
    n_workers: int | None = None,
) -> DataFolder:
    """Make, reuse or rebuild the data folder, and return it verified.

    The log says what is done and why. Without text and with an empty folder the built-in sample
    is prepared. A tokenizer that is a recipe is made from the text, unless the folder holds one
    that the recipe accepts. `may_replace` raises when a complete folder must stay as it is.
    `block_bytes` and `n_workers` (unset: from the settings and the size of the text) change the
    speed only, never the ids.

    Raises:
        PreflightError: TEXT for input text; FLAGS for a terminal as text, and for a vocabulary that
            cannot be made; DATA for a folder that cannot be used and cannot be rebuilt; STORAGE;
            LOCKED when another run uses the folder; SIGINT or SIGTERM when `stop` says so.
    """
    data_dir = Path(settings.data_dir)
    sources = find_sources(settings)
    _refuse_unnamed_tokenizer(sources, tokenizer)
    refuse_chats(data_dir)
    # A killed run may leave a build behind; only with the text we can tell whether it is needed.
    building = data_dir / BUILDING_NAME
    unfinished = building if settings.has_text else building / METADATA_NAME
    is_complete = os.path.lexists(data_dir / METADATA_NAME) and not os.path.lexists(unfinished)
    if not settings.has_text and is_complete:
        return _reuse(load_data_folder(data_dir, tokenizer))
    scanned: list[ScannedSource] | None = None
    if not any(source.is_copied for source in sources):
        scanned = scan_sources(sources, stop)
        # Before the lock, so that several runs can share a data folder that needs no change.
        if is_complete:
            found = _load_if_same(data_dir, scanned, settings, tokenizer)
            if isinstance(found, DataFolder):
                return _reuse(found)
    refuse_foreign(data_dir)  # before the lock writes a file there
    make_folder(data_dir)
    with FolderLock(data_dir):
        complete = _find_or_ask(settings, tokenizer, sources, scanned, stop, may_replace)
        if isinstance(complete, DataFolder):
            return complete
        scanned, reason = complete
        made, asked = tokenizer, None
        if isinstance(made, TokenizerRecipe):
            is_whole = made.needs_whole_text
            made = made.make(SourceText(scanned, settings, stop, is_whole=is_whole))
            asked = tokenizer.vocab_size or made.vocab_size
        job = Job(settings, made, stop, block_bytes, n_workers, asked)
        Builder(building, job, build_plan(scanned, settings, made, block_bytes)).build()
        if reason and may_replace is not None:
            _ask(may_replace, building, reason, None, load_data_folder(building, made))
        finish_swap(data_dir)
        return load_data_folder(data_dir, made)


def _refuse_unnamed_tokenizer(sources: list[Source], tokenizer: TokenizerChoice) -> None:
    """PreflightError (FLAGS) for ids without the tokenizer that made them."""
    arrays = [source for source in sources if isinstance(source, TokenArray)]
    if arrays and isinstance(tokenizer, TokenizerRecipe):
        raise PreflightError(
            ExitCode.FLAGS,
            f"{arrays[0].label} holds token ids: --tokenizer must name what made them",
            "such as --tokenizer gpt2",
        )


def _find_or_ask(
    settings: DataSettings,
    tokenizer: TokenizerChoice,
    sources: list[Source],
    scanned: list[ScannedSource] | None,
    stop: StopFlag | None,
    may_replace: MayReplace | None,
) -> DataFolder | tuple[list[ScannedSource], str]:
    """The data folder, where a build that was cut, or another run, has completed it.

    Else the scanned sources, and why they replace a complete data folder, if there is one.
    """
    data_dir = Path(settings.data_dir)
    building = data_dir / BUILDING_NAME
    refuse_foreign(data_dir)
    finish_swap(data_dir)
    refuse_chats(data_dir)
    is_complete = os.path.lexists(data_dir / METADATA_NAME)
    if not settings.has_text:
        if is_complete:
            return _reuse(load_data_folder(data_dir, tokenizer))
        _refuse_leftovers(data_dir)
    make_own_folder(building)
    if not os.listdir(building):
        write_journal(building)  # from here on it is provably ours
    scanned = scanned or scan_sources(sources, stop)
    reason = ""
    if is_complete:
        found = _load_if_same(data_dir, scanned, settings, tokenizer)
        if isinstance(found, DataFolder):
            remove_build(building)
            return _reuse(found)
        reason = found.lines[0] if isinstance(found, PreflightError) else found
        if may_replace is not None and isinstance(found, str):
            old = compute_fingerprint(read_metadata(data_dir))
            _ask(may_replace, building, reason, old, None)
        log.info(f"rebuilding {data_dir} because {reason}")
    return scanned, reason


def _ask(
    may_replace: MayReplace,
    building: Path,
    reason: str,
    old_fingerprint: str | None,
    built: DataFolder | None,
) -> None:
    """Remove the build when the complete data folder must stay."""
    try:
        may_replace(reason, old_fingerprint, built)
    except PreflightError:
        remove_build(building)
        raise


# ---- the data folder ----------------------------------------------------------------------------


def _reuse(data: DataFolder) -> DataFolder:
    for name in ("train", "val"):
        check_long_enough(data.metadata.get_split(name), name)
    log.info(f"reusing {data.path} ({data.train.n_tokens:,} training tokens)")
    return data


def _load_if_same(
    data_dir: Path,
    scanned: list[ScannedSource],
    settings: DataSettings,
    tokenizer: TokenizerChoice,
) -> DataFolder | str | PreflightError:
    """The data folder when it is what these settings make of the text.

    Else what has changed since it was built, or the error when it is damaged.
    """
    try:
        metadata = read_metadata(data_dir)
        changed = _find_change(metadata, scanned, settings, tokenizer)
        return changed or load_data_folder(data_dir, tokenizer)
    except PreflightError as error:
        return error


def _find_change(
    metadata: Metadata,
    scanned: list[ScannedSource],
    settings: DataSettings,
    tokenizer: TokenizerChoice,
) -> str:
    changed = find_tokenizer_change(metadata, tokenizer)
    if changed:
        return changed
    described = describe_sources(scanned)
    known = [entry.model_dump(include={"name", "size", "sha256"}) for entry in metadata.sources]
    if described != known:
        pairs = zip(described, known, strict=False)
        name = next((now["name"] for now, then in pairs if now != then), None)
        return f"the text changed ({name or f'{len(known)} files before, {len(described)} now'})"
    for flag, old, new in (
        ("--document-separator", metadata.document_separator, settings.document_separator),
        ("--val-split", metadata.split.val_split, settings.val_split),
    ):
        if old != new:
            return f"{flag} changed from {old!r} to {new!r}"
    wanted = describe_preparation(settings)
    for name in sorted(wanted.keys() | metadata.preparation.keys()):
        if wanted.get(name) != metadata.preparation.get(name):
            return f"--{name.replace('_', '-')} changed"
    return ""


def finish_swap(data_dir: Path) -> None:
    """Move a complete build into place. Killed anywhere, calling it again finishes the move."""
    building = data_dir / BUILDING_NAME
    if os.path.lexists(building / METADATA_NAME):
        remove_tree(data_dir / METADATA_NAME)  # from here to the last rename: unfinished
        fsync_folder(data_dir)
        for name in (*SPLITS, TOKENIZER_NAME, *REPORT_NAMES):
            if os.path.lexists(building / name):
                remove_tree(data_dir / name)
                os.rename(building / name, data_dir / name)
        fsync_folder(data_dir)
        for path in building.iterdir():  # before the last rename, so that nothing is left behind
            if path.name != METADATA_NAME:
                remove_tree(path)
        os.rename(building / METADATA_NAME, data_dir / METADATA_NAME)
        fsync_folder(data_dir)
        remove_tree(building)


def _refuse_leftovers(data_dir: Path) -> None:
    """Never replace an unfinished build without its text: PreflightError (DATA)."""
    building = data_dir / BUILDING_NAME
    is_own_sample = os.path.lexists(building / SAMPLE_NAME)
    if is_begun(building) and not is_own_sample:
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} is unfinished: it has no {METADATA_NAME}",
            "rerun with --text-file to finish it, or choose another --data-dir",
        )


def is_begun(building: Path) -> bool:
    """Whether a build has finished shards, as far as its journal can be read."""
    try:
        return bool(read_json(building / JOURNAL_NAME)["key"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError):
        return True
