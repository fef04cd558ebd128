"""Items of a task that stand in the training text: by 13-grams of words, in one pass over the ids.

Brown et al. 2020 ("Language models are few-shot learners", appendix C) call an item contaminated
when 13 of its words in a row, in lower case and without punctuation, stand in the training text.
An item of 8 to 12 words is looked for as a whole. A shorter one is too short to tell, since such
words follow each other by chance.

An item is its context with the right continuation; wrong endings were never said by anyone.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from preflight.core.log import is_progress_shown, log
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import DataFolder
from preflight.evaluation.items import Item, Task
from preflight.tokenization import Tokenizer

GRAM_WORDS = 13
MIN_WORDS = 8
N_EXAMPLES = 5
_CHUNK_TOKENS = 2**18
_MAX_HELD_BYTES = 2**20  # text without a single space is cut there
_SEPARATOR = "\0"  # a word that no text has, between two documents

# What is neither a letter, a digit nor white space is deleted, "_" included. ASCII by a table of
# bytes, which is ten times as fast as by a regular expression; 28 to 31 are white space to Python.
_ASCII_SPACES = {*range(9, 14), *range(28, 33)}
_DELETED = bytes(
    code for code in range(1, 128) if not chr(code).isalnum() and code not in _ASCII_SPACES
)
_LOWER = bytes(range(256)).lower()
_RULE = (_LOWER, _DELETED)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_PUNCTUATION = re.compile(r"[^\w\s]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost in a gram's
_MAX_FILTER_BITS = 24  # 16 MB


@dataclass(frozen=True)
class Overlap:
    """Words of an item that stand in the training text.

    Attributes:
        line: of the item in its file, from 1; 0 for an item of no file.
        words: the 13-gram, or the whole of a shorter item.
        document: of the training part, from 1.
    """

    line: int
    words: str
    document: int


@dataclass(frozen=True)
class Contamination:
    """How many of a task's items stand in the training text.

    Attributes:
        task: its name.
        n_items: all of them.
        n_found: those of which 13 words in a row, or all, were found.
        n_too_short: those with fewer than 8 words, which were not looked for.
        overlaps: one for each item found, by its index in the task.
    """

    task: str
    n_items: int
    n_found: int
    n_too_short: int
    overlaps: dict[int, Overlap] = field(repr=False)

    @property
    def share(self) -> float | None:
        """Of the items that were looked for; None where all were too short."""
        n_judged = self.n_items - self.n_too_short
        return self.n_found / n_judged if n_judged else None

    @property
    def examples(self) -> list[Overlap]:
        """The first few, in the order of the items."""
        return [self.overlaps[index] for index in sorted(self.overlaps)[:N_EXAMPLES]]


def find_contamination(
    tasks: Sequence[Task], data: DataFolder, tokenizer: Tokenizer
) -> list[Contamination]:
    """Look for all items of all tasks in the training part of `data`, with progress.

    Args:
        tasks: those that are scored.
        data: of the run, verified.
        tokenizer: the one that made its ids.

    Raises:
        PreflightError: code DATA, when a shard changes meanwhile.
    """
    texts = [build_text(task, item) for task in tasks for item in task.items]
    search = GramSearch(texts)
    began, n_bytes = time.perf_counter(), 0
    with tqdm(
        total=data.train.n_tokens,
        unit="token",
        unit_scale=True,
        desc="looking for the items in the training text",
        disable=not is_progress_shown(),
    ) as bar:
        for ids in _read_chunks(data):
            n_bytes += search.push(ids, tokenizer)
            bar.update(len(ids))
            if search.is_done:
                break
        search.finish()
    seconds = max(time.perf_counter() - began, 1e-9)
    log.info(
        f"{len(texts):,} items looked for in {n_bytes / 1e6:,.1f} MB of training text: "
        f"{seconds:.1f} s, {n_bytes / 1e6 / seconds:,.0f} MB/s"
    )
    return _share_out(tasks, search)


def build_text(task: Task, item: Item) -> str:
    """What would stand in a training text that holds the item."""
    continuation = item.continuations[item.label]
    return continuation if task.kind == "pages" else f"{item.context} {continuation}"


def split_words(text: str) -> list[str]:
    """The words in lower case, without punctuation; what is nothing but punctuation is no word."""
    return _split_bytes(text.encode("utf-8", "replace").replace(b"\0", b"").translate(*_RULE))


def _split_bytes(data: bytes) -> list[str]:
    """The words of UTF-8 whose ASCII part went through `_RULE`."""
    text = data.decode("utf-8", "replace")
    if not text.isascii():
        text = _BEYOND_ASCII.sub(_lower_run, text)
    return text.split()


def _lower_run(run: re.Match[str]) -> str:
    return _PUNCTUATION.sub("", run[0].lower())


def _read_chunks(data: DataFolder) -> Iterator[np.ndarray]:
    """The ids of the training part, in order."""
    reader = ShardReader(data.train, data.dtype, data.vocab_size)
    try:
        for start in range(0, data.train.n_tokens, _CHUNK_TOKENS):
            length = min(_CHUNK_TOKENS, data.train.n_tokens - start)
            yield reader.read(np.array([start]), length)[0]
    finally:
        reader.close()


def _share_out(tasks: Sequence[Task], search: GramSearch) -> list[Contamination]:
    """What was found, by task."""
    found, first = [], 0
    for task in tasks:
        span = range(first, first + len(task.items))
        overlaps = {
            index - first: Overlap(task.items[index - first].line, *search.found[index])
            for index in span
            if index in search.found
        }
        n_short = sum(index in search.too_short for index in span)
        found.append(Contamination(task.name, len(task.items), len(overlaps), n_short, overlaps))
        first = span.stop
    return found


def _hash_grams(word_hashes: np.ndarray, lengths: Iterable[int]) -> dict[int, np.ndarray]:
    """Of each length, the hash of the words from each place on; uint64."""
    wanted, grams = set(lengths), {}
    n_words, total = len(word_hashes), np.zeros(len(word_hashes), np.uint64)
    for length in range(1, max(wanted, default=0) + 1):
        n_grams = n_words - length + 1
        if n_grams <= 0:
            break
        total = total[:n_grams] * _MULTIPLIER + word_hashes[length - 1 :]
        if length in wanted:
            grams[length] = total ^ (total >> np.uint64(29))
    return grams


def _hash_words(words: list[str]) -> np.ndarray:
    """uint64, the same within a process for the same word."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


