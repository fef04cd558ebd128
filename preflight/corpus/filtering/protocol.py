"""What a filter is: a function of a document that keeps it, changes it or says why it is dropped.

A new published rule is one function and one row of ``FILTERS``. The function takes the text, and
its thresholds as keyword-only arguments with defaults; those are what ``--filter
NAME.PARAMETER=VALUE`` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule finds.

    Attributes:
        text: the document, as it goes on; some rules leave lines out.
        reason: why it is dropped; empty where it is kept. The part before the colon is the rule,
            so that drops can be counted.
    """

    text: str
    reason: str = ""


# The number of tokens of a text. Asked for only by rules that need it.
CountTokens = Callable[[str], int]


class Rule(Protocol):
    """One filter with its thresholds. It can be pickled."""

    def __call__(self, text: str, columns: Mapping[str, Any], count_tokens: CountTokens) -> Verdict:
        """Judge one document; `columns` are those of its row."""
        ...
