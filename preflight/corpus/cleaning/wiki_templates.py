"""The few templates that are words of a sentence. All others are left out."""

# ruff: noqa: RUF001
from __future__ import annotations

import re
from collections.abc import Callable

from preflight.corpus.cleaning.wiki_names import SHOWN_ARGUMENT, SHOWN_TEXT

_NUMBER = re.compile(r"[-+−]?[\d.,/ ]*\d")
_RANGE_WORDS = {
    **{"to": " to ", "and": " and ", "or": " or ", "x": " × ", "by": " by ", "-": "–", "–": "–"},
    **{"×": " × ", "to(-)": " to "},
}
_NAMED = re.compile(r"\s*[\w\- ]+\s*=")
_MAX_NAME = 60


def expand_template(name: str, get_arguments: Callable[[], list[str]]) -> str:
    """What a template shows, where it is part of a sentence; else nothing.

    Args:
        name: as it is written, before the first bar.
        get_arguments: all arguments in order; asked for only where they are shown.
    """
    if len(name) > _MAX_NAME:
        return ""
    name = " ".join(name.replace("_", " ").split()).lower()
    if name in SHOWN_TEXT:
        return SHOWN_TEXT[name] + (
            _pick(get_arguments(), 1) if name in ("circa", "c.", "ca.") else ""
        )
    if name in SHOWN_ARGUMENT:
        return _pick(get_arguments(), SHOWN_ARGUMENT[name])
    if name.startswith("lang-"):
        return _pick(get_arguments(), 1)
    if name in ("convert", "cvt"):
        return _convert(_list_unnamed(get_arguments()))
    if name in ("frac", "fraction", "sfrac"):
        return "/".join(_list_unnamed(get_arguments()))
    if name == "as of":
        return " ".join(("As of", *reversed(_list_unnamed(get_arguments()))))
    if name == "val":
        return _pick(get_arguments(), 1)
    if name in ("harvtxt", "harvcoltxt"):
        *authors, year = _list_unnamed(get_arguments()) or [""]
        return f"{' & '.join(authors)} ({year})" if authors else ""
    if name.startswith("formatnum:"):
        return name.removeprefix("formatnum:")
    return ""


def _list_unnamed(arguments: list[str]) -> list[str]:
    """The unnamed arguments; ``1=`` is a spelling of one."""
    unnamed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.strip().isdigit():
            unnamed.append(value.strip())
        elif not (equals and _NAMED.match(argument)):
            unnamed.append(argument.strip())
    return unnamed


def _pick(arguments: list[str], place: int) -> str:
    unnamed = _list_unnamed(arguments)
    if place < 0:
        return unnamed[-1] if unnamed else ""
    return unnamed[place - 1] if place <= len(unnamed) else ""


def _convert(values: list[str]) -> str:
    """``5|km`` is "5 km", ``5|to|10|km`` is "5 to 10 km"; the unit is as the template spells it."""
    shown = ""
    for value in values:
        if _NUMBER.fullmatch(value):
            shown += value
        elif value.lower() in _RANGE_WORDS:
            shown += _RANGE_WORDS[value.lower()]
        else:
            return f"{shown} {value}" if shown else ""
    return shown
