"""Text to a data folder: plan which documents go where, build it recoverably, reuse or rebuild.

The first pass over the text shows faults in it before anything is written. The second tokenises
it and writes the shards in ``<data_dir>/.building``, with a journal entry per finished shard; a
complete build is then renamed into place. No torch: workers stay light.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.core.storage import (
    free_bytes,
    fsync_folder,
    make_folder,
    publish_file,
    remove_tree,
    verify_all,
    write_json,
)
from preflight.core.strict_json import read_json
from preflight.core.units import format_bytes
from preflight.corpus.blocks import BLOCK_BYTES, read_blocks
from preflight.corpus.metadata import (
    FORMAT,
    METADATA_NAME,
    SPLITS,
    VERSION,
    ShardEntry,
    SplitEntry,
    read_metadata,
    render_metadata,
)
from preflight.corpus.shards import (
    BUILDING_NAME,
    SHARD_NAME,
    DataFolder,
    ShardWriter,
    check_long_enough,
    load_data_folder,
    verify_shard,
)
from preflight.corpus.sources import (
    ScannedSource,
    describe_sources,
    find_sources,
    scan_sources,
)
from preflight.corpus.sources.builtin import SAMPLE_NAME
from preflight.corpus.split import Part, split_documents
from preflight.corpus.workers import Encoders
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

IN_PROCESS_BYTES = 2 * 2**20  # below this, starting workers costs more than it gains
_JOURNAL_NAME = "journal.json"


def prepare_data(
    settings: DataSettings,
    tokenizer: Tokenizer,
    context_length: int,
    stop: StopFlag | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    n_workers: int | None = None,
) -> DataFolder:
    """Make, reuse or rebuild the data folder, and return it verified.

    What is done, and why, is said on stderr. Without text and with an empty folder the built-in
    sample is prepared. `block_bytes` and `n_workers` (unset: from the settings and the size of
    the text) decide speed alone, never the ids.

    Raises:
        PreflightError: TEXT for input text; FLAGS for a terminal as text; DATA for a folder that
            cannot be used and not be rebuilt; STORAGE; LOCKED when another run uses the folder;
            SIGINT or SIGTERM when `stop` says so.
    """
    data_dir = Path(settings.data_dir)
    sources = find_sources(settings)
    # A kill may leave a build that is done with; the text at hand tells whether it is.
    building = data_dir / BUILDING_NAME
    unfinished = building if settings.text_file else building / METADATA_NAME
    is_complete = (data_dir / METADATA_NAME).exists() and not unfinished.exists()
    if not settings.text_file and is_complete:
        return _reuse(load_data_folder(data_dir, tokenizer), context_length)
    scanned: list[ScannedSource] | None = None
    if not any(source.is_copied for source in sources):
        scanned = scan_sources(sources, stop)
        # Before the lock, so that several runs can share a data folder that needs no change.
        if is_complete:
            found = _load_if_same(data_dir, scanned, settings, tokenizer)
            if isinstance(found, DataFolder):
                return _reuse(found, context_length)
    make_folder(data_dir)
    with FolderLock(data_dir):
        _finish_swap(data_dir)
        is_complete = (data_dir / METADATA_NAME).exists()
        if not settings.text_file:
            if is_complete:
                return _reuse(load_data_folder(data_dir, tokenizer), context_length)
            _refuse_leftovers(data_dir)
        _refuse_foreign(data_dir)
        make_folder(building)
        scanned = scanned or scan_sources(sources, stop)
        if is_complete:
            found = _load_if_same(data_dir, scanned, settings, tokenizer)
            if isinstance(found, DataFolder):
                remove_tree(building)
                return _reuse(found, context_length)
            log.info(f"rebuilding {data_dir} because {found}")
        plan = _build_plan(scanned, settings, tokenizer)
        n_workers = _choose_workers(plan, settings) if n_workers is None else n_workers
        builder = _Builder(building, plan, settings, tokenizer, stop)
        builder.build(context_length, block_bytes, n_workers)
        _finish_swap(data_dir)
        return load_data_folder(data_dir, tokenizer)


# ---- the data folder ----------------------------------------------------------------------------


def _reuse(data: DataFolder, context_length: int) -> DataFolder:
    for name in ("train", "val"):
        check_long_enough(data.metadata.get_split(name), name, context_length)
    log.info(f"reusing {data.path} ({data.train.n_tokens:,} training tokens)")
    return data


def _load_if_same(
    data_dir: Path, scanned: list[ScannedSource], settings: DataSettings, tokenizer: Tokenizer
) -> DataFolder | str:
    """The data folder when it is what these settings make of the text, else why it is not."""
    try:
        metadata = read_metadata(data_dir)
        before = metadata.tokenizer
        if before.fingerprint != tokenizer.fingerprint:
            return f"the tokenizer changed from {before.name} to {tokenizer.name}"
        data = load_data_folder(data_dir, tokenizer)
    except PreflightError as error:
        return error.lines[0]
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
    return data


def _finish_swap(data_dir: Path) -> None:
    """Move a complete build into place. Killed anywhere, calling it again finishes the move."""
    building = data_dir / BUILDING_NAME
    if (building / METADATA_NAME).exists():
        remove_tree(data_dir / METADATA_NAME)  # from here to the last rename: unfinished
        fsync_folder(data_dir)
        for split in SPLITS:
            if (building / split).exists():
                remove_tree(data_dir / split)
                os.rename(building / split, data_dir / split)
        fsync_folder(data_dir)
        for path in building.iterdir():  # before the last rename, so that nothing is left behind
            if path.name != METADATA_NAME:
                remove_tree(path)
        os.rename(building / METADATA_NAME, data_dir / METADATA_NAME)
        fsync_folder(data_dir)
        remove_tree(building)


def _refuse_leftovers(data_dir: Path) -> None:
    """Never replace an unfinished build of a text that is not at hand: PreflightError (DATA)."""
    building = data_dir / BUILDING_NAME
    is_own_sample = (building / SAMPLE_NAME).exists()
    if ((building / _JOURNAL_NAME).exists() and not is_own_sample) or any(
        (data_dir / split).exists() for split in SPLITS
    ):
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} is unfinished: it has no {METADATA_NAME}",
            "rerun with --text-file to finish it, or choose another --data-dir",
        )


def _refuse_foreign(data_dir: Path) -> None:
    """Never delete what another program made: PreflightError (DATA) when something else is here."""
    foreign: list[Path] = []
    for folder in (data_dir / split for split in SPLITS):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            foreign.append(folder)
        elif folder.is_dir():
            foreign += [
                path
                for path in folder.iterdir()
                if not SHARD_NAME.fullmatch(path.name) or path.is_dir()
            ]
    path = data_dir / METADATA_NAME
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            foreign.append(path)
    if foreign:
        raise PreflightError(
            ExitCode.DATA,
            f"{foreign[0]} is not Preflight's, and building would replace it",
            "choose another --data-dir",
        )


# ---- the plan: which documents go where ---------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is going to be built. ``key`` stands for all that decides the ids and their shards."""

    scanned: list[ScannedSource]
    parts: dict[str, list[Part]]  # by split
    by: str  # "documents" or "tail"
    key: str

    def count_bytes(self, *splits: str) -> int:
        return sum(part.n_bytes for split in splits for part in self.parts[split])


