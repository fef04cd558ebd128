"""What a data report is made of, and its content: plain JSON that the page is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preflight.corpus.characters import COMMON
from preflight.corpus.tally import N_EXAMPLES, Example, Tally, add_up

FORMAT, VERSION = "preflight-data-report", 1
_MAX_EXAMPLES = 20  # for each reason, and of what was kept


@dataclass(frozen=True)
class SourceReport:
    """One source: what identifies it, and what was counted. ``n_bytes`` is its size as stored."""

    name: str
    kind: str
    n_bytes: int
    sha256: str
    tally: Tally
    license: str | None = None


@dataclass(frozen=True)
class MixReport:
    """What ``--mix`` asked for and what came out.

    Attributes:
        asked: the share of tokens for each source, or group of sources, by its name.
        stretch_tokens: so many tokens one stretch of the training text has.
        stretches: for each stretch in order, the tokens of each name in it; the last may be short.
    """

    asked: Mapping[str, float]
    stretch_tokens: int
    stretches: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class ReportFacts:
    """All that a report is made of.

    Attributes:
        tokenizer, vocab_size: what made the ids.
        sources: in the order in which they were read.
        settings: what shaped the data, by the names of the flags: plain JSON values. "deduplicate"
            says whether duplicates were looked for.
        command: the command line that builds it again.
        mix: where sources were mixed.
        would_drop: for each reason of a rule that was not asked for, how many documents it would
            drop, and how many were looked at.
        warnings: sentences that a user should read.
    """

    tokenizer: str
    vocab_size: int
    sources: tuple[SourceReport, ...]
    settings: Mapping[str, Any]
    command: str
    mix: MixReport | None = None
    would_drop: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def build_content(facts: ReportFacts) -> dict[str, Any]:
    """The report as plain JSON. Shares are of 1, or None where there is nothing to share.

    ====================  =========================================================================
    format, version       "preflight-data-report"; raised when the meaning of a key changes
    tokenizer             name, vocab_size
    command, settings     as they were given
    warnings              sentences
    is_filtered           whether a rule or a search for duplicates was asked for
    totals                n_rows, n_bad_rows, n_empty, n_with_text (rows that are not bad),
                          n_raw_bytes, n_dropped, n_dropped_bytes, n_kept, n_kept_bytes,
                          n_kept_tokens, n_documents, n_bytes, n_tokens (each by split),
                          bytes_per_token, kept_share and dropped_share (of n_with_text),
                          val_share (of tokens)
    sources               list: name, kind, n_bytes, sha256, license, n_kept, n_kept_tokens,
                          token_share, counts (`Tally.describe` without examples)
    mix                   None, or stretch_tokens, n_stretches (full ones), largest_difference, and
                          sources, a list: name, asked, share, least, most (in a full stretch)
    dropped               list, most first: reason, n_documents, n_bytes, share (of n_with_text),
                          by_source (list: source, n_documents), examples (as below)
    would_drop            list, most first: reason, n_documents, n_looked_at, share
    duplicates            looked_for ("none", "exact", "near"), n_documents, n_bytes
    lengths               list, shortest first: from_tokens, to_tokens (within), n_documents
    n_sampled_characters  the base of the next two
    scripts               list, most first: name, n_characters, share (of letters; None for Common)
    odd                   list, most first: name, n_characters, per_million
    examples              list: source, row, text
    ====================  =========================================================================
    """
    total = add_up(source.tally for source in facts.sources)
    duplicates = _build_duplicates(facts.settings, total)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {"name": facts.tokenizer, "vocab_size": facts.vocab_size},
        "command": facts.command,
        "settings": dict(facts.settings),
        "warnings": list(facts.warnings),
        "is_filtered": bool(facts.settings.get("filter")) or duplicates["looked_for"] != "none",
        "totals": _build_totals(total),
        "sources": [_build_source(source, total) for source in facts.sources],
        "mix": None if facts.mix is None else _build_mix(facts.mix),
        "dropped": _build_dropped(facts.sources, total),
        "would_drop": _build_would_drop(facts.would_drop),
        "duplicates": duplicates,
        "lengths": _build_lengths(total),
        "n_sampled_characters": total.n_sampled_characters,
        "scripts": _build_scripts(total),
        "odd": [
            {
                "name": name,
                "n_characters": count,
                "per_million": count / total.n_sampled_characters * 1e6,
            }
            for name, count in _sort_by_count(total.odd)
        ],
        "examples": _choose_examples(
            [(source.name, source.tally.kept_examples[:N_EXAMPLES]) for source in facts.sources]
        ),
    }


def _divide(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _sort_by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _build_totals(total: Tally) -> dict[str, Any]:
    n_dropped, n_dropped_bytes = (sum(pair[i] for pair in total.dropped.values()) for i in (0, 1))
    n_kept, n_bytes, n_tokens = (
        sum(counts.values()) for counts in (total.n_documents, total.n_bytes, total.n_tokens)
    )
    n_with_text = total.n_rows - total.n_bad_rows
    return {
        "n_rows": total.n_rows,
        "n_bad_rows": total.n_bad_rows,
        "n_empty": total.n_empty,
        "n_with_text": n_with_text,
        "n_raw_bytes": total.n_raw_bytes,
        "n_dropped": n_dropped,
        "n_dropped_bytes": n_dropped_bytes,
        "n_kept": n_kept,
        "n_kept_bytes": n_bytes,
        "n_kept_tokens": n_tokens,
        "n_documents": dict(total.n_documents),
        "n_bytes": dict(total.n_bytes),
        "n_tokens": dict(total.n_tokens),
        "bytes_per_token": _divide(n_bytes, n_tokens),
        "kept_share": _divide(n_kept, n_with_text),
        "dropped_share": _divide(n_dropped, n_with_text),
        "val_share": _divide(total.n_tokens["val"], n_tokens),
    }


def _build_source(source: SourceReport, total: Tally) -> dict[str, Any]:
    n_tokens = sum(source.tally.n_tokens.values())
    counts = source.tally.describe()
    return {
        "name": source.name,
        "kind": source.kind,
        "n_bytes": source.n_bytes,
        "sha256": source.sha256,
        "license": source.license,
        "n_kept": sum(source.tally.n_documents.values()),
        "n_kept_tokens": n_tokens,
        "token_share": _divide(n_tokens, sum(total.n_tokens.values())),
        "counts": {key: value for key, value in counts.items() if not key.endswith("examples")},
    }


def _build_mix(mix: MixReport) -> dict[str, Any]:
    full = [part for part in mix.stretches if sum(part.values()) >= mix.stretch_tokens]
    n_tokens = sum(sum(part.values()) for part in mix.stretches)
    sources, differences = [], []
    for name, asked in mix.asked.items():
        # Of a short text the only stretch there is.
        shares = [part.get(name, 0) / max(sum(part.values()), 1) for part in full or mix.stretches]
        differences += [abs(share - asked) for share in shares]
        sources.append(
            {
                "name": name,
                "asked": asked,
                "share": _divide(sum(part.get(name, 0) for part in mix.stretches), n_tokens),
                "least": min(shares, default=None),
                "most": max(shares, default=None),
            }
        )
    return {
        "stretch_tokens": mix.stretch_tokens,
        "n_stretches": len(full),
        "largest_difference": max(differences, default=None),
        "sources": sources,
    }


def _build_dropped(sources: tuple[SourceReport, ...], total: Tally) -> list[dict[str, Any]]:
    n_with_text = total.n_rows - total.n_bad_rows
    return [
        {
            "reason": reason,
            "n_documents": n,
            "n_bytes": total.dropped[reason][1],
            "share": _divide(n, n_with_text),
            "by_source": [
                {"source": source.name, "n_documents": source.tally.dropped[reason][0]}
                for source in sources
                if reason in source.tally.dropped
            ],
            "examples": _choose_examples(
                [(source.name, source.tally.dropped_examples.get(reason, [])) for source in sources]
            ),
        }
        for reason, n in _sort_by_count({key: pair[0] for key, pair in total.dropped.items()})
    ]


def _choose_examples(by_source: list[tuple[str, list[Example]]]) -> list[dict[str, Any]]:
    """At most `_MAX_EXAMPLES`, by source and row; the first of each source before its second."""
    places = sorted(
        (rank, number) for number, (_, kept) in enumerate(by_source) for rank in range(len(kept))
    )
    chosen = sorted((number, rank) for rank, number in places[:_MAX_EXAMPLES])
    return [
        {
            "source": by_source[number][0],
            "row": by_source[number][1][rank].row,
            "text": by_source[number][1][rank].text,
        }
        for number, rank in chosen
    ]


def _build_would_drop(would_drop: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "reason": reason,
            "n_documents": n,
            "n_looked_at": would_drop[reason][1],
            "share": _divide(n, would_drop[reason][1]),
        }
        for reason, n in _sort_by_count({key: pair[0] for key, pair in would_drop.items()})
    ]


def _build_duplicates(settings: Mapping[str, Any], total: Tally) -> dict[str, Any]:
    pairs = [pair for reason, pair in total.dropped.items() if reason.startswith("duplicate")]
    return {
        "looked_for": settings.get("deduplicate") or "none",
        "n_documents": sum(pair[0] for pair in pairs),
        "n_bytes": sum(pair[1] for pair in pairs),
    }


def _build_lengths(total: Tally) -> list[dict[str, int]]:
    keys = range(min(total.lengths), max(total.lengths) + 1) if total.lengths else range(0)
    return [
        {
            "from_tokens": 2**key,
            "to_tokens": 2 ** (key + 1) - 1,
            "n_documents": total.lengths.get(key, 0),
        }
        for key in keys
    ]


def _build_scripts(total: Tally) -> list[dict[str, Any]]:
    n_letters = sum(count for name, count in total.scripts.items() if name != COMMON)
    return [
        {
            "name": name,
            "n_characters": count,
            "share": None if name == COMMON else count / n_letters,
        }
        for name, count in _sort_by_count(total.scripts)
    ]
