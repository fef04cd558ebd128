"""The text of the sources, as tokenizers are made from it."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator
from dataclasses import replace

from preflight.core.signals import StopFlag
from preflight.corpus.blocks import read_blocks
from preflight.corpus.plan import build_recipes, list_texts
from preflight.corpus.row_recipe import RowRecipe, read_texts
from preflight.corpus.sources import ScannedSource
from preflight.corpus.sources.rows import Batch, RowSource
from preflight.corpus.tally import count_utf8
from preflight.settings import DataSettings
from preflight.tokenization.own_bpe import SAMPLED_BYTES
from preflight.tokenization.tiktoken_cutting import find_last_cut

PIECE_BYTES = 2**20  # never changed: a sample is made of such pieces, and vocabularies of samples


class SourceText:
    """The two parts of the text; see `preflight.tokenization.TrainingText`.

    Of rows, whose sizes nobody knows, the first `SAMPLED_BYTES` count, or all of them.
    """

    def __init__(
        self,
        scanned: list[ScannedSource],
        settings: DataSettings,
        stop: StopFlag | None,
        *,
        is_whole: bool,
    ) -> None:
        """`is_whole`: all rows count."""
        self._stop, self._is_whole = stop, is_whole
        self._rows = build_recipes(scanned, settings)
        self._texts = list_texts(scanned, settings)

    def count_bytes(self, *splits: str) -> int:
        """Bytes of UTF-8 in these parts."""
        known = sum(text.count_bytes(*splits) for text in self._texts)
        return known + sum(self._row_bytes[split] for split in splits)

    @functools.cached_property
    def _row_bytes(self) -> dict[str, int]:
        sizes = {"train": 0, "val": 0}
        for split, text in self._read_rows():
            sizes[split] += count_utf8(text)
        return sizes

    def read(self, *splits: str) -> Iterator[str]:
        """These parts in pieces that end where words end, where they can.

        Raises:
            PreflightError: code TEXT, when a source has changed; SIGINT or SIGTERM when the stop
                flag says so.
        """
        for split in splits:
            for text in self._texts:
                parts = (part for part in text.list_parts() if part.split == split)
                for block in read_blocks(parts, 0, 0, PIECE_BYTES, find_last_cut):
                    self._leave_if_stopping()
                    for piece in block.pieces:
                        data = piece.text
                        yield from _cut(data if isinstance(data, str) else data.decode())
        for split, row in self._read_rows():
            if split in splits:
                yield from _cut(row)

    def _read_rows(self) -> Iterator[tuple[str, str]]:
        left = SAMPLED_BYTES
        for item, recipe in self._rows:
            assert isinstance(item.source, RowSource)
            # No tokenizer is there yet that could count tokens.
            filters = tuple(name for name in recipe.filters if "_tokens" not in name)
            for found in self._read_source(item.source, replace(recipe, filters=filters)):
                yield found
                left -= count_utf8(found[1])
                if left <= 0 and not self._is_whole:
                    return

    def _read_source(self, source: RowSource, recipe: RowRecipe) -> Iterator[tuple[str, str]]:
        for item in source.batches():
            self._leave_if_stopping()
            row = item.first_row if isinstance(item, Batch) else item.row
            if recipe.limit is not None and row >= recipe.limit:
                return
            if isinstance(item, Batch):
                yield from read_texts(item, recipe)
            else:
                split = "val" if recipe.is_val(row) else "train"
                decoder = codecs.getincrementaldecoder("utf-8")()
                for chunk in item.document:
                    yield split, decoder.decode(chunk)

    def _leave_if_stopping(self) -> None:
        if self._stop is not None:
            self._stop.leave_if_stopping("stopped while reading the text; nothing was changed")


def _cut(text: str) -> Iterator[str]:
    for begin in range(0, len(text), PIECE_BYTES):
        yield text[begin : begin + PIECE_BYTES]
