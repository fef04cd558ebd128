"""What is going to be built: readers in their order, and what worker processes do with rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.metadata import VERSION
from preflight.corpus.reading import Reader, RowReader, TextReader, TokenReader, count_few_rows
from preflight.corpus.row_recipe import RowRecipe
from preflight.corpus.sources import ScannedSource
from preflight.corpus.sources.rows import RowSource
from preflight.corpus.sources.token_arrays import TokenArray
from preflight.corpus.split import TextSplit
from preflight.corpus.tally import N_EXAMPLES
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer

_FEW = 8  # documents for validation, below which a hash would share them out unevenly


@dataclass(frozen=True)
class Plan:
    """What is going to be built.

    Attributes:
        scanned: all sources, those of rows in the order of their readers.
        readers: in the order of reading.
        recipes: of the readers of rows, by their number.
        groups: shares of ``--mix`` and the numbers of the readers that they are for; else empty.
        by: how text was shared out, see `TextSplit`.
        key: a digest of what decides the ids and their shards.
    """

    scanned: list[ScannedSource]
    readers: list[Reader]
    recipes: Mapping[int, RowRecipe]
    groups: list[tuple[str, float, list[int]]]
    by: str
    key: str

    @property
    def n_bytes(self) -> int:
        """Bytes to read, as they are stored."""
        return sum(reader.n_bytes for reader in self.readers)

    @property
    def deduplicates(self) -> bool:
        """Whether copies of documents are dropped."""
        return any(recipe.deduplicate != "none" for recipe in self.recipes.values())

    def count_text_bytes(self, split: str) -> int | None:
        """More than the tokens that a split gets, where only texts of known size are read."""
        bound = 0
        for reader in self.readers:
            if not isinstance(reader, TextReader):
                return None
            bound += reader.split.count_bytes(split) + reader.split.count_parts(split)
        return bound


def describe_preparation(settings: DataSettings) -> dict[str, Any]:
    """The flags besides the text that decide which documents come out, as far as they are set."""
    values = {
        "text_column": settings.text_column,
        "val_file": [*settings.val_file],
        "mix": [*settings.mix],
        "clean": settings.clean,
        "filter": [*settings.filter],
        "deduplicate": settings.deduplicate if settings.deduplicate != "none" else None,
        "limit_documents": settings.document_limit,
    }
    return {name: value for name, value in values.items() if value}


def build_plan(
    scanned: list[ScannedSource], settings: DataSettings, tokenizer: Tokenizer, block_bytes: int
) -> Plan:
    """What is to be built of these sources.

    Raises:
        PreflightError: code FLAGS, when ``--mix`` does not fit them; TEXT, as sources raise it.
    """
    readers: list[Reader] = []
    recipes: dict[int, RowRecipe] = {}
    by = "documents"
    for text in list_texts(scanned, settings):
        readers.append(TextReader(text, tokenizer, block_bytes))
        by = text.by
    for item, recipe in build_recipes(scanned, settings):
        assert isinstance(item.source, RowSource)
        recipes[len(readers)] = recipe
        reader = RowReader(
            item.source,
            item.facts.size,
            tokenizer,
            block_bytes,
            recipe.limit,
            drops_long=settings.is_processed,
            is_val=recipe.is_val,
        )
        readers.append(reader)
    for item in scanned:
        if isinstance(item.source, TokenArray):
            readers.append(TokenReader(item.source, tokenizer, settings.val_split))
    groups = _build_groups(settings.mix, readers)
    return Plan(scanned, readers, recipes, groups, by, _hash_plan(scanned, settings, tokenizer))


def list_texts(scanned: list[ScannedSource], settings: DataSettings) -> list[TextSplit]:
    """The plain texts among the sources, shared out."""
    texts = [item for item in scanned if not isinstance(item.source, (RowSource, TokenArray))]
    found = []
    for split in (None, "train", "val"):
        chosen = [item for item in texts if item.source.split == split]
        if any(item.facts.document_bytes for item in chosen):
            found.append(TextSplit(chosen, settings.val_split, split))
    return found


def build_recipes(
    scanned: list[ScannedSource], settings: DataSettings
) -> list[tuple[ScannedSource, RowRecipe]]:
    """The sources of rows, and how their rows become documents.

    Sources with few rows are numbered through, so that a hundred files of one row each are shared
    out as one file of a hundred rows is.
    """
    found = [item for item in scanned if isinstance(item.source, RowSource)]
    enough = math.ceil(_FEW / settings.val_split)
    counts = [
        count_few_rows(item.source, enough)
        if isinstance(item.source, RowSource) and item.source.split is None
        else None
        for item in found
    ]
    n_few = sum(count for count in counts if count is not None)
    has_many = n_few >= enough or any(
        count is None and item.source.split is None
        for item, count in zip(found, counts, strict=True)
    )
    first_val = None if has_many else n_few - max(1, round(n_few * settings.val_split))
    recipes, before = [], 0
    for item, count in zip(found, counts, strict=True):
        assert isinstance(item.source, RowSource)
        recipe = RowRecipe(
            item.source.parse,
            cleaner="none" if item.source.is_cleaned else settings.clean or "none",
            filters=settings.filter,
            deduplicate=settings.deduplicate,
            split=item.source.split,
            val_split=settings.val_split,
            first_number=before if count is not None else 0,
            first_val=first_val,
            limit=settings.document_limit,
            n_examples=max(N_EXAMPLES, settings.show_dropped),
            counts_later=bool(settings.mix) or settings.deduplicate != "none",
        )
        before += count or 0
        recipes.append((item, recipe))
    return recipes


def _build_groups(
    mix: tuple[str, ...], readers: list[Reader]
) -> list[tuple[str, float, list[int]]]:
    """Each share with its readers; PreflightError (FLAGS) unless they fit one to one."""
    if not mix:
        return []
    pairs = [value.rsplit("=", 1) for value in mix]
    shares = {name: float(share) for name, share in pairs}
    found: dict[str, list[int]] = {name: [] for name in shares}
    faults = []
    for number, reader in enumerate(readers):
        names = [name for name in shares if name in reader.name]
        names = names or [name for name in shares if name in reader.label]
        if len(names) == 1:
            found[names[0]].append(number)
        else:
            which = f"several of its names ({', '.join(names)})" if names else "none of its names"
            faults.append(f"--mix: {reader.label} contains {which}")
    faults += [f"--mix {name}: no source has that name" for name, own in found.items() if not own]
    if len(shares) < len(mix) or abs(sum(shares.values()) - 1) > 1e-3:
        faults.append("--mix: give each source once, with shares whose sum is 1")
    if faults:
        raise PreflightError(ExitCode.FLAGS, *faults[:4])
    return [(name, share, found[name]) for name, share in shares.items()]


def _hash_plan(scanned: list[ScannedSource], settings: DataSettings, tokenizer: Tokenizer) -> str:
    facts = [
        VERSION,
        [[item.source.name, item.facts.size, item.facts.sha256] for item in scanned],
        tokenizer.fingerprint,
        settings.document_separator,
        settings.val_split,
        settings.shard_size,
        describe_preparation(settings),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
