"""The page of a data report: one HTML file that needs nothing else, drawn from the JSON content."""

from __future__ import annotations

from typing import Any

from preflight.core.page_parts import (
    Html,
    build_bar,
    build_example,
    build_figures,
    build_page,
    build_table,
    build_tag,
    format_large,
    format_range,
    format_setting,
    format_share,
)
from preflight.core.units import format_bytes

MARK = "preflight-data-report"
_MAX_SOURCES = 100  # in the table
_MAX_COUNTS = 5  # of sources, for each rule
_PAPERS = {
    "gopher_quality": "Gopher's quality rules (Rae et al. 2021)",
    "gopher_repetition": "Gopher's repetition rules (Rae et al. 2021)",
    "c4": "the rules of C4 (Raffel et al. 2020)",
    "fineweb": "the rules of FineWeb (Penedo et al. 2024)",
}
_ODD_NAMES = {
    "nul": "NUL (U+0000)",
    "control": "other control characters",
    "soft_hyphen": "soft hyphens (U+00AD)",
    "zero_width": "zero width characters",
    "bidi": "marks that turn the direction of text",
    "byte_order_mark": "byte order marks (U+FEFF)",
    "replacement_character": "replacement characters (U+FFFD): a decoding went wrong before",
    "private_use": "private use characters",
    "surrogate": "half characters (surrogates)",
}


def render_page(content: dict[str, Any]) -> str:
    """The page of a report's content, see `preflight.corpus.report_content.build_content`."""
    sections = (
        _draw_head,
        _draw_sources,
        _draw_mix,
        _draw_dropped,
        _draw_would_drop,
        _draw_lengths,
        _draw_scripts,
        _draw_odd,
        _draw_examples,
        _draw_command,
    )
    parts = (part for section in sections for part in section(content))
    return build_page(MARK, "Data report", parts)


def _draw_head(content: dict[str, Any]) -> list[Html]:
    totals, sources, tokens = content["totals"], content["sources"], content["totals"]["n_tokens"]
    names = ", ".join(source["name"] for source in sources[:3])
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    count = f"{len(sources):,} sources: " if len(sources) > 1 else ""
    lead = (
        f"{totals['n_kept']:,} documents with {totals['n_kept_tokens']:,} tokens, for training a "
        f"language model. They come from {count}{names}{more}."
    )
    split = (
        f"{tokens['train']:,} tokens are for training, {tokens['val']:,} "
        f"({format_share(totals['val_share'])}) for validation. {totals['n_rows']:,} rows were "
        f"read; {format_share(totals['kept_share'])} of the documents in them were kept."
    )
    per_token = totals["bytes_per_token"]
    figures = {
        "documents": f"{totals['n_kept']:,}",
        "tokens": format_large(totals["n_kept_tokens"]),
        "text kept": format_bytes(totals["n_kept_bytes"]),
        "text found": format_bytes(totals["n_raw_bytes"]),
        "bytes per token": "-" if per_token is None else f"{per_token:.2f}",
        "tokenizer": content["tokenizer"]["name"],
    }
    parts = [
        build_tag("h1", "Data report"),
        build_tag("p", lead, class_="lead"),
        build_tag("p", split),
        build_figures(figures),
    ]
    if content["warnings"]:
        items = [build_tag("li", warning) for warning in content["warnings"]]
        parts.append(build_tag("ul", *items, class_="warnings"))
    return parts


def _draw_sources(content: dict[str, Any]) -> list[Html]:
    headers = ("source", "kind", "licence", "size", "rows", "kept", "tokens", "share", "SHA-256")
    rows = [
        (
            source["name"],
            source["kind"],
            source["license"] or "not given",
            format_bytes(source["n_bytes"]),
            f"{source['counts']['n_rows']:,}",
            f"{source['n_kept']:,}",
            f"{source['n_kept_tokens']:,}",
            format_share(source["token_share"]),
            source["sha256"][:12],
        )
        for source in content["sources"][:_MAX_SOURCES]
    ]
    more = len(content["sources"]) - len(rows)
    note = "Kept: documents. Share: of all tokens."
    note += f" {more:,} more sources are listed in data_report.json." if more else ""
    return [
        build_tag("h2", "Sources"),
        build_table(headers, rows, names=3, class_="cards"),
        build_tag("p", note, class_="note"),
    ]


