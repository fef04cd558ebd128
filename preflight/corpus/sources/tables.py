"""Tables: JSON Lines, JSON, CSV and TSV, compressed or not. Each row is a document."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from preflight.corpus.sources.columns import Wanted, read_wanted
from preflight.corpus.sources.compressed import strip_suffix
from preflight.corpus.sources.csv_rows import examine_csv
from preflight.corpus.sources.cutting import RowFile, RowForm
from preflight.corpus.sources.json_files import examine_lines, examine_list
from preflight.corpus.sources.rows import RowSource
from preflight.settings import DataSettings

_EXAMINE: dict[str, Callable[[Path, Wanted], RowForm]] = {
    ".jsonl": examine_lines,
    ".ndjson": examine_lines,
    ".json": examine_list,
    ".csv": partial(examine_csv, delimiter=None),
    ".tsv": partial(examine_csv, delimiter="\t"),
}


def find(given: str | None, settings: DataSettings) -> list[RowSource] | None:
    """The table of that name; None for anything else."""
    if given is None or not is_table(Path(given)) or not os.path.isfile(given):
        return None
    return [TableFile(Path(given), read_wanted(settings))]


def is_table(path: Path) -> bool:
    """Whether a file's name is one of a table, compressed or not."""
    return strip_suffix(path)[0].suffix.lower() in _EXAMINE


class TableFile(RowFile):
    """A table in a file; one of its columns is the text."""

    def __init__(
        self, path: Path, wanted: Wanted, name: str | None = None, *, is_skippable: bool = False
    ) -> None:
        super().__init__(path, name, is_skippable=is_skippable)
        self._wanted = wanted

    def examine(self) -> RowForm:
        """As of `RowFile`: by the end of the file's name."""
        return _EXAMINE[strip_suffix(self.path)[0].suffix.lower()](self.path, self._wanted)
