"""Names to objects, imported when they are asked for."""

from __future__ import annotations

import fractions
import sys

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import Registry, describe_unknown, suggest


def build_registry() -> Registry[object]:
    return Registry("--number", {"fraction": "fractions:Fraction", "broken": "no.such.module:X"})


def test_names_come_in_order_and_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fractions")
    registry = build_registry()
    registry.register("one", 1)
    assert registry.names() == ("fraction", "broken", "one")
    assert "fractions" not in sys.modules
    assert registry.load("fraction").__name__ == "Fraction"  # type: ignore[attr-defined]
    assert "fractions" in sys.modules


def test_an_object_is_imported_or_as_registered() -> None:
    registry = build_registry()
    assert registry.load("fraction") is fractions.Fraction
    thing = object()
    registry.register("thing", thing)
    assert registry.load("thing") is thing
    registry.register("fraction", "fractions:gcd_is_not_there")
    with pytest.raises(AttributeError):
        registry.load("fraction")
    with pytest.raises(ModuleNotFoundError):
        registry.load("broken")


def test_two_registries_of_one_table_are_apart() -> None:
    table: dict[str, object] = {"a": 1}
    first, second = Registry("--x", table), Registry("--x", table)
    first.register("b", 2)
    assert second.names() == ("a",)
    assert table == {"a": 1}


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(PreflightError) as caught:
        build_registry().load("fractoin")
    assert caught.value.code == ExitCode.FLAGS
    assert caught.value.lines == [
        "--number 'fractoin' is unknown (did you mean fraction?): choose one of fraction, broken"
    ]
    with pytest.raises(PreflightError) as caught:
        build_registry().load("x" * 500)
    assert caught.value.lines == [
        f"--number '{'x' * 60}' is unknown: choose one of fraction, broken"
    ]


def test_suggestions() -> None:
    assert suggest("--trian", ["--check", "--train"]) == " (did you mean --train?)"
    assert suggest("zzz", ["--check"]) == ""
    names = iter(["adam", "sgd"])
    assert describe_unknown("x", "adan", names).endswith(
        "(did you mean adam?): choose one of adam, sgd"
    )