def _build_plan(
    scanned: list[ScannedSource], settings: DataSettings, tokenizer: Tokenizer
) -> _Plan:
    parts, by = split_documents(scanned, settings.val_split)
    facts = [
        VERSION,
        [[item.source.name, item.facts.size, item.facts.sha256] for item in scanned],
        tokenizer.fingerprint,
        settings.document_separator,
        settings.val_split,
        settings.shard_size,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _Plan(scanned, parts, by, key)


# ---- building -----------------------------------------------------------------------------------


def _choose_workers(plan: _Plan, settings: DataSettings) -> int:
    if plan.count_bytes(*SPLITS) < IN_PROCESS_BYTES:
        return 0
    if settings.num_workers is not None:
        return settings.num_workers
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )


class _Progress:
    """A bar in bytes with the time left on a terminal; elsewhere a plain line now and then."""

    EVERY_SECONDS = 5.0

    def __init__(self, total: int, done: int) -> None:
        """`done`: bytes that an earlier run finished."""
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            desc="preparing",
            disable=not is_progress_shown(),
        )
        self._total, self._first, self._done = total, done, done
        self._began = self._said = time.monotonic()

    def add(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self.EVERY_SECONDS:
            self._said = now
            rate = max(self._done - self._first, 1) / (now - self._began)
            log.info(
                f"preparing: {format_bytes(self._done)} of {format_bytes(self._total)}, "
                f"{format_bytes(rate)}/s, {(self._total - self._done) / rate:.0f} s left"
            )

    def close(self) -> None:
        self._bar.close()


class _Builder:
    """Builds one plan in ``.building``, continuing where the journal says."""

    def __init__(
        self,
        building: Path,
        plan: _Plan,
        settings: DataSettings,
        tokenizer: Tokenizer,
        stop: StopFlag | None,
    ) -> None:
        self._building, self._plan, self._settings = building, plan, settings
        self._tokenizer, self._stop = tokenizer, stop
        self._shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        self._position: list[Any] = [SPLITS[0], 0, 0, 0]  # split, part, offset, ids to skip

    def build(self, context_length: int, block_bytes: int, n_workers: int) -> None:
        """Write all shards and, last, the metadata."""
        total = self._plan.count_bytes(*SPLITS)
        self._resume()
        self._check_space(total)
        for split in SPLITS:
            make_folder(self._building / split)
        encoders = Encoders(self._tokenizer, n_workers)
        progress = _Progress(total, self._count_done_bytes())
        try:
            for split in SPLITS:
                if self._position[0] == split:
                    self._build_split(split, encoders, progress, block_bytes)
        finally:
            progress.close()
            encoders.close()
        for item in self._plan.scanned:  # the ids are those of the text that was judged
            item.source.check_unchanged(item.facts)
        metadata = self._build_metadata()
        try:
            for name in ("train", "val"):
                check_long_enough(SplitEntry.read(metadata[name]), name, context_length)
        except PreflightError:
            remove_tree(self._building)
            raise
        content = render_metadata(metadata)
        with publish_file(self._building / METADATA_NAME, len(content)) as file:
            file.write(content)

    def _resume(self) -> None:
        """Take over the shards that an interrupted build of the same plan finished.

        When the journal or one of them is damaged, none: all are written anew.
        """
        with contextlib.suppress(
            PreflightError, OSError, ValueError, LookupError, TypeError, AttributeError
        ):
            journal = read_json(self._building / _JOURNAL_NAME)
            if journal["key"] == self._plan.key:
                shards = {
                    split: [ShardEntry.read(entry) for entry in journal["shards"][split]]
                    for split in SPLITS
                }
                for split in SPLITS:
                    verify = partial(verify_shard, self._building / split, self._tokenizer)
                    verify_all(verify, shards[split])
                self._shards, self._position = shards, journal["position"]
        n_kept = sum(map(len, self._shards.values()))
        if n_kept:
            log.info(f"resuming at shard {n_kept}")
        for split in SPLITS:
            kept = {entry.name for entry in self._shards[split]}
            folder = self._building / split
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    remove_tree(path)

    def _count_done_bytes(self) -> int:
        split, number, offset, _ = self._position
        finished = SPLITS[: (*SPLITS, "end").index(split)]
        begun = self._plan.parts.get(split, [])[:number]
        return self._plan.count_bytes(*finished) + sum(part.n_bytes for part in begun) + offset

    def _check_space(self, total: int) -> None:
        """A disk that cannot hold the shards is told of before the work, not after."""
        done = sum(entry.n_bytes for split in SPLITS for entry in self._shards[split])
        # Text has rarely more than 5 bytes a token.
        needed = total * self._tokenizer.id_dtype.itemsize // 5 - done
        free = free_bytes(self._building)
        if total > 20_000 * self._settings.shard_size:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--shard-size {self._settings.shard_size:,} would make too many "
                "files of this text",
                "leave it out",
            )
        if needed > free:
            raise PreflightError(
                ExitCode.STORAGE,
                f"{self._building.parent}: about {format_bytes(needed)} needed for the shards, "
                f"{format_bytes(free)} free",
                "nothing was changed; free space or choose another --data-dir",
            )

    def _build_split(
        self, split: str, encoders: Encoders, progress: _Progress, block_bytes: int
    ) -> None:
        parts, shards = self._plan.parts[split], self._shards[split]
        _, number, offset, skip = self._position
        follower = "train" if split == "val" else "end"
        consumed, writer = 0, None
        bound = self._plan.count_bytes(split) + len(parts)
        blocks = read_blocks(parts, number, offset, block_bytes, self._tokenizer.last_cut)
        try:
            for block, ids, is_last in encoders.encode(blocks):
                passed = min(skip, len(ids))
                ids, skip, consumed = ids[passed:], skip - passed, consumed + passed
                while len(ids):
                    if writer is None:
                        path = self._building / split / f"shard_{len(shards):05d}.npy"
                        writer = ShardWriter(
                            path, self._tokenizer.id_dtype, self._settings.shard_size, bound
                        )
                    taken = writer.write(ids)
                    ids, consumed = ids[taken:], consumed + taken
                    if writer.is_full:
                        entry, writer = writer.close(), None
                        self._record(split, entry, [split, block.part, block.offset, consumed])
                if is_last:
                    consumed = 0
                    progress.add(block.n_bytes)
                if self._stop is not None:
                    self._stop.leave_if_stopping(
                        "stopped while preparing the text; finished shards are kept",
                        "run the same command to go on",
                    )
            if writer is not None:
                entry, writer = writer.close(), None
                self._record(split, entry, [follower, 0, 0, 0])
        except BaseException as error:
            if writer is not None:
                writer.abandon(error)
            raise
        self._position = [follower, 0, 0, 0]

    def _record(self, split: str, entry: ShardEntry, position: list[Any]) -> None:
        self._shards[split].append(entry)
        self._position = position
        write_json(
            self._building / _JOURNAL_NAME,
            {
                "key": self._plan.key,
                "position": position,
                "shards": {
                    split: [shard.model_dump() for shard in shards]
                    for split, shards in self._shards.items()
                },
            },
        )

    def _build_metadata(self) -> dict[str, Any]:
        tokenizer, settings, plan = self._tokenizer, self._settings, self._plan
        parts = {
            split: {
                "n_documents": len(plan.parts[split]),
                "n_tokens": sum(entry.n_tokens for entry in self._shards[split]),
                "n_bytes": plan.count_bytes(split),
                "shards": [entry.model_dump() for entry in self._shards[split]],
            }
            for split in SPLITS
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer.describe() | {"end_of_text_id": tokenizer.end_of_text_id},
            "dtype": tokenizer.id_dtype.name,
            "shard_size": settings.shard_size,
            "document_separator": settings.document_separator,
            "split": {"val_split": settings.val_split, "by": plan.by},
            "sources": describe_sources(plan.scanned),
            "train": parts["train"],
            "val": parts["val"],
        }
