"""Questions to a person: with arrow keys where questionary is installed, else with numbers.

Questions go to stderr, since stdout is for results. ``None`` stands for no answer: q, Ctrl-D, or
the end of a pipe.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preflight.core.errors import PreflightError
from preflight.core.libraries import import_library
from preflight.core.streams import is_on_terminal

_ANSI = {"green": 32, "blue": 34}  # ECMA-48


@dataclass(frozen=True)
class Choice:
    """One of several. `colour` is green, blue or nothing; a `heading` cannot be chosen."""

    text: str
    colour: str = ""
    heading: bool = False


class Asker(Protocol):
    """Asks a person."""

    def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
        """The index of the choice."""

    def ask(self, question: str, default: str = "") -> str | None:
        """The line that was typed, without spaces around it; the default for an empty one."""


def open_asker() -> Asker:
    """With arrow keys on a terminal that has them, if questionary is installed."""
    if is_on_terminal() and os.environ.get("TERM") != "dumb":
        try:
            return ArrowAsker(import_library("questionary", "questionary", "the menu"))
        except PreflightError:
            pass
    return NumberAsker()


class NumberAsker:
    """Numbered lines, and an answer in a line."""

    def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
        """See `Asker`."""
        numbers: list[int] = []
        lines = ["", title]
        for index, choice in enumerate(choices):
            if choice.heading:
                lines.append(choice.text)
                continue
            numbers.append(index)
            lines.append(f"{len(numbers):>4}  {_colour(choice)}")
        _write("\n".join(lines) + "\n")
        while True:
            answer = self.ask(f"number, 1 to {len(numbers)} (q leaves)")
            if answer is None or answer.lower() == "q":
                return None
            if answer.isdecimal() and len(answer) < 9 and 0 < int(answer) <= len(numbers):
                return numbers[int(answer) - 1]
            if answer:
                _write(f"{answer[:60]!r} is none of the numbers\n")

    def ask(self, question: str, default: str = "") -> str | None:
        """See `Asker`."""
        _write(f"{question}{f' [{default}]' if default else ''}: ")
        line = sys.stdin.readline()
        if not line:
            _write("\n")
            return None
        return line.strip() or default


class ArrowAsker:
    """questionary's lists and lines.

    Args:
        questionary: the module.
        session: keywords for its prompts, such as another input.
    """

    def __init__(self, questionary: Any, **session: Any) -> None:
        self._library, self._session = questionary, session

    def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
        """See `Asker`."""
        rows = [
            self._library.Separator(choice.text)
            if choice.heading
            else self._library.Choice([(_style(choice), choice.text)], value=index)
            for index, choice in enumerate(choices)
        ]
        question = self._library.select(
            title, rows, instruction="(arrow keys, Enter; q leaves)", **self._session
        )
        _let_leave(question.application)
        answer = question.unsafe_ask()
        return None if answer is None else int(answer)

    def ask(self, question: str, default: str = "") -> str | None:
        """See `Asker`."""
        shown = f"{question}{f' [{default}]' if default else ''}:"
        try:
            answer = self._library.text(shown, **self._session).unsafe_ask()
        except EOFError:
            return None
        return str(answer).strip() or default


def _let_leave(application: Any) -> None:
    """Let q and Ctrl-D end a list, which knows only Ctrl-C."""
    bindings = import_library("prompt_toolkit.key_binding", "prompt_toolkit", "the menu")
    leaving = bindings.KeyBindings()
    for key in ("q", "c-d"):
        leaving.add(key, eager=True)(lambda event: event.app.exit(result=None))
    application.key_bindings = bindings.merge_key_bindings([application.key_bindings, leaving])


def _style(choice: Choice) -> str:
    return f"fg:ansi{choice.colour}" if choice.colour else ""


def _colour(choice: Choice) -> str:
    code = _ANSI.get(choice.colour)
    if code is None or not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return choice.text
    return f"\x1b[{code}m{choice.text}\x1b[0m"


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
