"""Chats to the files of a part: ids in shards, the mask, the borders of rows, and all counts."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preflight.core.storage import fsync_folder, make_own_folder
from preflight.corpus.chats.facts import ChatCounts, Encoder, ExampleEntry
from preflight.corpus.chats.reading import ReadChat
from preflight.corpus.chats.rows import MASK_DTYPE, OFFSET_DTYPE
from preflight.corpus.metadata import (
    MASK_NAME,
    OFFSETS_NAME,
    SPLITS,
    FileEntry,
    ShardEntry,
    SplitEntry,
)
from preflight.corpus.shards import ShardWriter
from preflight.corpus.sources.token_arrays import count_text_bytes
from preflight.tokenization.chats import EncodedChat

BATCH_CHATS, BATCH_CHARACTERS = 256, 2**20  # that are encoded at once
N_EXAMPLES = 3
_MAX_ITEMS = 2**60  # of a file whose length is known at its end


class PartWriter:
    """The files of one part, written in the folder of a build.

    Attributes:
        n_rows, n_tokens: that were written.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        make_own_folder(folder)
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._shards: list[ShardEntry] = []
        self._shard: ShardWriter | None = None
        self._mask = ShardWriter(folder / MASK_NAME, MASK_DTYPE, _MAX_ITEMS)
        self._offsets = ShardWriter(folder / OFFSETS_NAME, OFFSET_DTYPE, _MAX_ITEMS)
        self._offsets.write(np.zeros(1, OFFSET_DTYPE))
        self.n_rows = self.n_tokens = 0

    def add(self, rows: Sequence[EncodedChat]) -> None:
        """Write rows, of which there is one at least."""
        ids = np.concatenate([row.ids for row in rows]).astype(self._dtype)
        ends = self.n_tokens + np.cumsum([len(row.ids) for row in rows], dtype=OFFSET_DTYPE)
        self._mask.write(np.concatenate([row.mask for row in rows]).astype(MASK_DTYPE))
        self._offsets.write(ends)
        self.n_rows, self.n_tokens = self.n_rows + len(rows), int(ends[-1])
        while len(ids):
            if self._shard is None:
                path = self._folder / f"shard_{len(self._shards):05d}.npy"
                self._shard = ShardWriter(path, self._dtype, self._shard_tokens)
            ids = ids[self._shard.write(ids) :]
            if self._shard.is_full:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None

    def close(self, n_documents: int, n_bytes: int) -> tuple[SplitEntry, list[FileEntry]]:
        """Finish all files: the part's entry, and those of the files beside the shards."""
        self._close_shard()
        files = []
        for writer in (self._mask, self._offsets):
            entry = writer.close()
            name = f"{self._folder.name}/{entry.name}"
            files.append(FileEntry(name=name, n_bytes=entry.n_bytes, sha256=entry.sha256))
        fsync_folder(self._folder)
        part = SplitEntry(
            n_documents=n_documents, n_tokens=self.n_tokens, n_bytes=n_bytes, shards=self._shards
        )
        return part, files

    def abandon(self) -> None:
        """Close all files as they are."""
        for writer in (self._shard, self._mask, self._offsets):
            if writer is not None:
                writer.abandon()


