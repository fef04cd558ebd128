"""What is counted of one source while its documents go by.

A worker process counts each batch, the parent adds the counts up. The sum depends on the rows
alone: the same for any batches and any number of processes, and after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from preflight.corpus.characters import count_characters

SPLITS = ("train", "val")
N_EXAMPLES = 3  # the fewest per reason; the report shows so many
EXAMPLE_CHARACTERS = 300
MAX_BAD_ROWS = 5  # whose numbers are kept
# Characters are sampled: of the first rows and of a sixteenth of the others, the first thousand of
# each 16 Ki. Counting all of them would take a tenth of the time that encoding takes.
ALL_SAMPLED_ROWS, ONE_ROW_IN = 64, 16
SAMPLE_CHARACTERS, SAMPLE_STRIDE = 1000, 2**14
_FLUSH_CHARACTERS = 2**16  # counted in one go, since each call costs as much as a few thousand


@dataclass(frozen=True, slots=True)
class Example:
    """The beginning of a document. ``row`` is its number in the source."""

    row: int
    text: str


def count_utf8(text: str) -> int:
    """The UTF-8 bytes of `text`; half a character counts as three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_sampled(row: int) -> bool:
    """Whether the characters of this row are counted: by a hash, so that no period is missed."""
    return row < ALL_SAMPLED_ROWS or (row * 0x9E3779B1 & 0xFFFFFFFF) >> 16 < 2**16 // ONE_ROW_IN


