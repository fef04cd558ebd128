"""Named things of one kind, loaded when they are asked for.

A table says where each thing is: ``{"adamw": "preflight.training.optimizers:ADAMW"}``.
Flags list the names without importing torch; `Registry.load` imports the object.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
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
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"choose one of {', '.join(self.names())}"
            )
            raise PreflightError(ExitCode.FLAGS, f"{self.flag} {name[:60]!r} is unknown; {hint}")
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
