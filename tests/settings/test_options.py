"""How a setting is declared and checked, on a class of its own."""

from dataclasses import dataclass

import pytest

from preflight.core.registry import Registry
from preflight.settings.options import check_fields, check_unicode, list_options, setting

FRUIT: Registry[str] = Registry("--fruit", {"apple": "no.such.module:APPLE"})


@dataclass(frozen=True)
class Basket:
    """A settings class."""

    size: int = setting(3, "how many", ge=1, le=10)
    weights: tuple[float, ...] = setting((), "each in kg", gt=0)
    fruit: str = setting("apple", "which", choices=FRUIT)
    label: str | None = setting(None, "what is on it")
    word: str | None = setting(None, "said", check=check_unicode)
    is_full: bool | None = setting(None, "whether")
    internal: int = setting(1, ge=0)
    plain: int = 5


def test_fields_with_help_are_options() -> None:
    options = list(list_options("basket", Basket))
    assert [(o.flag, o.kind, o.many) for o in options] == [
        ("--size", int, False),
        ("--weights", float, True),
        ("--fruit", str, False),
        ("--label", str, False),
        ("--word", str, False),
        ("--is-full", bool, False),
    ]


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("size", "4", 4),
        ("size", 4, 4),
        ("weights", ["1e-3", 2, ".5"], (0.001, 2.0, 0.5)),
        ("weights", "2", (2.0,)),
        ("fruit", "apple", "apple"),
        ("label", None, None),
        ("label", "\udcff.txt", "\udcff.txt"),  # a file name that is not UTF-8
        ("is_full", False, False),
    ],
)
def test_text_and_json_values_are_read(name: str, raw: object, value: object) -> None:
    option = {o.name: o for o in list_options("basket", Basket)}[name]
    assert option.read(raw) == value
    assert type(option.read(raw)) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("size", "0", "--size must be at least 1, got 0"),
        ("size", 11, "--size must be at most 10, got 11"),
        ("size", "2.0", "--size takes a whole number, got '2.0'"),
        ("size", 2.0, "--size takes a whole number, got 2.0"),
        ("size", True, "--size takes a whole number, got True"),
        ("size", None, "--size takes a whole number, got None"),
        ("size", "9" * 5000, f"--size takes a whole number, got '{'9' * 59}"),
        ("weights", [1, "0"], "--weights must be more than 0, got 0.0"),
        ("weights", [True], "--weights takes a number, got True"),
        ("weights", ["inf"], "--weights takes a finite number, got inf"),
        ("fruit", "aple", "--fruit 'aple' is unknown (did you mean apple?): choose one of apple"),
        ("fruit", 3, "--fruit takes text, got 3"),
        ("label", "", "--label must not be empty or contain a NUL character, got ''"),
        ("label", "a\0", "--label must not be empty or contain a NUL character, got 'a\\x00'"),
        ("label", "\ud800", "--label must not contain half a surrogate pair, got '\\ud800'"),
        ("word", "\udcff", "--word must be UTF-8 text, got '\\udcff'"),
        ("word", "a\0", "--word must not be empty or contain a NUL character, got 'a\\x00'"),
        ("label", ["a"], "--label takes text, got ['a']"),
        ("is_full", "yes", "--is-full takes true or false, got 'yes'"),
        ("is_full", "true", "--is-full takes true or false, got 'true'"),
        ("is_full", 1, "--is-full takes true or false, got 1"),
    ],
)
def test_a_fault_names_flag_value_and_what_is_allowed(name: str, raw: object, message: str) -> None:
    option = {o.name: o for o in list_options("basket", Basket)}[name]
    with pytest.raises(ValueError) as caught:
        option.read(raw)
    assert str(caught.value) == message


def test_a_name_registered_later_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FRUIT, "_targets", {"apple": "no.such.module:APPLE"})
    FRUIT.register("pear", "PEAR")
    option = next(o for o in list_options("basket", Basket) if o.name == "fruit")
    assert option.metadata["choices"] == ("apple", "pear")
    assert option.read("pear") == "pear"


def test_all_fields_of_an_object_are_checked_together() -> None:
    with pytest.raises(ValueError) as caught:
        check_fields(Bin(size=0, share=2.0))
    assert str(caught.value) == "size must be at least 1, got 0; share must be at most 1, got 2.0"
    check_fields(Bin(size=1, share=1.0))


@dataclass(frozen=True)
class Bin:
    """A class that is checked as a whole."""

    size: int = setting(ge=1)
    share: float = setting(0.5, le=1)
