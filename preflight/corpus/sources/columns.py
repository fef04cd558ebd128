"""Which columns of a table are read: the one with the text, and those that filters need."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.corpus.sources.protocol import text_error
from preflight.settings import DataSettings

# The usual names, the surest first. Of chats and instructions, one column alone is not the text.
_GUESSES = (
    *("text", "content", "article_body", "body", "document", "raw_content", "raw_text"),
    *("full_text", "page_content", "markdown", "article", "story", "passage", "paragraph"),
    *("context", "sentence", "abstract", "code", "completion"),
)
_COMPARISON = re.compile(r"([^<>=!]+)(?:>=|<=|>|<|==|!=)")
_MAX_NAMED = 20  # columns in a message

# The keys that lead to a value of a JSON object, from outside.
ColumnPath = tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What the flags ask of a table.

    Attributes:
        text_column: the column with the text; None: to be guessed.
        columns: the others that filters compare.
    """

    text_column: str | None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The column with the text, and what is to be told about it."""

    path: ColumnPath
    notes: tuple[str, ...] = ()


def read_wanted(settings: DataSettings) -> Wanted:
    """The columns by the flags ``--text-column`` and ``--filter``."""
    matches = filter(None, map(_COMPARISON.match, settings.filter))
    return Wanted(settings.text_column, tuple(dict.fromkeys(m[1].strip() for m in matches)))


def choose_column(path: Path, wanted: Wanted, found: Mapping[ColumnPath, bool]) -> Chosen:
    """The column with the text.

    Args:
        path: the file.
        wanted: a name of the user's is taken as it is; a nested one has dots.
        found: the columns in the first rows, in their order, and whether they hold strings there.

    Raises:
        PreflightError: code TEXT, when it is not there; it names the columns that are.
    """
    names = {".".join(keys): keys for keys in reversed(list(found))}
    shown = ", ".join(f'"{".".join(keys)}"' for keys in list(found)[:_MAX_NAMED])
    more = f" and {len(found) - _MAX_NAMED:,} more" if len(found) > _MAX_NAMED else ""
    there = f"its columns: {shown or 'none'}{more}"
    if wanted.text_column is not None:
        if wanted.text_column in names:
            return Chosen(names[wanted.text_column])
        raise text_error(path, f'no column "{wanted.text_column}"', there)
    keys = _guess(found)
    if keys is None:
        raise text_error(
            path,
            "no column has a usual name for the text",
            there,
            "name the one with the text: --text-column NAME",
        )
    note = f'text column: "{".".join(keys)}" (guessed; --text-column NAME for another)'
    return Chosen(keys, (note,))


def _guess(found: Mapping[ColumnPath, bool]) -> ColumnPath | None:
    """A column with a usual name, one with strings first; or the only one with strings."""
    for must_be_text in (True, False):
        for guess in _GUESSES:
            for keys, is_text in found.items():
                if len(keys) == 1 and keys[0].lower() == guess and is_text >= must_be_text:
                    return keys
    with_text = [keys for keys, is_text in found.items() if is_text]
    return with_text[0] if len(with_text) == 1 else None


def list_columns(values: Iterable[Any]) -> dict[ColumnPath, bool]:
    """The columns of parsed JSON rows, in order, and whether any row has a string there.

    Objects within objects give columns too, at three levels.
    """
    found: dict[ColumnPath, bool] = {}
    for value in values:
        if isinstance(value, dict):
            _note_columns(value, (), found)
    return found


def _note_columns(value: dict[str, Any], above: ColumnPath, found: dict[ColumnPath, bool]) -> None:
    for key, inner in value.items():
        keys = (*above, key)
        found[keys] = found.get(keys, False) or isinstance(inner, str)
        if isinstance(inner, dict) and len(keys) < 3:
            _note_columns(inner, keys, found)


def look_up(value: Any, keys: ColumnPath) -> Any:
    """What is at `keys` within a JSON value; None where they lead nowhere."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def collect_columns(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The columns that filters ask for, as far as a JSON row has them.

    Null and numbers that are not finite count as missing.
    """
    columns = {}
    for name in names:
        cell = look_up(value, (name,))
        if cell is None and "." in name:
            cell = look_up(value, tuple(name.split(".")))
        if cell is not None and not (isinstance(cell, float) and not math.isfinite(cell)):
            columns[name] = cell
    return columns