def _build_splits() -> dict[str, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass
class Tally:
    """Counts of one source. Each row is bad, empty, dropped or kept; `n_rows` has all of them.

    Attributes:
        n_examples: documents whose beginning is kept, for each reason and of those kept.
        n_rows: rows that were read.
        n_bad_rows: rows that are null or hold no text. first_bad_rows: the numbers of some.
        n_empty: rows whose text is empty, before or after cleaning.
        n_raw_bytes: UTF-8 of the texts as they were found.
        n_documents, n_bytes, n_tokens: of the documents kept, for each split. Tokens are those
            that a document takes in the shards.
        dropped: for each reason, documents and their bytes.
        dropped_examples, kept_examples: the first by row number.
        lengths: documents kept by the floor of the binary logarithm of their tokens.
        scripts, odd: sampled characters, see `preflight.corpus.characters`.
    """

    n_examples: int = N_EXAMPLES
    n_rows: int = 0
    n_bad_rows: int = 0
    n_empty: int = 0
    n_raw_bytes: int = 0
    first_bad_rows: list[int] = field(default_factory=list)
    n_documents: dict[str, int] = field(default_factory=_build_splits)
    n_bytes: dict[str, int] = field(default_factory=_build_splits)
    n_tokens: dict[str, int] = field(default_factory=_build_splits)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    dropped_examples: dict[str, list[Example]] = field(default_factory=dict)
    kept_examples: list[Example] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    scripts: dict[str, int] = field(default_factory=dict)
    odd: dict[str, int] = field(default_factory=dict)
    n_sampled_characters: int = 0
    _waiting: list[str] = field(default_factory=list, compare=False, repr=False)
    _n_waiting: int = field(default=0, compare=False, repr=False)

    # ---- counting -------------------------------------------------------------------------------

    def count_bad(self, row: int) -> None:
        """Count a row that is null or holds no text."""
        self.n_rows += 1
        self.n_bad_rows += 1
        self.first_bad_rows = sorted([*self.first_bad_rows, row])[:MAX_BAD_ROWS]

    def count_found(self, n_bytes: int) -> None:
        """Count a row with a text of so many bytes, before anything is done to it.

        One of `count_empty`, `count_dropped` and `count_kept` follows, here or in another tally.
        """
        self.n_rows += 1
        self.n_raw_bytes += n_bytes

    def count_empty(self) -> None:
        """Count a text that is empty, as found or after cleaning."""
        self.n_empty += 1

    def count_dropped(self, row: int, reason: str, text: str, n_bytes: int) -> None:
        """Count a document that a rule dropped.

        Args:
            row: its number.
            reason: such as "gopher_quality: mean word length". Of few reasons, so without figures.
            text: it, or its first `EXAMPLE_CHARACTERS`.
            n_bytes: UTF-8 of the whole.
        """
        counts = self.dropped.setdefault(reason, [0, 0])
        counts[0] += 1
        counts[1] += n_bytes
        self._keep_example(self.dropped_examples.setdefault(reason, []), row, text)

    def count_kept(self, row: int, split: str, text: str, n_bytes: int, n_tokens: int) -> None:
        """Count a document that is part of the data: `text` and `n_bytes` as when it is dropped."""
        self.n_documents[split] += 1
        self.n_bytes[split] += n_bytes
        self.n_tokens[split] += n_tokens
        length = max(n_tokens, 1).bit_length() - 1
        self.lengths[length] = self.lengths.get(length, 0) + 1
        self._keep_example(self.kept_examples, row, text)

    def sample(self, row: int, text: str) -> None:
        """Count characters of a text that passed cleaning and filters, if its row is sampled."""
        if is_sampled(row):
            for begin in range(0, len(text), SAMPLE_STRIDE):
                piece = text[begin : begin + SAMPLE_CHARACTERS]
                self._waiting.append(piece)
                self._n_waiting += len(piece)
            if self._n_waiting >= _FLUSH_CHARACTERS:
                self._flush()

    def _flush(self) -> None:
        """Count the sampled characters that wait for it."""
        if self._waiting:
            scripts, odd = count_characters("".join(self._waiting))
            _add_counts(self.scripts, scripts)
            _add_counts(self.odd, odd)
            self.n_sampled_characters += self._n_waiting
            self._waiting, self._n_waiting = [], 0

    def keep_example(self, row: int, text: str) -> None:
        """Keep the beginning of a document that is counted elsewhere."""
        self._keep_example(self.kept_examples, row, text)

    def _keep_example(self, kept: list[Example], row: int, text: str) -> None:
        if len(kept) < self.n_examples or (kept and row < kept[-1].row):
            # Half a character has no place in JSON: two halves would be read as one whole.
            begin = text[:EXAMPLE_CHARACTERS].encode("utf-16", "surrogatepass")
            example = Example(row, begin.decode("utf-16", "replace"))
            kept[:] = self._choose_first([*kept, example])

    def _choose_first(self, examples: Iterable[Example]) -> list[Example]:
        return sorted(examples, key=lambda example: example.row)[: self.n_examples]

    # ---- adding up ------------------------------------------------------------------------------

    def add(self, other: Tally) -> None:
        """Add the counts of other rows of the same source.

        Raises:
            ValueError: they keep another number of examples.
        """
        if other.n_examples != self.n_examples:
            raise ValueError("tallies with different numbers of examples")
        for tally in (self, other):
            tally._flush()
        for name in _PLAIN_COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _COUNTS_BY_KEY:
            _add_counts(getattr(self, name), getattr(other, name))
        self.first_bad_rows = sorted(self.first_bad_rows + other.first_bad_rows)[:MAX_BAD_ROWS]
        for reason, counts in other.dropped.items():
            before = self.dropped.get(reason, (0, 0))
            self.dropped[reason] = [a + b for a, b in zip(before, counts, strict=True)]
        for reason, examples in other.dropped_examples.items():
            kept = self.dropped_examples.get(reason, [])
            self.dropped_examples[reason] = self._choose_first(kept + examples)
        self.kept_examples = self._choose_first(self.kept_examples + other.kept_examples)

    # ---- as JSON --------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """All counts as plain JSON, in one order whatever came first; `read` takes it."""
        self._flush()
        content = {name: getattr(self, name) for name in _PUBLIC}
        for name in ("dropped", *_COUNTS_BY_KEY):
            content[name] = {str(key): count for key, count in sorted(content[name].items())}
        content["dropped"] = {reason: list(pair) for reason, pair in content["dropped"].items()}
        content["first_bad_rows"] = list(self.first_bad_rows)
        content["kept_examples"] = _describe_examples(self.kept_examples)
        content["dropped_examples"] = {
            reason: _describe_examples(examples)
            for reason, examples in sorted(self.dropped_examples.items())
        }
        return content

    @classmethod
    def read(cls, content: dict[str, Any]) -> Tally:
        """The tally that `describe` wrote.

        Raises:
            ValueError, TypeError, LookupError, AttributeError: it is not such a content.
        """
        if set(content) != set(_PUBLIC):
            raise ValueError("not the counts of a source")
        values = dict(content)
        for name in ("n_examples", *_PLAIN_COUNTS):
            values[name] = _read_count(content[name])
        for name in _COUNTS_BY_KEY:
            key = int if name == "lengths" else str
            values[name] = {key(k): _read_count(count) for k, count in content[name].items()}
        for name in ("n_documents", "n_bytes", "n_tokens"):
            values[name] = {split: values[name][split] for split in SPLITS}
        values["first_bad_rows"] = [_read_count(row) for row in content["first_bad_rows"]]
        values["dropped"] = {
            reason: [_read_count(n), _read_count(n_bytes)]
            for reason, (n, n_bytes) in content["dropped"].items()
        }
        values["kept_examples"] = _read_examples(content["kept_examples"])
        values["dropped_examples"] = {
            reason: _read_examples(examples)
            for reason, examples in content["dropped_examples"].items()
        }
        return cls(**values)


_PUBLIC = tuple(entry.name for entry in fields(Tally) if not entry.name.startswith("_"))
_PLAIN_COUNTS = ("n_rows", "n_bad_rows", "n_empty", "n_raw_bytes", "n_sampled_characters")
_COUNTS_BY_KEY = ("n_documents", "n_bytes", "n_tokens", "lengths", "scripts", "odd")


def add_up(tallies: Iterable[Tally]) -> Tally:
    """One tally of all sources. Its examples are none, since rows of two sources have no order."""
    total = Tally(n_examples=0)
    for tally in tallies:
        content = tally.describe() | {"n_examples": 0, "first_bad_rows": [], "kept_examples": []}
        total.add(Tally.read(content | {"dropped_examples": {}}))
    return total


def _add_counts(counts: dict[Any, int], more: dict[Any, int]) -> None:
    for key, count in more.items():
        counts[key] = counts.get(key, 0) + count


def _describe_examples(examples: list[Example]) -> list[dict[str, Any]]:
    return [{"row": example.row, "text": example.text} for example in examples]


def _read_examples(content: list[dict[str, Any]]) -> list[Example]:
    return [Example(_read_count(entry["row"]), str(entry["text"])) for entry in content]


def _read_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a count")
    return value
