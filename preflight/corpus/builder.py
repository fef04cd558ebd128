"""Builds the shards of a data folder in ``.building``, with a journal entry per finished shard."""

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
from preflight.core.log import is_progress_shown, log
from preflight.core.signals import StopFlag
from preflight.core.storage import (
    free_bytes,
    fsync_file,
    fsync_folder,
    hash_file,
    make_own_folder,
    publish_file,
    refuse_other_kind,
    remove_tree,
    storage_error,
    verify_all,
    write_json,
)
from preflight.core.strict_json import read_json
from preflight.core.units import format_bytes
from preflight.corpus.blocks import read_blocks
from preflight.corpus.metadata import (
    FORMAT,
    METADATA_NAME,
    SPLITS,
    TOKENIZER_NAME,
    VERSION,
    FileEntry,
    ShardEntry,
    SplitEntry,
    render_metadata,
)
from preflight.corpus.ownership import BUILD_FORMAT, JOURNAL_NAME, remove_build
from preflight.corpus.shards import (
    ShardWriter,
    check_long_enough,
    verify_shard,
)
from preflight.corpus.sources import (
    ScannedSource,
    describe_sources,
)
from preflight.corpus.split import Part, split_documents
from preflight.corpus.workers import Encoders
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

IN_PROCESS_BYTES = 2 * 2**20  # below this, starting workers costs more than it gains


@dataclass(frozen=True)
class Job:
    """What was asked for.

    ``block_bytes`` and ``n_workers`` (unset: from the settings and the size of the text) change
    the speed only. ``asked_vocab_size``: of a tokenizer that was made from the text.
    """

    settings: DataSettings
    tokenizer: Tokenizer
    stop: StopFlag | None
    block_bytes: int
    n_workers: int | None
    asked_vocab_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is going to be built. ``key``: a digest of what decides the ids and their shards."""

    scanned: list[ScannedSource]
    parts: dict[str, list[Part]]  # by split
    by: str  # "documents" or "tail"
    key: str

    def count_bytes(self, *splits: str) -> int:
        """Bytes of text in these splits."""
        return sum(part.n_bytes for split in splits for part in self.parts[split])


def build_plan(scanned: list[ScannedSource], job: Job) -> Plan:
    """What is to be built of these sources."""
    settings = job.settings
    parts, by = split_documents(scanned, settings.val_split)
    facts = [
        VERSION,
        [[item.source.name, item.facts.size, item.facts.sha256] for item in scanned],
        job.tokenizer.fingerprint,
        settings.document_separator,
        settings.val_split,
        settings.shard_size,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Plan(scanned, parts, by, key)


def write_journal(building: Path, *, key: str = "", **content: Any) -> None:
    """Publish the journal of a build; without a key it only proves whose folder it is."""
    write_json(building / JOURNAL_NAME, {"format": BUILD_FORMAT, "key": key, **content})


# ---- building -----------------------------------------------------------------------------------


def _choose_workers(plan: Plan, job: Job) -> int:
    if job.n_workers is not None:
        return job.n_workers
    if plan.count_bytes(*SPLITS) < IN_PROCESS_BYTES:
        return 0
    if job.settings.num_workers is not None:
        return job.settings.num_workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


class Builder:
    """Builds one plan in ``.building``, continuing where the journal says."""

    def __init__(self, building: Path, job: Job, plan: Plan) -> None:
        self._building, self._job, self._plan = building, job, plan
        self._settings, self._tokenizer = job.settings, job.tokenizer
        self._shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        self._files: list[FileEntry] = []
        self._position: list[Any] = [SPLITS[0], 0, 0, 0]  # split, part, offset, ids to skip

    def build(self) -> None:
        """Write all shards and, last, the metadata."""
        total = self._plan.count_bytes(*SPLITS)
        self._resume()
        self._check_space(total)
        for split in SPLITS:
            make_own_folder(self._building / split)
        self._save_tokenizer()
        encoders = Encoders(
            self._tokenizer,
            _choose_workers(self._plan, self._job),
            self._building / TOKENIZER_NAME,
        )
        progress = _Progress(total, self._count_done_bytes())
        try:
            for split in SPLITS:
                if self._position[0] == split:
                    self._build_split(split, encoders, progress)
        finally:
            progress.close()
            encoders.close()
        for item in self._plan.scanned:  # so that the ids are those of the text that was scanned
            item.source.check_unchanged(item.facts)
        metadata = self._build_metadata()
        try:
            for name in ("train", "val"):
                check_long_enough(SplitEntry.read(metadata[name]), name)
        except PreflightError:
            remove_build(self._building)
            raise
        content = render_metadata(metadata)
        with publish_file(self._building / METADATA_NAME, len(content)) as file:
            file.write(content)

    def _save_tokenizer(self) -> None:
        """Write the tokenizer's files, from which workers and later runs load it."""
        folder = self._building / TOKENIZER_NAME
        if refuse_other_kind(folder, folder=True):  # of a build that was cut
            remove_tree(folder)
        make_own_folder(folder)
        try:
            for path in self._tokenizer.save(folder):
                fsync_file(path)
                entry = FileEntry(
                    name=f"{TOKENIZER_NAME}/{path.name}",
                    n_bytes=path.stat().st_size,
                    sha256=hash_file(path),
                )
                self._files.append(entry)
            fsync_folder(folder)
        except OSError as error:
            raise storage_error(folder, error) from error

    def _resume(self) -> None:
        """Take over the shards that an interrupted build of the same plan finished.

        When the journal or one of them is damaged, none: all are written anew.
        """
        with contextlib.suppress(
            PreflightError, OSError, ValueError, LookupError, TypeError, AttributeError
        ):
            journal = read_json(self._building / JOURNAL_NAME)
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
        """Refuse a disk that cannot hold the shards before the work, not after it."""
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

    def _build_split(self, split: str, encoders: Encoders, progress: _Progress) -> None:
        parts, shards = self._plan.parts[split], self._shards[split]
        _, number, offset, skip = self._position
        follower = "train" if split == "val" else "end"
        consumed, writer = 0, None
        bound = self._plan.count_bytes(split) + len(parts)
        tokenizer = self._tokenizer
        blocks = read_blocks(
            parts,
            number,
            offset,
            self._job.block_bytes,
            tokenizer.last_cut,
            tokenizer.max_unit_bytes,
        )
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
                if self._job.stop is not None:
                    self._job.stop.leave_if_stopping(
                        "stopped while preparing the text; finished shards are kept",
                        "run the same command to continue",
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
        shards = {
            split: [shard.model_dump() for shard in shards]
            for split, shards in self._shards.items()
        }
        write_journal(self._building, key=self._plan.key, position=position, shards=shards)

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
        facts = tokenizer.describe() | {"end_of_text_id": tokenizer.end_of_text_id}
        if self._job.asked_vocab_size is not None:
            facts["asked_vocab_size"] = self._job.asked_vocab_size
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": facts,
            "dtype": tokenizer.id_dtype.name,
            "shard_size": settings.shard_size,
            "document_separator": settings.document_separator,
            "split": {"val_split": settings.val_split, "by": plan.by},
            "sources": describe_sources(plan.scanned),
            "train": parts["train"],
            "val": parts["val"],
            "files": [entry.model_dump() for entry in self._files],
        }
