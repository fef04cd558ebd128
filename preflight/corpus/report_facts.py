"""What the data report says of a build, gathered when the build is done."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from preflight.core.commands import format_command
from preflight.corpus.collector import Collector
from preflight.corpus.data_report import MixReport, ReportFacts, SourceReport
from preflight.corpus.mixing import MARK_TOKENS
from preflight.corpus.plan import Plan, describe_preparation
from preflight.corpus.reading import Reader, RowReader, TextReader, TokenReader
from preflight.corpus.sources import ScannedSource
from preflight.corpus.tally import SAMPLE_CHARACTERS, Tally
from preflight.settings import DataSettings
from preflight.settings.options import list_options
from preflight.tokenization import Tokenizer

_OF_A_MACHINE = ("data_dir", "num_workers", "workers")  # flags that change no byte
_SAMPLED_DOCUMENTS = 64  # of plain texts, whose characters no worker process has counted


def build_facts(
    plan: Plan, collector: Collector, settings: DataSettings, tokenizer: Tokenizer
) -> ReportFacts:
    """All that the report of a finished build is made of."""
    n_single = len(collector.tallies) - (len(plan.readers) > len(collector.tallies))
    sources = [
        _build_source([reader], tally, plan, settings)
        for reader, tally in zip(plan.readers[:n_single], collector.tallies, strict=False)
    ]
    if n_single < len(collector.tallies):
        rest = plan.readers[n_single:]
        sources.append(_build_source(rest, collector.tallies[-1], plan, settings))
    n_tried = collector.tried.get("", 0)
    return ReportFacts(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        sources=tuple(sources),
        settings={"val_split": settings.val_split, **describe_preparation(settings)},
        command=_spell_command(settings, tokenizer),
        mix=_build_mix(plan, collector),
        would_drop={
            name: (count, n_tried) for name, count in sorted(collector.tried.items()) if name
        },
        warnings=tuple(_list_warnings(plan, collector)),
    )


def _build_source(
    readers: list[Reader], tally: Tally, plan: Plan, settings: DataSettings
) -> SourceReport:
    """The entry of a reader, or of many together."""
    own = [item for reader in readers for item in _find_scanned(reader, plan)]
    if isinstance(readers[0], TextReader):
        _sample_text(readers[0], tally)
    one = own[0].facts.sha256 if len(own) == 1 else None
    digest = hashlib.sha256("".join(item.facts.sha256 for item in own).encode()).hexdigest()
    more = " more" if len(readers) > 1 else ""
    return SourceReport(
        name=own[0].source.name if len(own) == 1 else f"{len(own):,}{more} files",
        kind=_name_kind(readers[0]),
        n_bytes=sum(item.facts.size for item in own),
        sha256=one or digest,
        tally=tally,
        license=settings.license,
    )


def _find_scanned(reader: Reader, plan: Plan) -> list[ScannedSource]:
    if isinstance(reader, RowReader):
        return [item for item in plan.scanned if item.source is reader.source]
    if isinstance(reader, TokenReader):
        return [item for item in plan.scanned if item.source is reader.array]
    return reader.split.scanned if isinstance(reader, TextReader) else []


def _name_kind(reader: Reader) -> str:
    if isinstance(reader, TextReader):
        return "text"
    return "".join(Path(reader.name).suffixes[-2:]).lstrip(".") or reader.name.partition(":")[0]


def _sample_text(reader: TextReader, tally: Tally) -> None:
    """Count the characters of the first documents' beginnings, and keep some as examples."""
    for row, part in enumerate(islice(reader.split.list_parts(), _SAMPLED_DOCUMENTS)):
        beginning = next(part.open(0), b"")[: part.n_bytes][: 4 * SAMPLE_CHARACTERS]
        text = beginning.decode("utf-8", "ignore")
        tally.sample(row, text)
        tally.keep_example(row, text)


def _spell_command(settings: DataSettings, tokenizer: Tokenizer) -> str:
    words = ["--prepare"]
    for option in list_options("data", DataSettings):
        value = getattr(settings, option.name)
        if value != option.default and option.name not in _OF_A_MACHINE:
            words += option.spell(value)
    return format_command(*words, "--tokenizer", tokenizer.name)


def _build_mix(plan: Plan, collector: Collector) -> MixReport | None:
    if not plan.groups:
        return None
    names = [name for name, _, _ in plan.groups]
    marks = [[0] * len(names), *collector.mix.marks, collector.mix.n_tokens]
    stretches = [
        {name: b - a for name, a, b in zip(names, before, behind, strict=True)}
        for before, behind in pairwise(marks)
    ]
    kept = tuple(stretch for stretch in stretches if any(stretch.values()))
    return MixReport({name: share for name, share, _ in plan.groups}, MARK_TOKENS, kept)


def _list_warnings(plan: Plan, collector: Collector) -> Iterator[str]:
    for item in plan.scanned:
        for note in item.facts.notes:
            yield f"{item.source.name}: {note}"
    total = collector.total
    if total.n_documents["val"] < 8 and total.n_tokens["val"] < 10_000:
        yield (
            f"the validation part has only {total.n_tokens['val']:,} tokens: its loss will be noisy"
        )
