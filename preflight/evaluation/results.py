"""Figures of scored tasks, each with its 95 % interval, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from preflight.evaluation.intervals import mean_interval, proportion_interval, ratio_interval
from preflight.evaluation.items import Figure, Item, ItemScore, Task, TaskKind
from preflight.evaluation.validation import WindowScore

FORMAT, VERSION = "preflight-evaluation", 1
# Figures with fewer items than this say little, which is told.
FEW_ITEMS = 100
_NUMBERS = ("value", "low", "high")
Triple = tuple[float, float, float]  # a value and the ends of its interval


@dataclass
class TaskResult:
    """The figures of one task for one checkpoint.

    Attributes:
        name, kind, source: as in `Task`; kind is "text" for the validation text.
        form: what the file was taken for.
        figures: in the order of the table.
        n_items: scored.
        n_available: in the file.
        notes: what a reader should know.
        scores: of each item in order, for comparisons: see `to_rows`.
        contaminated: share of the items that stand in the training text; None: not looked for.
    """

    name: str
    kind: str
    source: str
    form: str
    figures: list[Figure]
    n_items: int
    n_available: int
    notes: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    contaminated: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the result file holds it; numbers that are not finite become null."""
        content = asdict(self)
        content["figures"] = [
            {key: _finite(value) for key, value in figure.items()} for figure in content["figures"]
        ]
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TaskResult:
        """What `to_dict` gave."""
        figures = [
            Figure(**figure | {k: math.inf for k in _NUMBERS if figure[k] is None})
            for figure in content["figures"]
        ]
        return cls(**content | {"figures": figures})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- figures of tasks ---------------------------------------------------------------------------


def build_figures(
    kind: TaskKind, items: Sequence[Item], scores: Sequence[ItemScore]
) -> list[Figure]:
    """The harness's figures for tasks of this kind, over these items and no others."""
    return _BUILDERS[kind](items, scores)


def judge_choices(item: Item, score: ItemScore) -> tuple[bool, bool]:
    """Whether the right choice has the largest log-likelihood, as it is and per character.

    The length is the harness's: the choice's characters, without the space before it. Of equal
    values the first counts.
    """
    lengths = [len(text.removeprefix(" ")) for text in item.continuations]
    values = score.log_likelihoods
    normed = [value / length for value, length in zip(values, lengths, strict=True)]
    return _find_largest(values) == item.label, _find_largest(normed) == item.label


def _find_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _build_choices(items: Sequence[Item], scores: Sequence[ItemScore]) -> list[Figure]:
    judged = [judge_choices(item, score) for item, score in zip(items, scores, strict=True)]
    return [
        build_proportion(name, sum(row[i] for row in judged), len(judged))
        for i, name in enumerate(("acc", "acc_norm"))
    ]


def _build_last_word(items: Sequence[Item], scores: Sequence[ItemScore]) -> list[Figure]:
    values = [score.log_likelihoods[0] for score in scores]
    low, high = mean_interval(values)
    mean = sum(values) / len(values)
    perplexity = Figure("perplexity", *_exp(-mean, -high, -low), len(values), False)
    return [
        build_proportion("acc", sum(score.is_greedy[0] for score in scores), len(scores)),
        perplexity,
    ]


def _build_pages(items: Sequence[Item], scores: Sequence[ItemScore]) -> list[Figure]:
    losses = [-score.log_likelihoods[0] for score in scores]
    words, sizes = [item.n_words for item in items], [item.n_bytes for item in items]
    return [
        build_ratio("word_perplexity", losses, words, _exp),
        build_ratio("byte_perplexity", losses, sizes, _exp),
        build_ratio("bits_per_byte", losses, sizes, _to_bits),
    ]


_BUILDERS: dict[TaskKind, Callable[[Sequence[Item], Sequence[ItemScore]], list[Figure]]] = {
    "choices": _build_choices,
    "last-word": _build_last_word,
    "pages": _build_pages,
}


