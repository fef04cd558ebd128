"""Named things of one kind, loaded when they are asked for.

A table says where each thing is: ``{"adamw": "preflight.training.optimizers:ADAMW"}``.
Flags list the names without importing torch; `Registry.load` imports the object.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar, cast

from preflight.core.errors import ExitCode, PreflightError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    Args:
        flag: how a user chooses one, for the error message; ``--optimizer``.
        targets: by name, either the object itself or ``"module:attribute"``.
    """

    def __init__(self, flag: str, targets: Mapping[str, str | T]) -> None:
        self.flag = flag
        self._targets = dict(targets)

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the table. Nothing is imported."""
        return tuple(self._targets)

    def register(self, name: str, target: str | T) -> None:
        """Add one more, or replace one."""
        self._targets[name] = target

    def load(self, name: str) -> T:
        """The object of that name, imported now if it was not yet.

        Raises:
            PreflightError: code FLAGS, with the nearest name, when there is none.
        """
        if name not in self._targets:
            raise PreflightError(ExitCode.FLAGS, describe_unknown(self.flag, name, self.names()))
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))


def describe_unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of the `known` few."""
    known = list(known)
    return (
        f"{what} {name[:60]!r} is unknown{suggest(name, known)}: choose one of {', '.join(known)}"
    )


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean adamw?)`` for the known name that is most like `name`, or nothing."""
    import difflib  # only a mistake needs it

    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
