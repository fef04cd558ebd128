"""What every kind of data source offers. A new kind is one file here and one row in `kinds.py`."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag

# The UTF-8 of one document, in chunks that fit into memory; a chunk may end within a character.
Document = Iterator[bytes]


@dataclass(frozen=True)
class SourceFacts:
    """What a scan of a source found.

    Attributes:
        size: bytes of the source.
        sha256: its digest in hexadecimal: equal only if the documents are equal.
        document_bytes: of type "q", the UTF-8 bytes of each document, none of them empty.
        notes: what a user should know of it; the same words for all sources that have it.
    """

    size: int
    sha256: str
    document_bytes: array
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Documents from one place, read twice: `scan` checks them, `documents` yields them.

    A row of ``SOURCES`` is a function ``(given, settings) -> list[Source] | None`` that takes one
    value of ``--text-file``, or None without any, and returns None if it is not for this kind.

    Attributes:
        name: the source's entry in ``metadata.json``, so without the folder.
        label: how messages call the source: its path or address.
        is_skippable: whether a source without text is skipped and logged, instead of ending the
            preparation.
        is_copied: whether `scan` writes into the folder of the build. It is then called under the
            lock of the data folder only.
        split: the split of all its documents, where flags say so.
    """

    name: str
    label: str
    is_skippable: bool = False
    is_copied: bool = False
    split: str | None = None

    @abstractmethod
    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Read the whole source once, before anything is built from it.

        Raises:
            PreflightError: code TEXT, when it is not text; SIGINT or SIGTERM when `stop` says so.
        """

    @abstractmethod
    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        """The documents from index `start` on, in the order of the scan.

        Each is read before the next is asked for, or not at all. The first begins at its byte
        `offset`, so that an interrupted build can continue within a long document.

        Raises:
            PreflightError: code TEXT, when the source cannot be read or was changed.
        """

    def check_unchanged(self, facts: SourceFacts) -> None:
        """Compare the source with what `scan` found.

        Raises:
            PreflightError: code TEXT, when they differ.
        """
        if self.scan(None).sha256 != facts.sha256:
            raise self.changed_error()

    def changed_error(self) -> PreflightError:
        """The error to raise when the source is not what it was in the scan."""
        return text_error(
            self.label,
            "changed while it was being read; nothing was published",
            "run the same command again when nothing writes to it any more",
        )


def text_error(label: Path | str, what: str, *more: str) -> PreflightError:
    """The error to raise for a fault in the text at `label`."""
    return PreflightError(ExitCode.TEXT, f"{label}: {what}", *more)