def build_text_figures(windows: Sequence[WindowScore]) -> list[Figure]:
    """The figures of a plain text, such as the validation part; an item is a window of it."""
    losses = [window.loss for window in windows]
    tokens = [window.n_tokens for window in windows]
    figures = [
        build_ratio("loss", losses, tokens, _keep),
        build_ratio("perplexity", losses, tokens, _exp),
    ]
    for name, counts, convert in (
        ("word_perplexity", [window.n_words for window in windows], _exp),
        ("bits_per_byte", [window.n_bytes for window in windows], _to_bits),
    ):
        if sum(counts):
            figures.append(build_ratio(name, losses, counts, convert))
    for i, rank in enumerate((1, 5, 10)):
        hits = [window.n_top[i] for window in windows]
        figures.append(build_ratio(f"top{rank}_acc", hits, tokens, _keep, higher_is_better=True))
    return figures


# ---- figures ------------------------------------------------------------------------------------


def build_proportion(name: str, successes: int, n: int) -> Figure:
    """A share of `n` items, with its interval."""
    return Figure(name, successes / n, *proportion_interval(successes, n), n, True)


def build_ratio(
    name: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    convert: Callable[[float, float, float], Triple],
    *,
    higher_is_better: bool = False,
) -> Figure:
    """A ratio of sums over items, converted as `convert` converts value and interval."""
    value = sum(numerators) / sum(denominators)
    low, high = ratio_interval(numerators, denominators)
    return Figure(name, *convert(value, low, high), len(numerators), higher_is_better)


def _keep(value: float, low: float, high: float) -> Triple:
    return value, low, high


def _exp(value: float, low: float, high: float) -> Triple:
    """e to these powers."""
    return _raise_e(value), _raise_e(low), _raise_e(high)


def _raise_e(power: float) -> float:
    """e to the power; infinite where a float cannot hold it."""
    return math.exp(power) if power < 709 else math.inf


def _to_bits(value: float, low: float, high: float) -> Triple:
    return value / math.log(2), low / math.log(2), high / math.log(2)


# ---- what is shown ------------------------------------------------------------------------------


def format_table(results: Sequence[TaskResult]) -> list[str]:
    """Lines of a table: task, items, figure, value, 95 % interval."""
    rows: list[tuple[str, ...]] = [
        ("task", "items", "figure", "value", "95 % interval", "in training text")
    ]
    for result in results:
        for number, figure in enumerate(result.figures):
            first = number == 0
            rows.append(
                (
                    result.name if first else "",
                    f"{result.n_items:,}" if first else "",
                    figure.name + (" (higher is better)" if figure.higher_is_better else ""),
                    format_value(figure.value),
                    _format_interval(figure),
                    _format_share(result.contaminated) if first else "",
                )
            )
    if all(result.contaminated is None for result in results):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_format_row(row, widths) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:], *_list_remarks(results)]


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [
        text.ljust(width) if i in (0, 2) else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _list_remarks(results: Sequence[TaskResult]) -> list[str]:
    lines = []
    for result in results:
        few = result.n_items < FEW_ITEMS and result.kind in ("choices", "last-word")
        acc = next((f for f in result.figures if f.name == "acc"), None)
        if few and acc:
            width = (acc.high - acc.low) / 2 * 100
            lines.append(
                f"{result.name}: {result.n_items:,} items are few: acc is known to "
                f"± {width:.0f} points"
            )
        lines += [f"{result.name}: {note}" for note in result.notes]
    return ["", *lines] if lines else []


def _format_interval(figure: Figure) -> str:
    """The ends of the interval; a single item says nothing of them."""
    if figure.n_items < 2 and not math.isfinite(figure.high):
        return "unknown"
    return f"{format_value(figure.low)} to {format_value(figure.high)}"


def _format_share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def format_value(value: float) -> str:
    """Four decimals, as the harness prints them; fewer of a large number."""
    if not math.isfinite(value):
        return "infinite"
    return f"{value:,.4f}" if abs(value) < 10_000 else f"{value:,.0f}"


def list_scores(task: Task, items: Sequence[Item], scores: Sequence[ItemScore]) -> list[dict]:
    """What the result file keeps of each item, for paired comparisons."""
    rows = []
    for item, score in zip(items, scores, strict=True):
        row: dict[str, Any] = {
            "line": item.line,
            "log_likelihoods": score.log_likelihoods,
            "n_tokens": score.n_tokens,
        }
        if task.kind == "choices":
            row["acc"], row["acc_norm"] = judge_choices(item, score)
        elif task.kind == "last-word":
            row["acc"] = score.is_greedy[0]
        else:
            row["n_words"], row["n_bytes"] = item.n_words, item.n_bytes
        rows.append(row)
    return rows
