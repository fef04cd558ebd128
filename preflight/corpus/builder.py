"""Builds the shards of a data folder in ``.building``, from the sources to the metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
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
)
from preflight.core.units import format_bytes
from preflight.corpus.collector import Collector
from preflight.corpus.data_report import write_report
from preflight.corpus.encoding import Encoded
from preflight.corpus.metadata import (
    FORMAT,
    METADATA_NAME,
    SPLITS,
    TOKENIZER_NAME,
    VERSION,
    FileEntry,
    SplitEntry,
    render_metadata,
)
from preflight.corpus.mixing import choose_group, count_pieces
from preflight.corpus.ownership import remove_build
from preflight.corpus.plan import Plan, describe_preparation
from preflight.corpus.progress import Progress
from preflight.corpus.reading import Work
from preflight.corpus.report_facts import build_facts
from preflight.corpus.shards import check_long_enough
from preflight.corpus.sources import describe_sources
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


def _choose_workers(plan: Plan, job: Job) -> int:
    if job.n_workers is not None:
        return job.n_workers
    if plan.n_bytes < IN_PROCESS_BYTES:
        return 0
    if job.settings.num_workers is not None:
        return job.settings.num_workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def save_tokenizer(building: Path, tokenizer: Tokenizer) -> list[FileEntry]:
    """Write the tokenizer's files, from which workers and later runs load it.

    Raises:
        PreflightError: code STORAGE.
    """
    folder, entries = building / TOKENIZER_NAME, []
    if refuse_other_kind(folder, folder=True):  # of a build that was cut
        remove_tree(folder)
    make_own_folder(folder)
    try:
        for path in tokenizer.save(folder):
            fsync_file(path)
            entry = FileEntry(
                name=f"{TOKENIZER_NAME}/{path.name}",
                n_bytes=path.stat().st_size,
                sha256=hash_file(path),
            )
            entries.append(entry)
        fsync_folder(folder)
    except OSError as error:
        raise storage_error(folder, error) from error
    return entries


class Builder:
    """Builds one plan in ``.building``, continuing where the journal says."""

    def __init__(self, building: Path, job: Job, plan: Plan) -> None:
        self._building, self._job, self._plan = building, job, plan
        self._settings, self._tokenizer = job.settings, job.tokenizer
        self._files: list[FileEntry] = []
        self._collector = Collector(building, plan, job.settings, job.tokenizer)

    def build(self) -> None:
        """Write all shards and, last, the metadata."""
        collector = self._collector
        collector.resume()
        self._check_space()
        for split in SPLITS:
            make_own_folder(self._building / split)
        self._files = save_tokenizer(self._building, self._tokenizer)
        encoders = Encoders(
            self._tokenizer,
            _choose_workers(self._plan, self._job),
            self._building / TOKENIZER_NAME,
            self._plan.recipes,
        )
        progress = Progress(self._plan.n_bytes, collector.done_bytes)
        try:
            if self._plan.groups:
                self._build_mixed(encoders, progress)
            else:
                self._build_in_order(encoders, progress)
            collector.finish()
        finally:
            collector.abandon()
            progress.close()
            encoders.close()
        for item in self._plan.scanned:  # so that the ids are those of the text that was scanned
            item.source.check_unchanged(item.facts)
        self._publish_metadata()

    def _build_in_order(self, encoders: Encoders, progress: Progress) -> None:
        """One reader after the other."""
        numbers = range(len(self._plan.readers))
        for number, work, encoded, is_last in self._encode(encoders, numbers):
            self._collector.add(number, encoded, work.after if is_last else None)
            if is_last:
                self._report(work, progress)

    def _build_mixed(self, encoders: Encoders, progress: Progress) -> None:
        """Documents of all groups in turns, until one of them is used up."""
        collector, groups = self._collector, self._plan.groups
        shares = [share for _, share, _ in groups]
        streams = [self._encode(encoders, numbers) for _, _, numbers in groups]
        current: list[tuple[int, Work, Encoded, int] | None] = [None] * len(groups)
        group, room, is_whole, to_skip = 0, 0.0, True, list(collector.passed)
        while True:
            if is_whole:
                group, room = choose_group(collector.mix, shares)
            state = current[group]
            if state is None:
                found = next(streams[group], None)
                if found is None:
                    break
                number, work, encoded, _ = found
                begin = min(to_skip[number], len(encoded))  # of a build that was cut
                to_skip[number] -= begin
                if begin == len(encoded) > 0:
                    continue
                state = (number, work, encoded, begin)
            number, work, encoded, begin = state
            end = begin + count_pieces(encoded.lengths, encoded.ends, begin, room)
            is_done = end >= len(encoded)
            n_tokens = collector.add(number, encoded, work.after if is_done else None, begin, end)
            collector.mix.add(group, n_tokens)
            is_whole = end == begin or bool(encoded.ends[end - 1])
            current[group] = None if is_done else (number, work, encoded, end)
            if is_done:
                self._report(work, progress)
        name = groups[group][0]
        log.info(f"--mix: {name} is used up; what is left of the other sources is left out")

    def _encode(
        self, encoders: Encoders, numbers: Iterator[int] | range | list[int]
    ) -> Iterator[tuple[int, Work, Encoded, bool]]:
        """What these readers have left, one after the other, encoded."""
        order: list[int] = []  # of the readers whose work is in flight

        def read() -> Iterator[tuple[int, Work]]:
            for number in numbers:
                for work in self._plan.readers[number].read(self._collector.places[number]):
                    order.append(number)
                    yield number, work

        for work, encoded, is_last in encoders.encode(read()):
            yield order[0], work, encoded, is_last
            if is_last:
                order.pop(0)

    def _report(self, work: Work, progress: Progress) -> None:
        progress.add(work.n_bytes, self._collector.n_documents)
        self._collector.done_bytes += work.n_bytes
        self._collector.save_now_and_then()
        if self._job.stop is not None:
            if self._job.stop.stopping:
                self._collector.save()
            self._job.stop.leave_if_stopping(
                "stopped while preparing the text; what is done is kept",
                "run the same command to continue",
            )

    def _check_space(self) -> None:
        """Refuse a disk that cannot hold the shards before the work, not after it."""
        collector, total = self._collector, self._plan.n_bytes
        done = sum(collector.count_tokens(split) for split in SPLITS)
        # Text has rarely more than 5 bytes a token.
        needed = (total // 5 - done) * self._tokenizer.id_dtype.itemsize
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

    def _publish_metadata(self) -> None:
        metadata = self._build_metadata()
        try:
            for name in ("train", "val"):
                check_long_enough(SplitEntry.read(metadata[name]), name)
        except PreflightError:
            remove_build(self._building)
            raise
        facts = build_facts(self._plan, self._collector, self._settings, self._tokenizer)
        write_report(self._building, facts)
        content = render_metadata(metadata)
        with publish_file(self._building / METADATA_NAME, len(content)) as file:
            file.write(content)

    def _build_metadata(self) -> dict[str, Any]:
        tokenizer, settings, total = self._tokenizer, self._settings, self._collector.total
        parts = {
            split: {
                "n_documents": total.n_documents[split],
                "n_tokens": sum(entry.n_tokens for entry in self._collector.shards[split]),
                "n_bytes": total.n_bytes[split],
                "shards": [entry.model_dump() for entry in self._collector.shards[split]],
            }
            for split in SPLITS
        }
        facts = tokenizer.describe() | {"end_of_text_id": tokenizer.end_of_text_id}
        if self._job.asked_vocab_size is not None:
            facts["asked_vocab_size"] = self._job.asked_vocab_size
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": facts,
            "dtype": tokenizer.id_dtype.name,
            "shard_size": settings.shard_size,
            "document_separator": settings.document_separator,
            "split": {"val_split": settings.val_split, "by": self._plan.by},
            "sources": describe_sources(self._plan.scanned),
            "train": parts["train"],
            "val": parts["val"],
            "files": [entry.model_dump() for entry in self._files],
        }
        preparation = describe_preparation(settings)
        return metadata | ({"preparation": preparation} if preparation else {})