def _draw_mix(content: dict[str, Any]) -> list[Html]:
    mix = content["mix"]
    if mix is None:
        return []
    headers = ("name", "asked for", "came out", "least", "most")
    keys = ("asked", "share", "least", "most")
    rows = [
        (entry["name"], *(format_share(entry[key]) for key in keys)) for entry in mix["sources"]
    ]
    note = (
        f"Shares of the training tokens. Least and most: of any stretch of "
        f"{mix['stretch_tokens']:,} tokens ({mix['n_stretches']:,} full ones). Largest difference "
        f"from what was asked for: {format_share(mix['largest_difference'])}."
    )
    return [build_tag("h2", "Mix"), build_table(headers, rows), build_tag("p", note, class_="note")]


def _draw_dropped(content: dict[str, Any]) -> list[Html]:
    totals, dropped = content["totals"], content["dropped"]
    parts = [build_tag("h2", "What was dropped, and why")]
    text = "Nothing is dropped unless it is asked for. "
    if not dropped:
        text += (
            "No document met a rule for dropping."
            if content["is_filtered"]
            else "No rule was asked for, so nothing was dropped."
        )
    else:
        share = format_share(totals["dropped_share"])
        text += (
            f"The rules below dropped {totals['n_dropped']:,} of {totals['n_with_text']:,} "
            f"documents ({share}), {format_bytes(totals['n_dropped_bytes'])} of text. A document "
            "counts for the first rule that it met."
        )
    parts += [build_tag("p", text), *_draw_fates(totals)]
    if dropped:
        largest = max(entry["n_documents"] for entry in dropped)
        rows = [
            (
                entry["reason"],
                f"{entry['n_documents']:,}",
                format_share(entry["share"]),
                format_bytes(entry["n_bytes"]),
                build_bar(entry["n_documents"] / largest),
            )
            for entry in dropped
        ]
        headers = ("rule", "documents", "share", "text", "")
        parts.append(build_table(headers, rows, class_="rules"))
        cited = [text for rule, text in _PAPERS.items() if _has_rule(dropped, rule)]
        if cited:
            parts.append(build_tag("p", f"Published rules: {'; '.join(cited)}.", class_="note"))
    parts.append(build_tag("p", _describe_duplicates(content["duplicates"])))
    return parts + [_draw_dropped_examples(entry) for entry in dropped if entry["examples"]]


def _draw_fates(totals: dict[str, Any]) -> list[Html]:
    """One bar of all rows: kept, dropped, without text."""
    fates = {
        "kept": totals["n_kept"],
        "dropped": totals["n_dropped"],
        "without": totals["n_bad_rows"] + totals["n_empty"],
    }
    words = {
        "kept": "kept",
        "dropped": "dropped",
        "without": f"without text ({totals['n_bad_rows']:,} hold none, {totals['n_empty']:,} are "
        "empty)",
    }
    whole = max(sum(fates.values()), 1)
    bars = [
        build_tag("span", class_=fate, style=f"width:{100 * count / whole:.2f}%")
        for fate, count in fates.items()
    ]
    legend = [
        build_tag("li", build_tag("span", class_=fate), f"{count:,} {words[fate]}")
        for fate, count in fates.items()
    ]
    return [build_tag("div", *bars, class_="parts"), build_tag("ul", *legend, class_="legend")]


def _has_rule(dropped: list[dict[str, Any]], rule: str) -> bool:
    return any(entry["reason"].partition(":")[0] == rule for entry in dropped)


def _describe_duplicates(duplicates: dict[str, Any]) -> str:
    if duplicates["looked_for"] == "none":
        return "Duplicates were not looked for (--deduplicate exact or near does)."
    return (
        f"Duplicates ({duplicates['looked_for']}): {duplicates['n_documents']:,} documents, "
        f"{format_bytes(duplicates['n_bytes'])} of text. The first of each stays."
    )


