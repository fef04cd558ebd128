"""Where text comes from. Only `find_sources` decides which kind of source serves a flag."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.corpus.sources.protocol import Document, Source, SourceFacts, text_error
from preflight.settings import DataSettings
from preflight.settings.kinds import SOURCES

__all__ = [
    "Document",
    "ScannedSource",
    "Source",
    "SourceFacts",
    "describe_sources",
    "find_sources",
    "scan_sources",
    "text_error",
]


@dataclass(frozen=True)
class ScannedSource:
    """A source, and what its scan found."""

    source: Source
    facts: SourceFacts


def find_sources(settings: DataSettings) -> list[Source]:
    """The sources that `--text-file` means, each once; without the flag the built-in sample.

    Raises:
        PreflightError: code TEXT for what is missing or no file, FLAGS for a terminal; before
            anything is read.
    """
    found: dict[str, Source] = {}
    for given in _expand(settings.text_file):
        for source in _open(given, settings):
            found.setdefault(os.path.abspath(source.label), source)
    return list(found.values())


def _expand(given: tuple[str, ...]) -> Iterator[str | None]:
    """Each value of the flag, patterns as the names that match them; None without any value."""
    if not given:
        yield None
    for value in given:
        if value != "-" and not os.path.lexists(value) and glob.has_magic(value):
            names = sorted(glob.glob(value, recursive=True))
            if not names:
                raise text_error(value, "no file matches")
            yield from names
        else:
            yield "/dev/stdin" if value == "-" else value


def _open(given: str | None, settings: DataSettings) -> list[Source]:
    """The sources of the first kind that takes `given`; the text files, the first row, at last."""
    for name in reversed(SOURCES.names()):
        sources = SOURCES.load(name)(given, settings)
        if sources is not None:
            return sources
    raise PreflightError(ExitCode.FLAGS, f"--text-file {given}: no kind of source takes it")


def scan_sources(sources: list[Source], stop: StopFlag | None) -> list[ScannedSource]:
    """The first pass over all sources. Files of a folder that are no text are skipped and logged.

    Raises:
        PreflightError: code TEXT when a source is not UTF-8 text, or there is no text at all;
            SIGINT or SIGTERM when `stop` says so.
    """
    scanned: list[ScannedSource] = []
    skipped: list[PreflightError] = []
    for source in sources:
        if stop is not None:
            stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        try:
            scanned.append(ScannedSource(source, source.scan(stop)))
        except PreflightError as error:
            if not source.is_skippable or error.code != ExitCode.TEXT:
                raise
            skipped.append(error)
    if skipped:
        log.info(
            f"skipped {len(skipped)} of {len(sources)} files, the first: {skipped[0].lines[0]}"
        )
    if not any(item.facts.document_bytes for item in scanned):
        raise (
            skipped[0]
            if skipped
            else text_error(sources[0].label, "the text is empty", "give a file with text in it")
        )
    return scanned


def describe_sources(scanned: list[ScannedSource]) -> list[dict[str, Any]]:
    """The sources as metadata.json keeps them, without their folders.

    Very many are summed up in one entry, since metadata.json has a size limit.
    """
    entries = [
        {"name": item.source.name, "size": item.facts.size, "sha256": item.facts.sha256}
        for item in scanned
    ]
    if len(entries) <= 10_000:
        return entries
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    size = sum(item.facts.size for item in scanned)
    return [{"name": f"{len(entries)} files", "size": size, "sha256": digest}]
