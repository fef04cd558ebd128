"""Small sets of our own writing, for an evaluation without files and without a network.

They resemble LAMBADA, HellaSwag and WikiText in form alone. Their figures compare with nothing but
each other, so that they never go under a benchmark's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from preflight.evaluation.items import Item, Task, TaskKind

SOURCE = "built-in"
_PACKAGE = "preflight.evaluation"


def load_own_tasks() -> list[Task]:
    """``own-last-word`` and ``own-choices`` with 20 items each, ``own-pages`` with three."""
    rows: list[tuple[TaskKind, str, Callable[[dict[str, Any], int], Item]]] = [
        ("last-word", "last_word", _build_last_word),
        ("choices", "choices", _build_choices),
        ("pages", "pages", _build_page),
    ]
    return [
        Task(f"own-{kind}", kind, SOURCE, tuple(map(build, *_read(name))))
        for kind, name, build in rows
    ]


def _read(name: str) -> tuple[list[dict[str, Any]], range]:
    """The lines of a set, and their numbers."""
    file = resources.files(_PACKAGE).joinpath("assets", f"own_{name}.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], range(1, len(lines) + 1)


def _build_last_word(record: dict[str, Any], line: int) -> Item:
    return Item(record["context"], (record["continuation"],), line=line)


def _build_choices(record: dict[str, Any], line: int) -> Item:
    return Item(record["context"], tuple(record["choices"]), record["label"], line)


def _build_page(record: dict[str, Any], line: int) -> Item:
    page = record["page"]
    # Words as the harness counts those of WikiText, the empty one at the end included.
    n_words = len(re.split(r"\s+", page))
    return Item("", (page,), line=line, n_words=n_words, n_bytes=len(page.encode()))
