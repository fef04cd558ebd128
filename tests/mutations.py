"""Places in nested lists and dicts, for tests that change one of them."""

from __future__ import annotations

from typing import Any


def find_places(content: Any) -> list[tuple[Any, Any]]:
    """Each container within `content`, and itself, with each of its keys or indices."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [content]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else list(range(len(item)))
        places += [(item, key) for key in keys]
        waiting += [item[key] for key in keys if isinstance(item[key], (dict, list))]
    return places