class GramSearch:
    """The grams of all items, looked up in a stream of ids.

    Attributes:
        found: by item, the words and the document.
        too_short: items that are not looked for.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found: dict[int, tuple[str, int]] = {}
        self.too_short: set[int] = set()
        self._items = [split_words(text) for text in texts]
        self._held, self._words, self._document = b"", list[str](), 1
        self._table: _ByteTable | None = None
        hashes: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        for index, words in enumerate(self._items):
            length = min(GRAM_WORDS, len(words))
            if length < MIN_WORDS:
                self.too_short.add(index)
                continue
            grams = _hash_grams(_hash_words(words), [length])[length]
            hashes.setdefault(length, []).append(grams)
            owners.setdefault(length, []).append(np.full(len(grams), index))
        self._grams = {  # by length
            length: _GramTable(np.concatenate(parts), np.concatenate(owners[length]))
            for length, parts in hashes.items()
        }

    @property
    def is_done(self) -> bool:
        """Whether every item was found that can be."""
        return len(self.found) + len(self.too_short) == len(self._items)

    def push(self, ids: np.ndarray, tokenizer: Tokenizer) -> int:
        """Look at the next ids; returns the bytes of their text, punctuation left out."""
        if self._table is None:
            self._table = _build_byte_table(tokenizer)
        data = self._table.decode(ids)
        text = self._held + data
        # A word may go on in the next ids. No byte of another character equals a space's.
        end = max(text.rfind(b" "), text.rfind(b"\n"), text.rfind(b"\0")) + 1
        if not end and len(text) > _MAX_HELD_BYTES:
            end = len(text)
        self._held = text[end:]
        self._look_up(text[:end])
        return len(data)

    def finish(self) -> None:
        """Look at what was held back."""
        self._look_up(self._held)
        self._held = b""

    def _look_up(self, data: bytes) -> None:
        """Find the grams that end in `data`."""
        words = self._words + _split_bytes(data)
        grams = _hash_grams(_hash_words(words), self._grams)
        for length, places in grams.items():
            for place, owner in self._grams[length].find(places):
                if owner not in self.found:
                    self._note(owner, words, place, length)
        self._words = words[max(0, len(words) - GRAM_WORDS + 1) :]
        left_behind = words[: len(words) - len(self._words)]
        self._document += left_behind.count(_SEPARATOR)

    def _note(self, owner: int, words: list[str], place: int, length: int) -> None:
        """Keep the gram unless only its hash is that of the item's."""
        gram = words[place : place + length]
        item = self._items[owner]
        if any(item[i : i + length] == gram for i in range(len(item) - length + 1)):
            document = self._document + words[:place].count(_SEPARATOR)
            self.found[owner] = (" ".join(gram), document)


class _GramTable:
    """Grams of one length by their hashes, with whose they are."""

    def __init__(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]
        # A filter that few other grams pass: one place in 64 is taken, or more of very many.
        n_bits = min(_MAX_FILTER_BITS, len(hashes).bit_length() + 6)
        self._shift = np.uint64(64 - n_bits)
        self._passes = np.zeros(2**n_bits, bool)
        self._passes[hashes >> self._shift] = True

    def find(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Which of `hashes` are here, by their index, and whose they are."""
        candidates = np.flatnonzero(self._passes[hashes >> self._shift])
        left = np.searchsorted(self._hashes, hashes[candidates], side="left")
        right = np.searchsorted(self._hashes, hashes[candidates], side="right")
        for index, first, last in zip(candidates.tolist(), left, right, strict=True):
            for owner in self._owners[first:last].tolist():
                yield index, owner


class _ByteTable:
    """The bytes of each id, one after the other; ids to bytes without a loop in Python."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        rows = [
            (tokenizer.token_bytes(token) or b"").replace(b"\0", b"").translate(*_RULE)
            for token in range(tokenizer.vocab_size)
        ]
        rows[tokenizer.end_of_text_id] = f" {_SEPARATOR} ".encode()  # which no other id has
        self._bytes = np.frombuffer(b"".join(rows), np.uint8)
        self._lengths = np.array([len(row) for row in rows])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of the ids by `_RULE`, with a separator after each document."""
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        shifts = np.repeat(self._starts[ids] - ends + lengths, lengths)
        return self._bytes[shifts + np.arange(len(shifts))].tobytes()


@functools.lru_cache(maxsize=1)
def _build_byte_table(tokenizer: Tokenizer) -> _ByteTable:
    return _ByteTable(tokenizer)
