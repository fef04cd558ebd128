"""A part of a set-up, which is made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from preflight.core.errors import PreflightError

T = TypeVar("T")


class part(Generic[T]):
    """A part of a set-up: made at its first use and kept, and so is its `PreflightError`."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, setup: Any, owner: type | None = None) -> T:
        made = setup.__dict__.setdefault("_parts", {})
        if self._name not in made:
            try:
                made[self._name] = self._make(setup)
            except PreflightError as error:
                made[self._name] = error
        if isinstance(made[self._name], PreflightError):
            raise made[self._name]
        return made[self._name]
