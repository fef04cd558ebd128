"""The report of a data folder: what is in it, what was left out and why, and how to build it again.

`write_report` writes it as JSON for programs and as one page for people; `draw_pictures` adds two
pictures. All of it depends on the facts alone: equal builds have equal reports, so there is no date
in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.page_parts import build_mark, format_share, replace_unprintable
from preflight.core.storage import open_regular, publish_file, write_json
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json
from preflight.core.units import format_bytes
from preflight.corpus.pictures import draw_dropped, draw_lengths
from preflight.corpus.report_content import (
    FORMAT,
    VERSION,
    MixReport,
    ReportFacts,
    SourceReport,
    build_content,
)
from preflight.corpus.report_page import MARK, render_page
from preflight.corpus.tally import SPLITS

__all__ = ["MixReport", "ReportFacts", "SourceReport", "describe", "write_report"]
JSON_NAME, PAGE_NAME = "data_report.json", "data_report.html"
PAGE_MARK = build_mark(MARK)
LENGTHS_NAME, DROPPED_NAME = "document_lengths.png", "dropped.png"
REPORT_NAMES = (JSON_NAME, PAGE_NAME)
_MAX_LINES = 15  # of the summary
_MAX_SOURCES, _MAX_REASONS = 4, 4  # in it that have a line


def write_report(folder: Path, facts: ReportFacts) -> list[Path]:
    """Write the files called `REPORT_NAMES` into `folder`, which is this program's; their paths.

    Raises:
        PreflightError: code STORAGE, when one cannot be written, or another program's
            ``data_report.json`` is in its place.
    """
    content = build_content(facts)
    write_json(folder / JSON_NAME, content)
    page = render_page(content).encode()
    with publish_file(folder / PAGE_NAME, len(page)) as file:
        file.write(page)
    return [folder / name for name in REPORT_NAMES]


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a data folder; none in one that an older version made.

    Raises:
        PreflightError: code DATA, when it is damaged.
    """
    path = folder / JSON_NAME
    try:
        with open_regular(path) as file:
            content = parse_json(file.read(MAX_JSON_BYTES + 1))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("not a report of this version")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PreflightError(
            ExitCode.DATA, f"{path} is damaged: {error}", "delete it; the data itself is sound"
        ) from None
    return dict(content)


def draw_pictures(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Draw the lengths of documents and what was dropped; the paths of the pictures.

    Raises:
        PreflightError: code STORAGE.
    """
    paths = [folder / LENGTHS_NAME, folder / DROPPED_NAME]
    draw_lengths(paths[0], content["lengths"])
    draw_dropped(paths[1], content["dropped"], content["totals"]["n_with_text"])
    return paths


def describe(content: dict[str, Any]) -> list[str]:
    """A report in at most 15 lines of plain text."""
    totals, sources = content["totals"], content["sources"]
    lines = [
        f"{totals['n_kept']:,} documents with {totals['n_kept_tokens']:,} tokens: "
        + ", ".join(f"{totals['n_tokens'][split]:,} {split}" for split in SPLITS)
    ]
    if totals["bytes_per_token"] is not None:
        size = f"{format_bytes(totals['n_kept_bytes'])} of {format_bytes(totals['n_raw_bytes'])}"
        lines.append(f"text kept: {size}, {totals['bytes_per_token']:.2f} bytes per token")
    lines += [_describe_source(source) for source in sources[:_MAX_SOURCES]]
    if len(sources) > _MAX_SOURCES:
        n_tokens = sum(source["n_kept_tokens"] for source in sources[_MAX_SOURCES:])
        lines.append(f"  {len(sources) - _MAX_SOURCES:,} more sources: {n_tokens:,} tokens")
    lines += _describe_dropped(content)
    if content["mix"] is not None and content["mix"]["largest_difference"] is not None:
        shares = ", ".join(
            f"{entry['name']} {format_share(entry['share'])} (asked {format_share(entry['asked'])})"
            for entry in content["mix"]["sources"][:_MAX_SOURCES]
        )
        lines.append(f"mixed: {shares}")
    room = _MAX_LINES - len(lines)
    warnings = [f"warning: {warning}" for warning in content["warnings"]]
    if len(warnings) > room:
        hidden = len(warnings) - room + 1
        warnings = [*warnings[: room - 1], f"warning: {hidden:,} more in {PAGE_NAME}"]
    return [replace_unprintable(line) for line in lines + warnings]


def _describe_source(source: dict[str, Any]) -> str:
    share = format_share(source["token_share"])
    return (
        f"  {source['name']}: {source['n_kept']:,} of {source['counts']['n_rows']:,} documents, "
        f"{source['n_kept_tokens']:,} tokens ({share})"
    )


def _describe_dropped(content: dict[str, Any]) -> list[str]:
    """What was dropped; where nothing was, what would be. At most `_MAX_REASONS` + 2 lines."""
    totals, dropped = content["totals"], content["dropped"]
    lines = []
    if totals["n_bad_rows"] or totals["n_empty"]:
        lines.append(
            f"without text: {totals['n_bad_rows']:,} rows that hold none, "
            f"{totals['n_empty']:,} that are empty"
        )
    if not dropped:
        why = "" if content["is_filtered"] else ", since no rule was asked for"
        lines.append(f"nothing was dropped{why}")
        for most in content["would_drop"][:1]:
            lines.append(
                f"  most would go by {most['reason']}: {most['n_documents']:,} of "
                f"{most['n_looked_at']:,} looked at ({format_share(most['share'])})"
            )
        return lines
    share = format_share(totals["dropped_share"])
    more = dropped[_MAX_REASONS:]
    lines.append(
        f"dropped: {totals['n_dropped']:,} documents ({share})"
        + (f", for {len(dropped):,} reasons; the first {_MAX_REASONS}:" if more else "")
    )
    return lines + [
        f"  {entry['reason']}: {entry['n_documents']:,} ({format_share(entry['share'])})"
        for entry in dropped[:_MAX_REASONS]
    ]
