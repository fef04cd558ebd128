"""Pictures of a data set: how long its documents are, and which share each rule dropped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from preflight.core.page_parts import replace_unprintable
from preflight.core.storage import publish_file

_BLUE, _RED = "#1f4e8c", "#c8501e"
_MAX_REASONS = 16  # bars, the largest
_REASON_CHARACTERS = 60


def draw_lengths(path: Path, lengths: list[dict[str, int]]) -> None:
    """Draw how many documents have how many tokens, one bar for each power of two.

    Args:
        path: of the PNG file.
        lengths: as in the report's content.

    Raises:
        PreflightError: code STORAGE, when it cannot be written.
    """
    axes = _open_axes(max(6.0, 0.55 * len(lengths)), 4)
    counts = [entry["n_documents"] for entry in lengths]
    bars = axes.bar(range(len(counts)), counts, width=0.92, color=_BLUE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7, padding=2)
    names = [_format_power(entry["from_tokens"]) for entry in lengths]
    axes.set_xticks([place - 0.5 for place in range(len(names))], names)
    axes.set_title("lengths of the documents", loc="left", fontsize=11)
    axes.set_xlabel("tokens, from")
    axes.set_ylabel("documents")
    axes.margins(y=0.12)
    _save(axes, path)


def draw_dropped(path: Path, dropped: list[dict[str, Any]], n_with_text: int) -> None:
    """Draw which share of all documents each rule dropped.

    Args:
        path: of the PNG file.
        dropped: as in the report's content, most first.
        n_with_text: documents before any was dropped.

    Raises:
        PreflightError: code STORAGE, when it cannot be written.
    """
    shown = dropped[:_MAX_REASONS]
    axes = _open_axes(9, 1.3 + 0.33 * max(len(shown), 2))
    shares = [100 * (entry["share"] or 0) for entry in shown]
    bars = axes.barh(range(len(shares)), shares, color=_RED, height=0.7)
    labels = [
        f"{entry['n_documents']:,} ({share:.1f} %)"
        for entry, share in zip(shown, shares, strict=True)
    ]
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.set_yticks(range(len(shown)), [_shorten(entry["reason"]) for entry in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*shares, 0.1]) * 1.25)
    axes.set_xlabel("% of the documents")
    more = len(dropped) - len(shown)
    title = f"dropped, of {n_with_text:,} documents" + (f"; {more} more reasons" if more else "")
    axes.set_title(title if dropped else "nothing was dropped", loc="left", fontsize=11)
    _save(axes, path)


def _open_axes(width: float, height: float) -> Any:
    os.environ["MPLBACKEND"] = "agg"  # an unknown backend in the environment would end the run
    from matplotlib.figure import Figure  # here, since it takes half a second

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def _save(axes: Any, path: Path) -> None:
    with publish_file(path) as file:
        axes.figure.savefig(file, format="png", metadata={"Software": None})  # names a version


def _shorten(reason: str) -> str:
    """At most `_REASON_CHARACTERS` of it, without what matplotlib would read as a formula."""
    reason = replace_unprintable(reason)
    is_long = len(reason) > _REASON_CHARACTERS
    text = reason[: _REASON_CHARACTERS - 3] + "..." if is_long else reason
    return text.encode("ascii", "backslashreplace").decode().replace("$", r"\$")


def _format_power(value: int) -> str:
    """A power of two: ``512``, ``4 Ki``, ``2 Mi``."""
    unit = min((value.bit_length() - 1) // 10, 3)
    return f"{value >> 10 * unit}{('', ' Ki', ' Mi', ' Gi')[unit]}"
