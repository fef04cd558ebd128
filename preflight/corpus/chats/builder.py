"""Chats from files that were scanned to the shards, masks and metadata of a build."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import make_own_folder, publish_file
from preflight.corpus.builder import save_tokenizer
from preflight.corpus.chats.encoding import ChatWriter, batch_chats
from preflight.corpus.chats.facts import (
    CHATS_KEY,
    ChatFacts,
    Encoder,
    TemplateEntry,
)
from preflight.corpus.chats.reading import ChatFile, ReadChat, read_chats
from preflight.corpus.collector import write_journal
from preflight.corpus.metadata import (
    FORMAT,
    METADATA_NAME,
    SPLITS,
    VERSION,
    render_metadata,
)
from preflight.corpus.ownership import remove_build
from preflight.corpus.progress import Progress
from preflight.corpus.shards import BUILDING_NAME
from preflight.corpus.sources import ScannedSource, describe_sources, text_error
from preflight.tokenization.chats import Chat

SHARD_TOKENS = 10_000_000


@dataclass(frozen=True)
class Checked:
    """What the first reading found.

    Attributes:
        hashes: (N,) uint64, of each chat's content, in the order of reading.
        formats: the forms of the files, each once.
    """

    hashes: np.ndarray
    formats: list[str]


@dataclass(frozen=True)
class ChatJob:
    """What was asked for, and how it is done.

    Attributes:
        files, scanned: the same files, in the order of reading.
        encoder: turns chats into ids and masks.
        folder: the data folder, in which the build has its own.
        val_split: share of the chats for validation.
        stop: a signal that comes ends the build.
        shard_tokens: tokens of a shard.
    """

    files: list[ChatFile]
    scanned: list[ScannedSource]
    encoder: Encoder
    folder: Path
    val_split: float
    stop: StopFlag | None
    shard_tokens: int

    # ---- the two readings -----------------------------------------------------------------------

    def _read(self, doing: str) -> Iterator[tuple[ChatFile, str, ReadChat]]:
        """All chats of all files, with the file and its form; a bar shows how far it is."""
        total = sum(item.facts.size for item in self.scanned)
        progress, n_chats, n_bytes = Progress(total, doing=doing, items="chats"), 0, 0
        try:
            for file in self.files:
                for form, read in read_chats(file):
                    yield file, form.name, read
                    n_chats, n_bytes = n_chats + 1, n_bytes + read.n_bytes
                    if n_chats % 256 == 0:
                        progress.add(n_bytes, n_chats)
                        n_bytes = 0
                        self._leave_if_stopping()
            progress.add(n_bytes, n_chats)
        finally:
            progress.close()

    def _leave_if_stopping(self) -> None:
        if self.stop is not None:
            self.stop.leave_if_stopping(
                "stopped while preparing the chats; nothing was changed",
                "run the same command to begin again",
            )

    def check(self) -> Checked:
        """Read all chats once, and tell what they are.

        Raises:
            PreflightError: code TEXT, for the first file at fault, and for too few chats.
        """
        hashes = array("Q")
        counts: Counter[tuple[str, str]] = Counter()
        for file, form, read in self._read("checking chats"):
            hashes.append(hash_chat(read.chat))
            counts[file.label, form] += 1
        formats = list(dict.fromkeys(form for _, form in counts))
        for item in self.scanned:
            for note in item.facts.notes:
                log.info(f"{item.source.label}: {note}")
        for (label, form), n_chats in counts.items():
            log.info(f"{label}: {form}, {n_chats:,} rows")
        checked = Checked(np.frombuffer(hashes, np.uint64), formats)
        self._find_threshold(checked.hashes, np.ones(len(hashes), bool))
        return checked

    def build(self, checked: Checked) -> None:
        """Write all files into the folder of the build, and the metadata last."""
        usable = np.ones(len(checked.hashes), bool)
        writer = self._encode(checked, usable)
        if not writer.is_split and writer.dropped:
            # All chats of a part were too long: share out those that are left.
            usable[writer.dropped] = False
            begin_build(self.folder / BUILDING_NAME)
            writer = self._encode(checked, usable)
        for item in self.scanned:  # so that the ids are those of the files that were scanned
            item.source.check_unchanged(item.facts)
        self._publish_metadata(writer, checked)

    def _encode(self, checked: Checked, usable: np.ndarray) -> ChatWriter:
        """All chats to shards; those that are not `usable` count, but do not share in the split."""
        threshold = self._find_threshold(checked.hashes, usable)
        is_val = checked.hashes < threshold
        writer = ChatWriter(self.folder / BUILDING_NAME, self.encoder, self.shard_tokens)
        first = 0
        try:
            for batch in batch_chats(read for *_, read in self._read("encoding chats")):
                behind = first + len(batch)
                hashes, for_val = checked.hashes[first:behind], is_val[first:behind]
                writer.add(batch, hashes.tolist(), for_val.tolist())
                first = behind
            self._leave_if_stopping()
        except BaseException:
            writer.abandon()
            raise
        return writer

    def _find_threshold(self, hashes: np.ndarray, usable: np.ndarray) -> np.uint64:
        """Chats of lesser hashes are for validation.

        Raises:
            PreflightError: code TEXT, where there are not two different chats.
        """
        distinct = np.unique(hashes[usable])
        if len(distinct) < 2:
            n_dropped = int((~usable).sum())
            too_long = (
                f", and {n_dropped:,} have no target in --context-length" if n_dropped else ""
            )
            what = "no chat" if not len(distinct) else "a single chat, or copies of it"
            raise text_error(
                self.files[0].label,
                f"{what}{too_long}: one is needed to learn from, and another one to validate",
                "give more chats" + " or a larger --context-length" * bool(n_dropped),
            )
        wanted = np.uint64(min(int(self.val_split * 2**64), 2**64 - 1))
        n_val = int(np.searchsorted(distinct, wanted))
        return np.uint64(distinct[min(max(n_val, 1), len(distinct) - 1)])

    def _publish_metadata(self, writer: ChatWriter, checked: Checked) -> None:
        building, encoder = self.folder / BUILDING_NAME, self.encoder
        files = save_tokenizer(building, encoder.tokenizer)
        parts, own = writer.close()
        facts = ChatFacts(
            formats=checked.formats,
            template=TemplateEntry(
                name=encoder.template.name, fingerprint=encoder.template.fingerprint
            ),
            encoder=encoder.fingerprint,
            context_length=encoder.context_length,
            learn_from=encoder.learn_from,
            counts=writer.counts,
            examples=writer.examples,
        )
        content = render_metadata(
            {
                "format": FORMAT,
                "version": VERSION,
                "tokenizer": encoder.tokenizer.describe()
                | {"end_of_text_id": encoder.tokenizer.end_of_text_id},
                "dtype": encoder.tokenizer.id_dtype.name,
                "shard_size": self.shard_tokens,
                "document_separator": None,
                "split": {"val_split": self.val_split, "by": "content"},
                "sources": describe_sources(self.scanned),
                **{split: parts[split] for split in reversed(SPLITS)},
                "files": [entry.model_dump() for entry in files + own],
                CHATS_KEY: facts.model_dump(),
            }
        )
        with publish_file(building / METADATA_NAME, len(content)) as file:
            file.write(content)


def hash_chat(chat: Chat) -> int:
    """64 bits of a digest of what a chat says, wherever it stands."""
    content = json.dumps([[message.role, message.content] for message in chat.messages])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


def begin_build(building: Path) -> None:
    """An empty folder for the build, provably ours. What a build that was cut has left is gone."""
    if os.path.lexists(building):
        remove_build(building)
    make_own_folder(building)
    write_journal(building)
