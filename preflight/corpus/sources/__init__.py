"""Where text comes from. Only `find_sources` decides which kind of source serves a flag."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.corpus.filtering.expressions import build_rules
from preflight.corpus.sources.document_rows import DocumentRows
from preflight.corpus.sources.protocol import Document, Source, SourceFacts, text_error
from preflight.corpus.sources.rows import RowSource
from preflight.corpus.sources.text import TextFile, walk_folder
from preflight.corpus.sources.token_arrays import TokenArray
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

# What this program writes in a data or an output folder, and the folder itself.
_OWN_NAMES = {
    os.curdir,
    *("train", "val", "metadata.json", ".building", ".lock"),
    *("milestones", "metrics.jsonl", "loss_curve.png", "crash.log"),
    *("check_report.json", "batch_size_report.json"),
}


@dataclass(frozen=True)
class ScannedSource:
    """A source, and what its scan found."""

    source: Source
    facts: SourceFacts


def find_sources(settings: DataSettings) -> list[Source]:
    """The sources that `--text-file` means, each once; without the flag the built-in sample.

    Raises:
        PreflightError: code TEXT for what is missing or no file, FLAGS for a terminal, for a
            folder that this program writes itself, and for data and output folders that contain
            each other; before anything is read.
    """
    _refuse_nested(settings)
    build_rules(settings.filter)
    found: dict[str, Source] = {}
    for values, split in ((settings.text_file, None), (settings.val_file, "val")):
        for given in _expand(values, settings) if values or split is None else ():
            if given is not None and os.path.isdir(given) and _is_written_by_us(given, settings):
                raise PreflightError(
                    ExitCode.FLAGS,
                    f"--text-file {given}: this program writes that folder itself",
                    "keep the text in another folder, or choose another --data-dir and "
                    "--output-dir",
                )
            for source in _open_all(given, settings):
                source.split = split or ("train" if settings.val_file else None)
                found.setdefault(os.path.abspath(source.label), source)
    return [_read_by_rows(source, settings) for source in found.values()]


def _read_by_rows(source: Source, settings: DataSettings) -> Source:
    """The source, or its documents as rows where flags change, drop, count or mix them."""
    is_plain = not isinstance(source, (RowSource, TokenArray))
    if is_plain and (settings.is_processed or settings.mix or settings.document_limit):
        return DocumentRows(source)
    return source


def _refuse_nested(settings: DataSettings) -> None:
    """PreflightError (FLAGS) for a data and an output folder of which one contains the other."""
    if settings.output_dir is not None and (
        _contains(settings.data_dir, settings.output_dir)
        or _contains(settings.output_dir, settings.data_dir)
    ):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--data-dir {settings.data_dir} and --output-dir {settings.output_dir}: one is the "
            "other or lies within it",
            "choose two folders side by side, such as run/data and run/output",
        )


def _contains(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies below it, all links followed."""
    real, place = os.path.realpath(folder), os.path.realpath(path)
    return place == real or place.startswith(os.path.join(real, ""))


def _is_written_by_us(path: str, settings: DataSettings) -> bool:
    """Whether `path` is a folder of the run, or what the run writes there."""
    for folder in filter(lambda own: _contains(own, path), settings.own_folders):
        inner = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        if inner.split(os.sep)[0] in _OWN_NAMES:
            return True
    return False


def _expand(values: tuple[str, ...], settings: DataSettings) -> Iterator[str | None]:
    """Each value of a flag, patterns as the names that match them.

    None, for what is named by no file: ``--source``, and without any text the built-in sample.
    """
    if not values or (settings.source and values is settings.text_file):
        yield None
    for value in values:
        if value != "-" and not os.path.lexists(value) and glob.has_magic(value):
            yield from _match(value, settings)
        else:
            yield "/dev/stdin" if value == "-" else value


def _match(pattern: str, settings: DataSettings) -> list[str]:
    """The names that match, in order. Folders of the run are left out, and that is told."""
    parts = pattern.split(os.sep)
    begin = os.sep.join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    inside = [own for own in settings.own_folders if _contains(own, begin or ".")]
    names = sorted(glob.glob(pattern, recursive=True))
    kept = [
        name
        for name in names
        if not _is_written_by_us(name, settings)
        and (inside or not any(_contains(own, name) for own in settings.own_folders))
    ]
    if len(kept) < len(names):
        first = next(name for name in names if name not in kept)
        log.info(
            f"{pattern}: files that this program writes are left out "
            f"({len(names) - len(kept):,}, the first: {first})"
        )
    if not kept:
        raise text_error(pattern, "no file matches")
    return kept


def _open_all(given: str | None, settings: DataSettings) -> Iterator[Source]:
    """The sources of a value: of a folder those of its files, each called by its place in it.

    In a folder, ``.json``, ``.csv`` and ``.tsv`` are texts unless ``--text-column`` is given, and
    ``.npy`` and ``.bin`` are no tokens: they may be anything there.
    """
    if given is None or not os.path.isdir(given):
        yield from _open(given, settings)
        return
    root = Path(Path(given).resolve().name)
    for file in walk_folder(Path(given), settings.own_folders):
        is_any = file.suffix in (".npy", ".bin") or (
            file.suffix in (".json", ".csv", ".tsv") and settings.text_column is None
        )
        if is_any or not file.is_file():  # what is no file is skipped by its scan
            found: list[Source] = [TextFile(file, settings.document_separator)]
        else:
            found = _open(str(file), settings)
        for source in found:
            source.name = (root / file.relative_to(given)).as_posix()
            source.is_skippable = True
            yield source


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
    for note in dict.fromkeys(note for item in scanned for note in item.facts.notes):
        labels = [item.source.label for item in scanned if note in item.facts.notes]
        more = f" and {len(labels) - 1:,} more" if len(labels) > 1 else ""
        log.info(f"{labels[0]}{more}: {note}")
    if not any(item.facts.document_bytes or not _is_known(item.source) for item in scanned):
        raise (
            skipped[0]
            if skipped
            else text_error(sources[0].label, "the text is empty", "give a file with text in it")
        )
    return scanned


def _is_known(source: Source) -> bool:
    """Whether a scan finds the documents; otherwise the building does."""
    return not isinstance(source, (RowSource, TokenArray))


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
