"""The values of ``--filter``: published rules, their thresholds, lengths, numeric columns.

    gopher_quality                   a row of FILTERS, with its published thresholds
    gopher_quality.min_words=20      the same with one threshold changed
    min_tokens=100  max_bytes=1e6    a length: tokens, words, characters or bytes
    language_score>=0.65             a numeric column: > >= < <= == !=

Rules are applied in the order in which they are first named.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import suggest
from preflight.corpus.filtering.protocol import CountTokens, Rule, Verdict
from preflight.settings.kinds import FILTERS

Number = int | float
_UNITS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
    "bytes": lambda text: len(text.encode("utf-8", "surrogatepass")),
}
LENGTHS = tuple(f"{side}_{unit}" for unit in ("tokens", *_UNITS) for side in ("min", "max"))
_COMPARISONS: dict[str, Callable[[Number, Number], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_EXPRESSION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|=|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class PublishedRule:
    """A row of ``FILTERS``, and the thresholds that differ from its own."""

    name: str
    thresholds: Mapping[str, Any]

    def __call__(self, text: str, columns: Mapping[str, Any], count_tokens: CountTokens) -> Verdict:
        """Judge by the text alone."""
        verdict: Verdict = _load_judge(self.name)(text, **self.thresholds)
        if verdict.reason:
            return Verdict(verdict.text, f"{self.name}: {verdict.reason}")
        return verdict


@cache
def _load_judge(name: str) -> Callable[..., Verdict]:
    return FILTERS.load(name)


@dataclass(frozen=True)
class LengthRule:
    """``min_UNIT=N`` or ``max_UNIT=N``; both ends are kept."""

    name: str
    limit: int

    def __call__(self, text: str, columns: Mapping[str, Any], count_tokens: CountTokens) -> Verdict:
        """Judge by the length."""
        side, _, unit = self.name.partition("_")
        length = count_tokens(text) if unit == "tokens" else _UNITS[unit](text)
        is_kept = length >= self.limit if side == "min" else length <= self.limit
        return Verdict(text, "" if is_kept else f"{self.name}={self.limit}")


@dataclass(frozen=True)
class ColumnRule:
    """``COLUMN>=NUMBER``. A row without the number is dropped, and counted apart."""

    column: str
    comparison: str
    limit: Number

    def __call__(self, text: str, columns: Mapping[str, Any], count_tokens: CountTokens) -> Verdict:
        """Judge by the column."""
        value = read_number(columns.get(self.column))
        if value is None:
            return Verdict(text, f"{self.column}: missing")
        is_kept = _COMPARISONS[self.comparison](value, self.limit)
        return Verdict(text, "" if is_kept else f"{self.column}{self.comparison}{self.limit}")


def judge(
    rules: Sequence[Rule], text: str, columns: Mapping[str, Any], count_tokens: CountTokens
) -> Verdict:
    """Apply the rules in turn, each to the text that the one before it left.

    The first reason to drop the document ends it.
    """
    verdict = Verdict(text)
    for rule in rules:
        verdict = rule(verdict.text, columns, count_tokens)
        if verdict.reason:
            break
    return verdict


def build_rules(expressions: Sequence[str]) -> list[Rule]:
    """The rules that the values of ``--filter`` name. They can be pickled.

    Raises:
        PreflightError: code FLAGS, with the nearest name.
    """
    rules: dict[str, Rule] = {}  # by what makes them one: a published rule is named more than once
    for expression in expressions:
        if expression in FILTERS.names():
            rules.setdefault(expression, PublishedRule(expression, {}))
            continue
        match = _EXPRESSION.fullmatch(expression)
        if match is None:
            raise _unknown_error(expression, expression)
        name, sign, value = match.groups()
        base, _, parameter = name.partition(".")
        if sign == "=" and base in FILTERS.names():
            known = rules.get(base)
            before = known.thresholds if isinstance(known, PublishedRule) else {}
            rules[base] = _change_threshold(expression, base, parameter, value, before)
        elif sign == "=" or name in LENGTHS:
            rules[expression] = _build_length(expression, name, sign, value)
        else:
            rules[expression] = _build_column(expression, name, sign, value)
    return list(rules.values())


def list_columns(expressions: Sequence[str]) -> tuple[str, ...]:
    """The columns that these rules compare, each once, in order.

    Raises:
        PreflightError: as `build_rules`.
    """
    rules = build_rules(expressions)
    return tuple(dict.fromkeys(rule.column for rule in rules if isinstance(rule, ColumnRule)))


def list_thresholds(name: str) -> dict[str, Any]:
    """The thresholds of a published rule and their values, by the signature of its function."""
    parameters = inspect.signature(_load_judge(name)).parameters.values()
    return {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}


def _change_threshold(
    expression: str, name: str, parameter: str, value: str, before: Mapping[str, Any]
) -> PublishedRule:
    """The rule called `name` with one more threshold of the user's."""
    defaults = list_thresholds(name)
    if parameter not in defaults:
        found = f"{name} has no threshold {parameter!r}{suggest(parameter, defaults)}"
        raise _error(expression, found, f"it has {', '.join(defaults)}")
    if parameter in before:
        raise _error(expression, f"{name}.{parameter} is given twice", "give it once")
    default = defaults[parameter]
    number = read_number(value)
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise _error(expression, f"{value[:40]!r} is neither true nor false")
        return PublishedRule(name, {**before, parameter: value == "true"})
    if number is None or number < 0:
        raise _error(expression, f"{value[:40]!r} is no number from 0 on")
    if isinstance(default, int):
        if number != int(number):
            raise _error(expression, f"{value[:40]!r} is no whole number")
        number = int(number)
    return PublishedRule(name, {**before, parameter: number})


def _build_length(expression: str, name: str, sign: str, value: str) -> LengthRule:
    if name not in LENGTHS:
        raise _unknown_error(expression, name)
    number = read_number(value)
    if sign != "=" or number is None or number < 0 or number != int(number):
        raise _error(expression, f"{name} takes = and a whole number", f"{name}=100")
    return LengthRule(name, int(number))


def _build_column(expression: str, name: str, sign: str, value: str) -> ColumnRule:
    number = read_number(value)
    if number is None:
        raise _error(expression, f"{value[:40]!r} is no number", f"{name[:40]}{sign}0.5")
    return ColumnRule(name, sign, number)


def read_number(value: Any) -> Number | None:
    """The number in a table's cell, which may be written as text; None where there is none.

    NaN is none. Infinity is none either: no score is infinite.
    """
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, int):  # exact, whatever its size
        return int(value)
    if not isinstance(value, (float, Decimal, np.integer, np.floating, np.bool_)):
        return None
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(value) if isinstance(value, np.integer) else number


def _unknown_error(expression: str, name: str) -> PreflightError:
    known = [*FILTERS.names(), *LENGTHS]
    return _error(
        expression,
        f"{name[:60]!r} is unknown{suggest(name, known)}",
        f"rules: {', '.join(FILTERS.names())}; lengths: {', '.join(LENGTHS)}",
        "a column is compared by > >= < <= == !=, such as language_score>=0.65",
    )


def _error(expression: str, what: str, *more: str) -> PreflightError:
    return PreflightError(ExitCode.FLAGS, f"--filter {expression[:80]}: {what}", *more)
