"""What an evaluation has scored so far, kept beside its result until that is written.

A line is a batch. Batches follow from the task and the checkpoint, so that the same command goes
on behind the last whole line and gives the same figures to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preflight.core.storage import (
    foreign_error,
    open_regular,
    refuse_other_kind,
    storage_error,
)
from preflight.core.strict_json import parse_json
from preflight.evaluation.encoding import Row
from preflight.evaluation.packing import Batch
from preflight.evaluation.scoring import BranchScore

_FORMAT = "preflight-evaluation-journal"


def build_key(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """A digest of what the scores depend on: the rows, and facts about model and machine."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for row in rows:
        content = (row.item, row.context, [(b.index, b.tokens) for b in row.branches])
        digest.update(repr(content).encode())
    return digest.hexdigest()


class Journal:
    """The journal of one task for one checkpoint.

    Args:
        path: of the file, in a folder that exists.
        key: of `build_key`; a journal of another key is begun anew.
        batch_tokens: of the batches to come, if none are there yet.

    Attributes:
        batch_tokens: of the batches that are there.
        done: their scores by row.

    Raises:
        PreflightError: code STORAGE, for a file that cannot be read or is not ours.
    """

    def __init__(self, path: Path, key: str, batch_tokens: int) -> None:
        self.path = path
        self.batch_tokens = batch_tokens
        self.done: dict[int, list[BranchScore]] = {}
        head = {"format": _FORMAT, "key": key, "batch_tokens": batch_tokens}
        kept = self._read(key) if refuse_other_kind(path) else 0
        try:
            self._file = open(path, "rb+" if kept else "wb")  # noqa: SIM115
            self._file.truncate(kept)
            self._file.seek(kept)
            if not kept:
                self._write(head)
        except OSError as error:
            raise storage_error(path, error) from error

    def _read(self, key: str) -> int:
        """Take over what is there; the bytes that count, 0 where none do."""
        try:
            with open_regular(self.path) as file:
                lines = file.read().splitlines(keepends=True)
        except OSError as error:
            raise storage_error(self.path, error) from error
        if not lines:
            return 0
        head = _parse(lines[0])
        if not lines[0].startswith(f'{{"format": "{_FORMAT}"'.encode()):
            raise foreign_error(self.path, "is another program's file")
        if head is None or head.get("key") != key:
            return 0
        self.batch_tokens = int(head["batch_tokens"])
        n_bytes = len(lines[0])
        for line in lines[1:]:
            content = _parse(line)
            if content is None:  # a torn line, and nothing behind it counts
                break
            for row, scores in zip(content["rows"], content["scores"], strict=True):
                self.done[row] = [BranchScore(s[0], s[1], s[2], tuple(s[3])) for s in scores]
            n_bytes += len(line)
        return n_bytes

    def add(self, batch: Batch, scores: Sequence[Sequence[BranchScore]]) -> None:
        """Keep a batch.

        Raises:
            PreflightError: code STORAGE.
        """
        packed = [
            [[s.log_likelihood, s.n_tokens, s.is_greedy, list(s.n_top)] for s in row]
            for row in scores
        ]
        try:
            self._write({"rows": batch.rows, "scores": packed})
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Make it durable."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise storage_error(self.path, error) from error

    def remove(self) -> None:
        """Delete it, once the result is written."""
        self.path.unlink(missing_ok=True)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for a torn or damaged one."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
