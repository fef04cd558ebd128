"""What ``--filter`` takes, and what it says to everything else."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.filtering.expressions import (
    build_rules,
    judge,
    list_columns,
    list_thresholds,
    read_number,
)
from preflight.corpus.filtering.protocol import Verdict
from preflight.settings.kinds import FILTERS

PROSE = "The sea is to the west of the town, and the wind that blows there is cold."


def find_reason(expressions: list[str], text: str = PROSE, **columns: Any) -> str:
    return judge(build_rules(expressions), text, columns, lambda text: len(text.split()) * 2).reason


@pytest.mark.parametrize(
    ("expression", "below", "at", "above"),
    [
        ("score>=0.65", False, True, True),
        ("score>0.65", False, False, True),
        ("score<=0.65", True, True, False),
        ("score<0.65", True, False, False),
        ("score==0.65", False, True, False),
        ("score!=0.65", True, False, True),
        ("  score >= 0.65 ", False, True, True),
    ],
)
def test_a_column_is_compared(expression: str, below: bool, at: bool, above: bool) -> None:
    kept = [not find_reason([expression], score=value) for value in (0.64, 0.65, 0.66)]
    assert kept == [below, at, above]


def test_the_reason_names_the_comparison() -> None:
    assert find_reason(["language_score>=0.65"], language_score=0.1) == "language_score>=0.65"


@pytest.mark.parametrize("value", [None, "", "high", float("nan"), float("inf"), "nan", [1], {}])
def test_a_row_without_the_number_is_dropped_as_missing(value: Any) -> None:
    assert find_reason(["score!=3"], score=value) == "score: missing"
    assert find_reason(["score!=3"]) == "score: missing"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (True, 1),
        ("0.5", 0.5),
        (" 7 ", 7),
        (np.float32(0.5), 0.5),
        (np.int64(2**62 + 1), 2**62 + 1),
        (str(2**62 + 1), 2**62 + 1),
        (np.bool_(True), 1),
        (Decimal("0.25"), 0.25),
    ],
)
def test_numbers_of_tables_are_read(value: Any, number: float) -> None:
    assert read_number(value) == number
    assert find_reason([f"c=={number}"], c=value) == ""


@pytest.mark.parametrize(
    ("name", "length"),
    [("words", 3), ("characters", 12), ("bytes", 17), ("tokens", 6)],
)
def test_a_length_is_kept_at_both_limits(name: str, length: int) -> None:
    text = "añ bcä dé…fg"
    assert not find_reason([f"min_{name}={length}", f"max_{name}={length}"], text)
    assert find_reason([f"min_{name}={length + 1}"], text) == f"min_{name}={length + 1}"
    assert find_reason([f"max_{name}={length - 1}"], text) == f"max_{name}={length - 1}"


def test_tokens_are_counted_only_when_asked_for_and_of_the_changed_text() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return 100

    line = "This line is a sentence of some words. And so is this."
    text = f"menu\n{line}\n{line}\n{line}"
    judge(build_rules(["c4", "fineweb.max_duplicate_line_characters=1"]), text, {}, count)
    assert counted == []
    verdict = judge(build_rules(["c4", "min_tokens=5"]), text, {}, count)
    assert counted == [verdict.text] == [f"{line}\n{line}\n{line}"]


def test_the_first_reason_wins_in_the_given_order() -> None:
    assert find_reason(["min_words=1000", "gopher_quality"]) == "min_words=1000"
    assert find_reason(["gopher_quality", "min_words=1000"]) == "gopher_quality: too few words"


def test_a_threshold_is_changed_once_and_keeps_the_place_of_its_rule() -> None:
    changed = ["gopher_quality.min_words=5", "gopher_quality.min_stop_words=0", "min_words=99"]
    assert len(build_rules(changed)) == 2
    assert find_reason(changed) == "min_words=99"
    assert find_reason(["gopher_quality", "gopher_quality.min_words=5"]) == ""
    assert find_reason(["gopher_quality.min_words=5", "gopher_quality"]) == ""
    rules = build_rules(["gopher_quality", "min_words=99", "gopher_quality.min_words=6"])
    assert [getattr(rule, "name", "") for rule in rules] == ["gopher_quality", "min_words"]


@pytest.mark.parametrize("name", FILTERS.names())
def test_every_threshold_of_every_rule_can_be_given(name: str) -> None:
    thresholds = list_thresholds(name)
    assert thresholds
    for parameter, default in thresholds.items():
        value = str(default).lower()
        rule = build_rules([f"{name}.{parameter}={value}"])[0]
        given = rule.thresholds[parameter]  # type: ignore[attr-defined]
        assert given == default
        assert type(given) is type(default) or isinstance(default, float)
        assert rule(PROSE, {}, len) == build_rules([name])[0](PROSE, {}, len)


def test_rules_can_be_pickled() -> None:
    expressions = [*FILTERS.names(), "c4.remove_citations=false", "min_tokens=3", "score>1"]
    for rule in build_rules(expressions):
        again = pickle.loads(pickle.dumps(rule))
        assert again == rule
        assert again(PROSE, {"score": 0}, len) == rule(PROSE, {"score": 0}, len)


def judge_vowels(text: str, *, min_vowels: int = 2) -> Verdict:
    return Verdict(text, "" if sum(map(text.count, "aeiou")) >= min_vowels else "too few vowels")


def test_a_new_rule_is_one_function_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILTERS._targets, "vowels", f"{__name__}:judge_vowels")
    assert find_reason(["vowels"], "xyz") == "vowels: too few vowels"
    assert find_reason(["vowels.min_vowels=0"], "xyz") == ""


def test_columns_are_listed_once_in_order() -> None:
    given = ["b>1", "c4", "min_words=3", "a.x<2", "b<9", "gopher_quality.min_words=3"]
    assert list_columns(given) == ("b", "a.x")
    assert list_columns([]) == ()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("gopher_qualty", "did you mean gopher_quality?"),
        ("min_tokns=100", "did you mean min_tokens?"),
        ("score=3", "a column is compared by"),
        ("", "unknown"),
        (">=3", "unknown"),
        ("gopher_quality.min_word=3", "did you mean min_words?"),
        ("gopher_quality=3", "it has min_words, max_words"),
        ("gopher_quality.min_words=many", "no number"),
        ("gopher_quality.min_words=2.5", "no whole number"),
        ("gopher_quality.min_words=-1", "no number from 0"),
        ("c4.remove_citations=1", "neither true nor false"),
        ("min_tokens=1.5", "a whole number"),
        ("min_tokens>=5", "takes ="),
        ("min_tokens=", "a whole number"),
        ("score>=high", "no number"),
        ("score>=nan", "no number"),
        ("score>=", "no number"),
    ],
)
def test_a_mistake_is_told_with_what_there_is(expression: str, words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        build_rules(["c4", expression])
    assert caught.value.code == ExitCode.FLAGS
    message = "\n".join(caught.value.lines)
    assert f"--filter {expression}" in message
    assert words in message


def test_a_threshold_given_twice_is_refused() -> None:
    with pytest.raises(PreflightError, match="given twice"):
        build_rules(["c4.min_sentences=3", "c4.min_sentences=4"])
