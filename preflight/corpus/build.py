"""Text to a data folder: plan which documents go where, build it recoverably, reuse or rebuild.

The first pass over the text shows faults in it before anything is written. The second tokenises
it and writes the shards in ``<data_dir>/.building``, with a journal entry per finished shard; a
complete build is then renamed into place. No torch: workers stay light.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
from preflight.corpus.shards import (
    FORMAT,
    METADATA_NAME,
    SHARD_NAME,
    SPLITS,
    VERSION,
    DataFolder,
    ShardWriter,
    check_long_enough,
    load_data_folder,
    read_metadata,
    render_metadata,
    verify_shard,
)
from preflight.corpus.sources import (
    SAMPLE_NAME,
    Document,
    Source,
    check_unchanged,
    describe_sources,
    find_inputs,
    gather_sources,
    open_source,
    scan_inputs,
)
from preflight.corpus.workers import Encoders
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

BUILDING_NAME = ".building"
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
    building = data_dir / BUILDING_NAME
    inputs = find_inputs(settings)
    # A kill may leave a build that is done with; the text at hand tells whether it is.
    unfinished = building if inputs else building / METADATA_NAME
    is_complete = (data_dir / METADATA_NAME).exists() and not unfinished.exists()
    if not inputs and is_complete:
        return _reuse(load_data_folder(data_dir, tokenizer), context_length)
    sources: list[Source] | None = None
    if inputs and not any(item.is_pipe for item in inputs):
        sources = scan_inputs(inputs, settings.document_separator, stop)
        # Before the lock, so that several runs can share a data folder that needs no change.
        if is_complete:
            found = _load_if_same(data_dir, sources, settings, tokenizer)
            if isinstance(found, DataFolder):
                return _reuse(found, context_length)
    make_folder(data_dir)
    with FolderLock(data_dir):
        _finish_swap(data_dir)
        is_complete = (data_dir / METADATA_NAME).exists()
        if not inputs and is_complete:
            return _reuse(load_data_folder(data_dir, tokenizer), context_length)
        if not inputs and _holds_leftovers(data_dir):
            raise PreflightError(
                ExitCode.DATA,
                f"{data_dir} is unfinished: it has no {METADATA_NAME}",
                "rerun with --text-file to finish it, or choose another --data-dir",
            )
        _refuse_foreign(data_dir)
        make_folder(building)
        if sources is None:
            sources = gather_sources(inputs, building, settings.document_separator, stop)
        if is_complete:
            found = _load_if_same(data_dir, sources, settings, tokenizer)
            if isinstance(found, DataFolder):
                remove_tree(building)
                return _reuse(found, context_length)
            log.info(f"rebuilding {data_dir} because {found}")
        plan = _build_plan(sources, settings, tokenizer)
        if n_workers is None:
            n_workers = _choose_workers(plan, settings)
        _Builder(building, plan, settings, tokenizer, stop).build(
            context_length, block_bytes, n_workers
        )
        _finish_swap(data_dir)
        return load_data_folder(data_dir, tokenizer)


# ---- the data folder ----------------------------------------------------------------------------


def _reuse(data: DataFolder, context_length: int) -> DataFolder:
    for name in ("train", "val"):
        check_long_enough(data.metadata[name], name, context_length)
    log.info(f"reusing {data.path} ({data.train.n_tokens:,} training tokens)")
    return data


def _load_if_same(
    data_dir: Path, sources: list[Source], settings: DataSettings, tokenizer: Tokenizer
) -> DataFolder | str:
    """The data folder when it is what these settings make of the text, else why it is not."""
    try:
        metadata = read_metadata(data_dir)
        if metadata["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            return f"the tokenizer changed from {metadata['tokenizer']['name']} to {tokenizer.name}"
        data = load_data_folder(data_dir, tokenizer)
    except PreflightError as error:
        return error.lines[0]
    described, known = describe_sources(sources), metadata["sources"]
    if described != known:
        pairs = zip(described, known, strict=False)
        name = next((new["name"] for new, old in pairs if new != old), None)
        return f"the text changed ({name or f'{len(known)} files before, {len(described)} now'})"
    for flag, before, now in (
        ("--document-separator", metadata["document_separator"], settings.document_separator),
        ("--val-split", metadata["split"]["val_split"], settings.val_split),
    ):
        if before != now:
            return f"{flag} changed from {before!r} to {now!r}"
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


def _holds_leftovers(data_dir: Path) -> bool:
    building = data_dir / BUILDING_NAME
    is_own_sample = (building / SAMPLE_NAME).exists()
    return ((building / _JOURNAL_NAME).exists() and not is_own_sample) or any(
        (data_dir / split).exists() for split in SPLITS
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

    sources: list[Source]
    documents: dict[str, list[Document]]  # by split
    by: str  # "documents" or "tail"
    key: str

    def count_bytes(self, *splits: str) -> int:
        return sum(document.n_bytes for split in splits for document in self.documents[split])


def _build_plan(sources: list[Source], settings: DataSettings, tokenizer: Tokenizer) -> _Plan:
    """Share the documents out: every 1/val_split-th or so, where there are many, else the tail."""
    documents = [
        Document(source, *source.spans[i : i + 2])
        for source in sources
        for i in range(0, len(source.spans), 2)
    ]
    share = settings.val_split
    total = sum(document.n_bytes for document in documents)
    parts: dict[str, list[Document]] = {"train": [], "val": []}
    # One huge document among many would make the validation part huge or all but empty.
    if (
        len(documents) * share >= 8
        and max(document.n_bytes for document in documents) <= share * total
    ):
        by = "documents"
        for index, document in enumerate(documents):
            parts["val" if _is_validation(index, share) else "train"].append(document)
    else:
        by, parts = "tail", _split_tail(documents, total - math.ceil(total * share))
    facts = [
        VERSION,
        [[s.name, s.size, s.sha256] for s in sources],
        tokenizer.fingerprint,
        settings.document_separator,
        share,
        settings.shard_size,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _Plan(sources, parts, by, key)


def _is_validation(index: int, share: float) -> bool:
    """One document of each group of 1/share, picked by a hash: an even share without a period."""
    group = math.floor(index * share)
    first, behind = math.ceil(group / share), math.ceil((group + 1) / share)
    draw = int.from_bytes(hashlib.sha256(b"%d" % group).digest()[:8], "big")
    return index == first + draw % max(1, behind - first)


def _split_tail(documents: list[Document], target: int) -> dict[str, list[Document]]:
    """Documents before and behind `target` bytes of text; the one it falls into becomes two."""
    passed = 0
    for number, document in enumerate(documents):
        if passed + document.n_bytes > target:
            cut = _find_tail_cut(document, document.begin + target - passed)
            left = Document(document.source, document.begin, cut)
            right = Document(document.source, cut, document.end)
            return {
                "train": documents[:number] + [left] * (left.n_bytes > 0),
                "val": [right, *documents[number + 1 :]],
            }
        passed += document.n_bytes
    return {"train": documents[:-1], "val": documents[-1:]}


def _find_tail_cut(document: Document, target: int) -> int:
    """An offset at or behind `target`: behind a line break or space where one is near."""
    if target == document.begin:
        return target
    with open_source(document.source) as file:
        file.seek(target)
        near = file.read(min(64 * 1024, document.end - target))
    for mark in (b"\n", b" "):
        found = near.find(mark) + 1
        if 0 < found < len(near):
            return target + found
    inside = 0
    while inside < len(near) and near[inside] & 0xC0 == 0x80:
        inside += 1
    return target + inside


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
        self._shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._position: list[Any] = [SPLITS[0], 0, 0, 0]  # split, document, offset, ids to skip

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
        for source in self._plan.sources:  # the ids are those of the text that was judged
            check_unchanged(source)
        metadata = self._build_metadata()
        try:
            for name in ("train", "val"):
                check_long_enough(metadata[name], name, context_length)
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
                for split in SPLITS:
                    verify = partial(verify_shard, self._building / split, self._tokenizer)
                    verify_all(verify, journal["shards"][split])
                self._shards, self._position = journal["shards"], journal["position"]
        n_kept = sum(map(len, self._shards.values()))
        if n_kept:
            log.info(f"resuming at shard {n_kept}")
        for split in SPLITS:
            kept = {entry["name"] for entry in self._shards[split]}
            folder = self._building / split
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    remove_tree(path)

    def _count_done_bytes(self) -> int:
        split, document, offset, _ = self._position
        finished = SPLITS[: (*SPLITS, "end").index(split)]
        begun = self._plan.documents.get(split, [])[:document]
        return self._plan.count_bytes(*finished) + sum(d.n_bytes for d in begun) + offset

    def _check_space(self, total: int) -> None:
        """A disk that cannot hold the shards is told of before the work, not after."""
        done = sum(entry["n_bytes"] for split in SPLITS for entry in self._shards[split])
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
        documents, shards = self._plan.documents[split], self._shards[split]
        _, document, offset, skip = self._position
        follower = "train" if split == "val" else "end"
        consumed, writer = 0, None
        bound = self._plan.count_bytes(split) + len(documents)
        blocks = read_blocks(documents, document, offset, block_bytes, self._tokenizer.last_cut)
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
                        self._record(split, entry, [split, block.document, block.offset, consumed])
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

    def _record(self, split: str, entry: dict[str, Any], position: list[Any]) -> None:
        self._shards[split].append(entry)
        self._position = position
        write_json(
            self._building / _JOURNAL_NAME,
            {"key": self._plan.key, "position": position, "shards": self._shards},
        )

    def _build_metadata(self) -> dict[str, Any]:
        tokenizer, settings, plan = self._tokenizer, self._settings, self._plan
        parts = {
            split: {
                "n_documents": len(plan.documents[split]),
                "n_tokens": sum(entry["n_tokens"] for entry in self._shards[split]),
                "n_bytes": plan.count_bytes(split),
                "shards": self._shards[split],
            }
            for split in SPLITS
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text_id": tokenizer.end_of_text_id,
            },
            "dtype": tokenizer.id_dtype.name,
            "shard_size": settings.shard_size,
            "document_separator": settings.document_separator,
            "split": {"val_split": settings.val_split, "by": plan.by},
            "sources": describe_sources(plan.sources),
            "train": parts["train"],
            "val": parts["val"],
        }
