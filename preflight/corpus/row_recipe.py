"""What worker processes do with rows: parse, clean, filter, encode. No torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from preflight.corpus.encoding import Encoded, EncodedBuilder, RowCounts, encode_document
from preflight.corpus.filtering.expressions import build_rules, judge
from preflight.corpus.filtering.minhash import sign
from preflight.corpus.filtering.protocol import Rule
from preflight.corpus.reading import DroppedRow
from preflight.corpus.sources.rows import Batch, Parser
from preflight.corpus.split import is_validation
from preflight.corpus.tally import EXAMPLE_CHARACTERS, N_EXAMPLES, Tally, count_utf8, is_sampled
from preflight.settings.kinds import CLEANERS
from preflight.tokenization import Tokenizer

# Rules that nobody asked for are tried on the first rows and on one of some hundred others, for the
# report. On one of 16 they took a tenth of the time of a preparation.
_TRIED_FIRST, _TRIED_EVERY = 64, 8
_TRIED_RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")


@dataclass(frozen=True)
class RowRecipe:
    """How the rows of one source become documents. It is sent to worker processes.

    Attributes:
        parse: of the source.
        cleaner: a name of `CLEANERS`.
        filters: expressions, see `preflight.corpus.filtering`.
        deduplicate: ``none``, ``exact`` or ``near``.
        split: of every row; unset: by the row's number.
        val_split: share of the rows for validation.
        first_number: of its first row, where the rows of several sources are numbered through.
        first_val: rows with numbers from here on are for validation, where there are few.
        limit: rows behind so many are left out.
        n_examples: kept of each rule's drops.
        counts_later: the parent counts what is kept, since it may drop more.
    """

    parse: Parser
    cleaner: str = "none"
    filters: tuple[str, ...] = ()
    deduplicate: str = "none"
    split: str | None = None
    val_split: float = 0.05
    first_number: int = 0
    first_val: int | None = None
    limit: int | None = None
    n_examples: int = N_EXAMPLES
    counts_later: bool = False

    def is_val(self, row: int) -> bool:
        """Whether a row is for validation."""
        if self.split is not None:
            return self.split == "val"
        number = self.first_number + row
        if self.first_val is not None:
            return number >= self.first_val
        return is_validation(number, self.val_split)

    @functools.cached_property
    def clean(self) -> Callable[[str], str]:
        """The cleaner itself."""
        clean: Callable[[str], str] = CLEANERS.load(self.cleaner)
        return clean

    @functools.cached_property
    def rules(self) -> list[Rule]:
        """The rules that drop rows."""
        return build_rules(self.filters)

    @functools.cached_property
    def tried_rules(self) -> dict[str, list[Rule]]:
        """Rules that are only tried, each for itself."""
        return {} if self.filters else {name: build_rules([name]) for name in _TRIED_RULES}


@dataclass
class _Candidate:
    """The text of a row. Its ids are made when a rule or the end asks for them."""

    text: str
    row: int
    columns: Mapping[str, Any]
    tokenizer: Tokenizer | None

    @functools.cached_property
    def ids(self) -> np.ndarray:
        assert self.tokenizer is not None
        return encode_document(self.text, self.tokenizer)

    def count_tokens(self, text: str) -> int:
        assert self.tokenizer is not None
        return len(self.ids if text == self.text else encode_document(text, self.tokenizer))


def encode_rows(batch: Batch, recipe: RowRecipe, tokenizer: Tokenizer) -> Encoded:
    """The documents of a batch, and what was counted on the way."""
    builder, tally = EncodedBuilder(tokenizer), Tally(recipe.n_examples)
    rows: list[int] = []
    signatures: list[bytes] = []
    beginnings: list[str] = []
    tried: dict[str, int] = {}
    for kept in _read_candidates(batch, recipe, tokenizer, tally):
        n_bytes, is_val = count_utf8(kept.text), recipe.is_val(kept.row)
        builder.add(kept.ids, n_bytes, is_val=is_val, ends=True)
        rows.append(kept.row)
        tally.sample(kept.row, kept.text)
        if kept.row < _TRIED_FIRST or (kept.row % _TRIED_EVERY == 0 and is_sampled(kept.row)):
            _try_rules(kept, recipe, tried)
        if recipe.counts_later:
            beginnings.append(kept.text[:EXAMPLE_CHARACTERS])
        else:
            split = "val" if is_val else "train"
            tally.count_kept(kept.row, split, kept.text, n_bytes, len(kept.ids) + 1)
        if recipe.deduplicate != "none":
            signatures.append(sign(kept.text, recipe.deduplicate))
    numbers = np.array(rows, np.int64)
    counted = RowCounts(tally, tried, numbers, beginnings, signatures)
    return builder.build(counted=counted)


def count_dropped_row(dropped: DroppedRow, recipe: RowRecipe, tokenizer: Tokenizer) -> Encoded:
    """No document, and one row more."""
    tally = Tally(recipe.n_examples)
    tally.count_found(dropped.n_bytes)
    tally.count_dropped(dropped.row, dropped.reason, "", dropped.n_bytes)
    counted = RowCounts(tally, {}, np.empty(0, np.int64), [], [])
    return EncodedBuilder(tokenizer).build(counted)


def read_texts(batch: Batch, recipe: RowRecipe) -> list[tuple[str, str]]:
    """(split, text) of the documents of a batch, for a tokenizer that is made from them."""
    return [
        ("val" if recipe.is_val(kept.row) else "train", kept.text)
        for kept in _read_candidates(batch, recipe, None, Tally(0))
    ]


def _read_candidates(
    batch: Batch, recipe: RowRecipe, tokenizer: Tokenizer | None, tally: Tally
) -> Iterator[_Candidate]:
    """The rows that are kept, with the others counted."""
    for row, item in enumerate(recipe.parse(batch.payload, batch.first_row), batch.first_row):
        if recipe.limit is not None and row >= recipe.limit:
            return
        if item.text is None:
            tally.count_bad(row)
            continue
        tally.count_found(count_utf8(item.text))
        text = recipe.clean(item.text)
        if not text or text.isspace():
            tally.count_empty()
            continue
        candidate = _Candidate(text, row, item.columns, tokenizer)
        verdict = judge(recipe.rules, text, item.columns, candidate.count_tokens)
        if verdict.reason:
            tally.count_dropped(row, verdict.reason, text, count_utf8(text))
        elif verdict.text == text:
            yield candidate
        else:
            yield _Candidate(verdict.text, row, item.columns, tokenizer)


def _try_rules(candidate: _Candidate, recipe: RowRecipe, tried: dict[str, int]) -> None:
    """Count what the rules would drop that were not asked for; under "" the documents tried."""
    for name, rules in recipe.tried_rules.items():
        verdict = judge(rules, candidate.text, candidate.columns, candidate.count_tokens)
        tried[name] = tried.get(name, 0) + bool(verdict.reason)
    tried[""] = tried.get("", 0) + 1
