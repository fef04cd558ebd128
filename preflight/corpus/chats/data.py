"""A data folder of chats as a run sees it: `DataFolder`, with rows in place of one long text."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflight.corpus.chats.facts import ChatFacts, read_facts
from preflight.corpus.chats.rows import ChatRows
from preflight.corpus.length_buckets import (
    count_padded_tokens,
    find_largest_batch,
    order_rows,
    pad_lengths,
)
from preflight.corpus.metadata import (
    MASK_NAME,
    OFFSETS_NAME,
    Metadata,
    damaged_error,
    read_metadata,
)
from preflight.corpus.shards import DataFolder, Split, load_data_folder
from preflight.settings import TrainingSettings
from preflight.tokenization import Tokenizer

_SPLITS = ("train", "val")  # in the order of the fingerprint


@dataclass(frozen=True)
class ChatData(DataFolder):
    """A verified folder of chats, whose files are opened when they are read.

    A row of T + 1 tokens has T inputs. The ``n_bytes`` of a part count the UTF-8 of what its
    targets spell, so that bits per byte are nats per target / ln 2 x targets / ``n_bytes``.

    Attributes:
        fingerprint: a digest of every id, mask and border of rows.
        facts: what was counted when it was made.
    """

    facts: ChatFacts

    def open_rows(self, split: str) -> ChatRows:
        """The rows of ``train`` or ``val``, to be closed.

        Raises:
            PreflightError: code DATA, when a file is damaged.
        """
        part: Split = getattr(self, split)
        return ChatRows(self.path / split, part, self.dtype, self.vocab_size)

    @functools.cached_property
    def _shape(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of each training row."""
        with self.open_rows("train") as rows:
            return rows.lengths - 1, rows.n_targets

    @property
    def n_rows(self) -> int:
        """Training rows."""
        return len(self._shape[0])

    @property
    def longest_tokens(self) -> int:
        """Inputs of the longest training row, padded."""
        return int(self.pad(self._shape[0].max()))

    @property
    def mean_tokens(self) -> float:
        """Inputs of a training row in the mean, without padding."""
        return float(self._shape[0].mean())

    def pad(self, n_inputs: np.ndarray) -> np.ndarray:
        """The width of a batch whose longest row has so many inputs."""
        return pad_lengths(n_inputs, self.facts.context_length)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(R,) the training rows in the order of an epoch."""
        return order_rows(self._shape[0], seed, self.fingerprint, epoch)

    def find_largest_batch(self, training: TrainingSettings) -> tuple[int, int]:
        """The micro-batch of the first epoch that needs most memory: its number, its targets."""
        order, widths = self.order(training.seed, 0), self.pad(self._shape[0])
        return find_largest_batch(order, widths, self._shape[1], training.batch_size)

    def count_padded_tokens(self, training: TrainingSettings) -> np.ndarray:
        """(M,) tokens of each micro-batch of the first epoch, padding included."""
        order, widths = self.order(training.seed, 0), self.pad(self._shape[0])
        return count_padded_tokens(order, widths, training.batch_size)

    def measure_tokens_per_byte(self, split: str) -> float:
        """Targets of a part for each byte that they spell, for bits per byte."""
        part: Split = getattr(self, split)
        with self.open_rows(split) as rows:
            return int(rows.n_targets.sum()) / max(1, part.n_bytes)


def load_chat_folder(folder: Path, tokenizer: Tokenizer) -> ChatData:
    """Verify every byte of a data folder of chats and return it.

    Raises:
        PreflightError: code DATA for anything missing, damaged, extra, or made with another
            tokenizer, and for a data folder of text.
    """
    facts = read_facts(folder, read_metadata(folder))
    data = load_data_folder(folder, tokenizer)
    listed = {entry.name for entry in data.metadata.files}
    for name in _list_names():
        if name not in listed:
            raise damaged_error(folder / name, "metadata.json does not list it")
    fingerprint = compute_chat_fingerprint(data.fingerprint, data.metadata)
    chats = ChatData(**vars(data) | {"fingerprint": fingerprint}, facts=facts)
    for split in _SPLITS:
        chats.open_rows(split).close()  # whose files are masks and borders of rows
    return chats


def compute_chat_fingerprint(fingerprint: str, metadata: Metadata) -> str:
    """The digest of every id, mask and border of rows, from the digest of the ids."""
    entries = {entry.name: entry for entry in metadata.files}
    digest = hashlib.sha256(fingerprint.encode())
    for name in _list_names():
        digest.update(entries[name].sha256.encode())
    return digest.hexdigest()


def _list_names() -> list[str]:
    return [f"{split}/{name}" for split in _SPLITS for name in (MASK_NAME, OFFSETS_NAME)]
