"""The fields of a JSON object from a client, each checked when it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preflight.serving.errors import ApiError, wrong

_MAX_FIELDS = 64


class Fields:
    """Takes fields out of an object until none is left. ``null`` counts as not given.

    Raises:
        ApiError: 400, with the name of the field; all methods.
    """

    def __init__(self, value: Mapping[str, Any], prefix: str = "") -> None:
        if len(value) > _MAX_FIELDS:
            raise ApiError(400, f"more than {_MAX_FIELDS} fields", code="invalid_value")
        self._rest, self._prefix = dict(value), prefix

    def take(self, name: str) -> Any:
        """The value, or ``None``."""
        return self._rest.pop(name, None)

    def need(self, name: str) -> Any:
        """The value of a field that must be there."""
        value = self.take(name)
        if value is None:
            raise wrong(self._prefix + name, "is missing", "missing_required_parameter")
        return value

    def text(self, name: str) -> str | None:
        """A text, or ``None``."""
        value = self.take(name)
        return None if value is None else check_text(self._prefix + name, value)

    def boolean(self, name: str, default: bool) -> bool:
        """``true`` or ``false``."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self._prefix + name, "must be true or false", "invalid_type")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(self._prefix + name, "must be a whole number", "invalid_type")
        if not low <= value <= high:
            raise wrong(self._prefix + name, f"must be from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(self._prefix + name, "must be a number", "invalid_type")
        if not low <= value <= high:
            raise wrong(self._prefix + name, f"must be from {low:g} to {high:g}")
        return float(value)

    def refuse_rest(self, unsupported: Mapping[str, tuple[Any, ...]], idle: frozenset[str]) -> None:
        """Refuse by name what was not taken.

        Args:
            unsupported: names, each with the values that ask for nothing.
            idle: names that are accepted with any value.
        """
        for name, value in self._rest.items():
            if name in idle or (name in unsupported and value is None):
                continue
            if name not in unsupported:
                raise wrong(self._prefix + name, "is not known", "unknown_parameter")
            if not any(value == harmless for harmless in unsupported[name]):
                raise wrong(
                    self._prefix + name, "is not supported: leave it out", "unsupported_parameter"
                )


def check_text(name: str, value: Any) -> str:
    """`value`, which must be a text without halves of characters.

    Raises:
        ApiError: 400.
    """
    if not isinstance(value, str):
        raise wrong(name, "must be a text", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, "has half of a surrogate pair") from None
    return value
