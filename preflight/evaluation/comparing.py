"""What `--compare` shows: texts side by side, and which evaluation figures differ.

Figures of two models are compared over the same items, in pairs: see `compare_paired`. What a
token is depends on the tokenizer, so that models with different ones are compared in bits per byte
alone.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from preflight.evaluation.intervals import PairedDifference, compare_paired

MIN_COLUMN = 28  # a narrower column of text is hard to read: below each other then
_GAP = " | "
Row = dict[str, Any]  # the scores of an item, as a result file of `--evaluate` holds them


@dataclass(frozen=True)
class Column:
    """A text and what stands above and below it."""

    title: str
    text: str
    remark: str


def format_columns(columns: Sequence[Column], width: int) -> list[str]:
    """Columns side by side in `width` cells of a terminal; below each other where it is narrow."""
    n = len(columns)
    cells = (width - len(_GAP) * (n - 1)) // n
    if cells < MIN_COLUMN:
        return [line for column in columns for line in (*_fill(column, max(width, 1)), "")]
    filled = [_fill(column, cells) for column in columns]
    height = max(len(lines) - 1 for lines in filled)
    # The remark stands on one line in all columns.
    filled = [[*ls[:-1], *[""] * (height - len(ls) + 1), ls[-1]] for ls in filled]
    return [
        _GAP.join(line + " " * (cells - measure_width(line)) for line in row).rstrip()
        for row in zip(*filled, strict=True)
    ]


def _fill(column: Column, width: int) -> list[str]:
    (title, *_), (remark, *_) = (wrap_text(t, width) for t in (column.title, column.remark))
    return [title, "-" * width, *wrap_text(column.text, width), remark]


def wrap_text(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken between words where that is possible."""
    lines = []
    for line in text.replace("\t", "    ").split("\n"):
        while measure_width(line) > width:
            end = _find_break(line, width)
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip(" ")
        lines.append(line)
    return lines


def _find_break(line: str, width: int) -> int:
    """The first index of the next line: after a space, or where the width ends; at least 1."""
    used = fits = 0
    for fits, character in enumerate(line):  # noqa: B007
        used += measure_width(character)
        if used > width:
            break
    space = line.rfind(" ", 1, fits + 1)
    return space + 1 if space > 0 and line[:space].strip() else max(fits, 1)


def measure_width(text: str) -> int:
    """Cells of a terminal (Unicode Standard Annex 11): wide characters take two, marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def make_printable(text: str) -> str:
    """`text` with what would control a terminal spelled out: all but spaces and line ends."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else _spell(c)
        for c in text.replace("\r\n", "\n").replace("\r", "\n")
    )


def _spell(character: str) -> str:
    return ascii(character)[1:-1]


# ---- evaluation results -------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A figure that items have one by one.

    Attributes:
        name: as in sentences.
        value: of an item's scores.
        weight: of the item.
        higher_is_better: the direction.
        any_tokenizer: whether it may be compared between tokenizers.
    """

    name: str
    value: Callable[[Row], float]
    weight: Callable[[Row], float]
    higher_is_better: bool
    any_tokenizer: bool = False


@dataclass(frozen=True)
class Difference:
    """A figure of a task for two models; `second` less `first`."""

    task: str
    measure: Measure
    n_items: int
    first: str
    second: str
    found: PairedDifference

    def describe(self) -> str:
        """One sentence: which one is better, by how much; or that no difference is shown."""
        found, items = self.found, f"{self.task}, {self.n_items:,} items"
        if not found.is_shown:
            range_ = ""
            if found.low > 0 or found.high < 0:  # only with few items
                range_ = ": too few for the difference seen"
            elif math.isfinite(found.low) and found.high > found.low:
                range_ = f"; {self.second} less {self.first}: {found.low:+.3f} to {found.high:+.3f}"
            return f"no difference shown in {self.measure.name} ({items}{range_})"
        is_second = (found.difference > 0) == self.measure.higher_is_better
        better = self.second if is_second else self.first
        half = (found.high - found.low) / 2
        amount = f"{abs(found.difference):.3f} ± {half:.3f}"
        return f"{better} is better by {amount} {self.measure.name} ({items})"


def _one(row: Row) -> float:
    return 1.0


def _find_bits(row: Row) -> float:
    """Bits per byte of a page or a window of text."""
    nats = row["loss"] if "loss" in row else -row["log_likelihoods"][0]
    return float(nats) / math.log(2) / max(row["n_bytes"], 1)


MEASURES: dict[str, tuple[Measure, ...]] = {
    "choices": (
        Measure("acc", lambda row: row["acc"], _one, True),
        Measure("acc_norm", lambda row: row["acc_norm"], _one, True),
    ),
    "last-word": (
        Measure("acc", lambda row: row["acc"], _one, True),
        Measure("nats per last word", lambda row: -row["log_likelihoods"][0], _one, False),
    ),
    "pages": (Measure("bits per byte", _find_bits, lambda row: row["n_bytes"], False, True),),
    "text": (Measure("bits per byte", _find_bits, lambda row: row["n_bytes"], False, True),),
}


def compare_results(
    first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]
) -> tuple[list[Difference], list[str]]:
    """What differs between two results of `--evaluate`, and what could not be compared, and why.

    Args:
        first: content of a result file.
        second: of another one.
        names: of the two models, as sentences call them.
    """
    same = first["tokenizer"]["fingerprint"] == second["tokenizer"]["fingerprint"]
    others = {(task["name"], task["kind"]): task for task in second["tasks"]}
    found, left_out = [], []
    for task in first["tasks"]:
        if task["kind"] not in MEASURES:  # BLEU is no mean over items
            continue
        other = others.get((task["name"], task["kind"]))
        if other is None:
            left_out.append(f"{task['name']}: only {names[0]} was evaluated on it")
            continue
        fault = _find_item_fault(task, other)
        measures = [m for m in MEASURES[task["kind"]] if same or m.any_tokenizer]
        if not measures:
            fault = "the tokenizers differ, and it has no bits per byte"
        if fault:
            left_out.append(f"{task['name']}: {fault}")
            continue
        found += [Difference(task["name"], m, *_compare(m, task, other, names)) for m in measures]
    return found, left_out


def _compare(
    measure: Measure, task: dict[str, Any], other: dict[str, Any], names: tuple[str, str]
) -> tuple[int, str, str, PairedDifference]:
    rows, others = task["scores"], other["scores"]
    found = compare_paired(
        [measure.value(row) for row in rows],
        [measure.value(row) for row in others],
        [measure.weight(row) for row in rows],
    )
    return len(rows), *names, found


def _find_item_fault(task: dict[str, Any], other: dict[str, Any]) -> str:
    """Why the scores are not of the same items; empty if they are."""
    if not task["scores"] or len(task["scores"]) != len(other["scores"]):
        return f"{len(task['scores']):,} items against {len(other['scores']):,}"
    if task.get("source") != other.get("source"):
        return "the sources differ"
    if list(_list_marks(task)) != list(_list_marks(other)):
        return "the items differ"
    return ""


def _list_marks(task: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for row in task["scores"]:
        yield row.get("line"), row.get("n_bytes"), len(row.get("log_likelihoods", ()))