def _draw_dropped_examples(entry: dict[str, Any]) -> Html:
    counts = [f"{part['source']} {part['n_documents']:,}" for part in entry["by_source"]]
    if len(counts) > _MAX_COUNTS:
        counts[_MAX_COUNTS:] = [f"{len(counts) - _MAX_COUNTS:,} more sources"]
    by_source = ", ".join(counts)
    title = build_tag("summary", f"Examples: {entry['reason']} ({by_source})")
    return build_tag("details", title, *map(build_example, entry["examples"]))


def _draw_would_drop(content: dict[str, Any]) -> list[Html]:
    would = content["would_drop"]
    if not would:
        return []
    largest = max(entry["share"] or 0 for entry in would) or 1
    rows = [
        (
            entry["reason"],
            f"{entry['n_documents']:,}",
            f"{entry['n_looked_at']:,}",
            format_share(entry["share"]),
            build_bar((entry["share"] or 0) / largest),
        )
        for entry in would
    ]
    text = "These rules were not asked for. Of the documents that were looked at they would drop:"
    headers = ("rule", "documents", "looked at", "share", "")
    return [
        build_tag("h2", "What would go"),
        build_tag("p", text),
        build_table(headers, rows, class_="rules"),
    ]


def _draw_lengths(content: dict[str, Any]) -> list[Html]:
    lengths = content["lengths"]
    if not lengths:
        return []
    largest = max(entry["n_documents"] for entry in lengths)
    rows = [
        (
            format_range(entry["from_tokens"], entry["to_tokens"]),
            f"{entry['n_documents']:,}",
            build_bar(entry["n_documents"] / largest),
        )
        for entry in lengths
    ]
    return [build_tag("h2", "Document lengths"), build_table(("tokens", "documents", ""), rows)]


def _draw_scripts(content: dict[str, Any]) -> list[Html]:
    rows = [
        (
            entry["name"],
            f"{entry['n_characters']:,}",
            format_share(entry["share"]),
            build_bar(entry["share"]),
        )
        for entry in content["scripts"]
        if entry["share"] is not None
    ]
    if not rows:
        return []
    common = sum(e["n_characters"] for e in content["scripts"] if e["share"] is None)
    note = (
        f"{content['n_sampled_characters']:,} characters were sampled, after cleaning and "
        f"filtering. {common:,} of them are spaces, digits, punctuation and symbols, which all "
        "scripts share. Shares are of the others."
    )
    headers = ("script", "characters", "share", "")
    title = build_tag("h2", "Languages by script")
    return [title, build_table(headers, rows), build_tag("p", note, class_="note")]


def _draw_odd(content: dict[str, Any]) -> list[Html]:
    if not content["n_sampled_characters"]:
        return []
    title = build_tag("h2", "Odd characters")
    if not content["odd"]:
        return [title, build_tag("p", "None among the sampled characters.")]
    rows = [
        (
            _ODD_NAMES[entry["name"]],
            f"{entry['n_characters']:,}",
            f"{entry['per_million']:,.1f}",
        )
        for entry in content["odd"]
    ]
    return [title, build_table(("kind", "in the sample", "per million"), rows)]


def _draw_examples(content: dict[str, Any]) -> list[Html]:
    if not content["examples"]:
        return []
    text = "The beginnings of the first documents of each source, as they are in the data."
    title = build_tag("h2", "Examples")
    return [title, build_tag("p", text), *map(build_example, content["examples"])]


def _draw_command(content: dict[str, Any]) -> list[Html]:
    rows = [(name, format_setting(value)) for name, value in content["settings"].items()]
    tokenizer = content["tokenizer"]
    rows.append(("tokenizer", f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids"))
    return [
        build_tag("h2", "How to build it again"),
        build_tag("pre", content["command"]),
        build_table(("setting", "value"), rows, names=2),
    ]