class ChatWriter:
    """Both parts, and what is counted while they are written.

    Attributes:
        dropped: numbers of the chats without a target, from 0, in the order of reading.
    """

    def __init__(self, building: Path, encoder: Encoder, shard_tokens: int) -> None:
        self._encoder, self._dtype = encoder, encoder.tokenizer.id_dtype
        self._sizes = count_text_bytes(encoder.tokenizer)
        self._parts = {
            split: PartWriter(building / split, self._dtype, shard_tokens) for split in SPLITS
        }
        self._n_documents: Counter[str] = Counter()
        self._n_bytes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._longest = 0
        self._examples: list[tuple[int, int, str]] = []  # the least hashes, as a heap: negative
        self.dropped: list[int] = []

    def add(self, chats: Sequence[ReadChat], hashes: Sequence[int], is_val: Sequence[bool]) -> None:
        """Encode chats and write them, each to its part.

        Args:
            hashes: of each chat's content; they choose the examples.
            is_val: whether each is for validation.
        """
        encoded = self._encoder.encode([read.chat for read in chats])
        waiting: dict[str, list[EncodedChat]] = {split: [] for split in SPLITS}
        for read, rows, content, for_val in zip(chats, encoded, hashes, is_val, strict=True):
            rows = [row for row in rows if row.mask.any()]
            split = "val" if for_val else "train"
            self._count(read, rows)
            if not rows:
                continue
            if split == "train":
                row = self._parts[split].n_rows + len(waiting[split])
                self._note_example(content, row, read.chat.place)
            self._n_documents[split] += 1
            self._n_bytes[split] += sum(int(self._sizes[row.ids[row.mask]].sum()) for row in rows)
            waiting[split] += rows
        for split, rows in waiting.items():
            if rows:
                self._parts[split].add(rows)

    def _count(self, read: ReadChat, rows: list[EncodedChat]) -> None:
        counts = self._counts
        if not rows:
            self.dropped.append(counts["n_chats"])
        counts["n_chats"] += 1
        counts["n_open"] += read.is_open
        counts["n_dropped"] += not rows
        counts["n_rows"] += len(rows)
        counts["n_cut"] += any(row.n_cut_turns for row in rows)
        counts["n_cut_at_end"] += any(row.n_cut_tokens for row in rows)
        for row in rows:
            counts["n_cut_turns"] += row.n_cut_turns
            counts["n_cut_tokens"] += row.n_cut_tokens
            counts["n_answers"] += row.n_answers
            counts["n_ended"] += row.n_ended
            counts["n_targets"] += int(row.mask.sum())
            counts["n_tokens"] += len(row.ids)
            self._longest = max(self._longest, len(row.ids))

    def _note_example(self, content: int, row: int, place: str) -> None:
        """Keep the chats of the least hashes: a choice that is even and always the same."""
        if any(-content == other for other, _, _ in self._examples):  # a copy
            return
        heapq.heappush(self._examples, (-content, -row, place))
        if len(self._examples) > N_EXAMPLES:
            heapq.heappop(self._examples)

    @property
    def counts(self) -> ChatCounts:
        """What was counted so far."""
        return ChatCounts(**self._counts, longest=self._longest)

    @property
    def examples(self) -> list[ExampleEntry]:
        """Rows to show, in their order."""
        chosen = sorted((-row, place) for _, row, place in self._examples)
        return [ExampleEntry(place=place, row=row) for row, place in chosen]

    @property
    def is_split(self) -> bool:
        """Whether both parts have a chat."""
        return all(self._n_documents[split] for split in SPLITS)

    def close(self) -> tuple[dict[str, Any], list[FileEntry]]:
        """Finish all files: the entries of the parts for the metadata, and those of the files."""
        entries, files = {}, []
        for split in SPLITS:
            part, own = self._parts[split].close(self._n_documents[split], self._n_bytes[split])
            entries[split] = part.model_dump()
            files += own
        return entries, files

    def abandon(self) -> None:
        """Close all files as they are."""
        for part in self._parts.values():
            part.abandon()


def batch_chats(chats: Iterator[ReadChat]) -> Iterator[list[ReadChat]]:
    """The same chats in lists that are encoded at once."""
    while batch := list(_take_batch(chats)):
        yield batch


def _take_batch(chats: Iterator[ReadChat]) -> Iterator[ReadChat]:
    n_characters = 0
    for read in itertools.islice(chats, BATCH_CHATS):
        yield read
        n_characters += sum(len(message.content) for message in read.chat.messages)
        if n_characters > BATCH_CHARACTERS:
            return
