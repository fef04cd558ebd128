"""Ids in the order in which they come, to shards: counts them, drops duplicates, keeps the journal.

The journal of a build says, for each reader, where it continues, and for each split how much of
its shards counts. What a killed build wrote behind that is cut off, so that the continued build
writes the same bytes.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preflight.core.errors import PreflightError
from preflight.core.log import log
from preflight.core.storage import fsync_folder, remove_tree, verify_all, write_json
from preflight.core.strict_json import read_json
from preflight.corpus.encoding import Encoded, RowCounts
from preflight.corpus.filtering.duplicates import DuplicateIndex
from preflight.corpus.metadata import SPLITS, OpenShard, ShardEntry
from preflight.corpus.mixing import MixState
from preflight.corpus.ownership import BUILD_FORMAT, JOURNAL_NAME
from preflight.corpus.plan import Plan
from preflight.corpus.shards import ShardWriter, verify_shard
from preflight.corpus.sources import text_error
from preflight.corpus.tally import Tally, add_up
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

_MAX_BAD_SHARE, _MANY_ROWS = 0.01, 1000  # rows without text; judged early from so many rows on
MAX_TALLIES = 200  # in the journal, which is written often and has a size limit
SAVE_SECONDS = 10.0  # at most so long between two entries of the journal


def write_journal(building: Path, *, key: str = "", **content: Any) -> None:
    """Publish the journal of a build; without a key it only proves whose folder it is."""
    write_json(building / JOURNAL_NAME, {"format": BUILD_FORMAT, "key": key, **content})


class Collector:
    """The shards of a build, and how far it has come.

    Attributes:
        places: of each reader, where it continues; None: at its beginning.
        passed: pieces of each reader that were taken behind its place.
        tallies: what was counted of each reader; the last is of all further ones.
        tried: what rules would drop that nobody asked for, see `RowCounts`.
        mix: tokens of each group of ``--mix``.
        done_bytes: of the sources.
        n_documents: that were written.
    """

    def __init__(
        self, building: Path, plan: Plan, settings: DataSettings, tokenizer: Tokenizer
    ) -> None:
        self._building, self._plan = building, plan
        self._settings, self._tokenizer = settings, tokenizer
        self._begin()

    def _begin(self) -> None:
        """At the beginning of everything."""
        n_readers = len(self._plan.readers)
        self.places: list[Any] = [None] * n_readers
        self.passed = [0] * n_readers
        n_examples = [recipe.n_examples for recipe in self._plan.recipes.values()]
        n_tallies = min(n_readers, MAX_TALLIES)
        self.tallies = [Tally(max(n_examples, default=0)) for _ in range(n_tallies)]
        self.tried: dict[str, int] = {}
        self.mix = MixState([0] * len(self._plan.groups))
        self.done_bytes = self.n_documents = 0
        self.shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        self._writers: dict[str, ShardWriter] = {}
        self._index: DuplicateIndex | None = None
        self._is_whole = True  # the last document that was taken is complete
        self._is_due, self._saved_at = False, time.monotonic()

    def _get_tally(self, number: int) -> Tally:
        """The tally of a reader."""
        return self.tallies[min(number, len(self.tallies) - 1)]

    # ---- the journal ----------------------------------------------------------------------------

    def resume(self) -> None:
        """Take over what an interrupted build of the same plan has done.

        When the journal or anything that it lists is damaged, nothing: all is written anew.
        """
        try:
            journal = read_json(self._building / JOURNAL_NAME)
            if journal["key"] == self._plan.key and "places" in journal:
                self._take_over(journal)
        except (PreflightError, OSError, ValueError, LookupError, TypeError, AttributeError):
            self.abandon()
            self._begin()
        for split in SPLITS:
            kept = {entry.name for entry in self.shards[split]} | {self._name_next(split)}
            kept -= set() if split in self._writers else {self._name_next(split)}
            folder = self._building / split
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    remove_tree(path)
        if self._plan.deduplicates and self._index is None:
            self._index = DuplicateIndex.open(self._building, self._settings.deduplicate, 0)

    def _take_over(self, journal: dict[str, Any]) -> None:
        for split in SPLITS:
            self.shards[split] = [ShardEntry.read(entry) for entry in journal["shards"][split]]
            verify = partial(verify_shard, self._building / split, self._tokenizer)
            verify_all(verify, self.shards[split])
            kept = journal["open"].get(split)
            if kept is not None:
                self._writers[split] = self._open_writer(split, OpenShard.read(kept))
        if self._plan.deduplicates:
            kind, n_documents = self._settings.deduplicate, journal["n_signatures"]
            self._index = DuplicateIndex.open(self._building, kind, n_documents)
        tallies = [Tally.read(content) for content in journal["tallies"]]
        n_places = len(journal["places"]), len(journal["passed"])
        if n_places != (len(self.places),) * 2 or len(tallies) != len(self.tallies):
            raise ValueError("not the journal of these sources")
        self.tallies, self.places, self.passed = tallies, journal["places"], journal["passed"]
        self.tried, self.done_bytes = journal["tried"], journal["done_bytes"]
        self.n_documents = sum(self.total.n_documents.values())
        self.mix = MixState(journal["mix"]["n_tokens"], journal["mix"]["marks"])
        n_tokens = sum(self.count_tokens(split) for split in SPLITS)
        if n_tokens:
            n_shards = sum(map(len, self.shards.values()))
            log.info(f"resuming at shard {n_shards} ({n_tokens:,} tokens are done)")

    def save_now_and_then(self) -> None:
        """Save when a shard was finished, or the last time is long ago."""
        if self._is_due or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the journal, unless a document is not complete: then it stays as it is."""
        if not self._is_whole if self._plan.groups else any(self.passed):
            return
        open_shards = {split: writer.save().model_dump() for split, writer in self._writers.items()}
        for split in SPLITS:
            fsync_folder(self._building / split)
        if self._index is not None:
            self._index.sync()
        write_journal(
            self._building,
            key=self._plan.key,
            places=self.places,
            passed=self.passed,
            shards={
                split: [entry.model_dump() for entry in entries]
                for split, entries in self.shards.items()
            },
            open=open_shards,
            tallies=[tally.describe() for tally in self.tallies],
            tried=self.tried,
            mix={"n_tokens": self.mix.n_tokens, "marks": self.mix.marks},
            n_signatures=0 if self._index is None else self._index.n_documents,
            done_bytes=self.done_bytes,
        )
        self._is_due, self._saved_at = False, time.monotonic()

    # ---- ids ------------------------------------------------------------------------------------

    def add(
        self, number: int, encoded: Encoded, after: Any, begin: int = 0, end: int | None = None
    ) -> int:
        """Take pieces of what a reader gave, and return the tokens that were written.

        Args:
            number: of the reader.
            encoded: what it gave, of which pieces `begin` to `end` are taken.
            after: where the reader continues; None: its work is not complete yet.
        """
        end = len(encoded) if end is None else end
        counted = encoded.counted
        if counted is not None and begin == 0:
            self._get_tally(number).add(counted.tally)
            self._check_bad_rows(number, _MANY_ROWS)
            for rule, count in counted.tried.items():
                self.tried[rule] = self.tried.get(rule, 0) + count
        taken = encoded if (begin, end) == (0, len(encoded)) else encoded.cut(begin, end)
        kept = np.ones(len(taken), bool)
        if counted is not None and self._index is not None:
            kept = self._drop_copies(number, taken, counted, begin)
        if counted is not None and counted.beginnings:
            self._count_kept(number, taken, counted, begin, kept)
        taken = taken.take(kept)
        if counted is None:
            self._count_pieces(number, taken)
        for split, own in taken.list_splits():
            self._write(split, own.ids)
        self.n_documents += int(taken.ends.sum())
        if end > begin:
            self._is_whole = bool(encoded.ends[end - 1])
        self.passed[number] += end - begin
        if after is not None:
            self.places[number], self.passed[number] = after, 0
        return len(taken.ids)

    def _check_bad_rows(self, number: int, least: int) -> None:
        """PreflightError (TEXT) for a table of `least` rows or more, of which too many are bad."""
        tally, label = self._get_tally(number), self._plan.readers[number].label
        too_many = tally.n_bad_rows > _MAX_BAD_SHARE * tally.n_rows
        if tally.n_rows >= least and too_many and not self._settings.allow_bad_rows:
            raise text_error(
                label,
                f"{tally.n_bad_rows:,} of {tally.n_rows:,} rows hold no text, the first: row "
                f"{tally.first_bad_rows[0] + 1:,}",
                "--text-column names another column; --allow-bad-rows leaves such rows out",
            )

    def _drop_copies(
        self, number: int, taken: Encoded, counted: RowCounts, begin: int
    ) -> np.ndarray:
        """(N,) which documents are no copies of earlier ones; the others are counted."""
        assert self._index is not None
        end, tally = begin + len(taken), self._get_tally(number)
        found = np.array(self._index.find(counted.signatures[begin:end]), np.int64)
        reason = f"duplicate: {self._settings.deduplicate}"
        for i in np.flatnonzero(found >= 0):
            row, text = int(counted.rows[begin + i]), counted.beginnings[begin + i]
            tally.count_dropped(row, reason, text, int(taken.n_bytes[i]))
        return found < 0

    def _count_kept(
        self, number: int, taken: Encoded, counted: RowCounts, begin: int, kept: np.ndarray
    ) -> None:
        for i in np.flatnonzero(kept):
            self._get_tally(number).count_kept(
                int(counted.rows[begin + i]),
                "val" if taken.is_val[i] else "train",
                counted.beginnings[begin + i],
                int(taken.n_bytes[i]),
                int(taken.lengths[i]),
            )

    def _count_pieces(self, number: int, taken: Encoded) -> None:
        """Count documents that are no rows by the pieces that end them."""
        tally = self._get_tally(number)
        for split, own in taken.list_splits():
            tally.n_documents[split] += int(own.ends.sum())
            tally.n_bytes[split] += int(own.n_bytes.sum())
            tally.n_tokens[split] += int(own.lengths.sum())
        tally.n_rows += int(taken.ends.sum())
        tally.n_raw_bytes += int(taken.n_bytes.sum())

    def _write(self, split: str, ids: np.ndarray) -> None:
        while len(ids):
            writer = self._writers.get(split)
            if writer is None:
                writer = self._writers[split] = self._open_writer(split, None)
            ids = ids[writer.write(ids) :]
            if writer.is_full:
                self.shards[split].append(self._writers.pop(split).close())
                self._is_due = True

    def _open_writer(self, split: str, kept: OpenShard | None) -> ShardWriter:
        path, dtype = self._building / split / self._name_next(split), self._tokenizer.id_dtype
        bound = self._plan.count_text_bytes(split)
        if bound is not None:
            bound = max(0, bound - sum(entry.n_tokens for entry in self.shards[split]))
        return ShardWriter(path, dtype, self._settings.shard_size, bound, kept)

    def _name_next(self, split: str) -> str:
        return f"shard_{len(self.shards[split]):05d}.npy"

    def count_tokens(self, split: str) -> int:
        """Tokens of a split so far."""
        writer = self._writers.get(split)
        begun = writer.n_tokens if writer is not None else 0
        return sum(entry.n_tokens for entry in self.shards[split]) + begun

    @property
    def total(self) -> Tally:
        """All tallies together."""
        return add_up(self.tallies)

    def finish(self) -> None:
        """Close the shards that are not full.

        Raises:
            PreflightError: code TEXT, when too many rows held no text; STORAGE.
        """
        for number in range(len(self.tallies)):
            self._check_bad_rows(number, 0)
        for split in list(self._writers):
            self.shards[split].append(self._writers.pop(split).close())
        for split in SPLITS:
            fsync_folder(self._building / split)

    def abandon(self) -> None:
        """Close all files as they are."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers.clear()
        if self._index is not None:
            self._index.close()
            self._index = None
