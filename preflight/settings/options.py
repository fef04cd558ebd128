"""How a setting is declared, and how a raw value is checked against its declaration.

A field of a settings class is a flag: ``n_layers`` is ``--n-layers``. Its type, default, bounds,
choices and help text are written once, in the class; the command line, the ``--config`` file and
the table of flags in the documentation are made from them. Settings classes are read at run time,
so their modules have no ``from __future__ import annotations``.

pydantic checks the values. It is imported with the first value: ``--help`` has none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from preflight.core.registry import Registry, describe_unknown

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

MAX_COUNT = 2**31 - 1
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
# By the type of pydantic's error; the braces hold limits, or the error of a `check`.
_FAULTS = {
    "greater_than_equal": "must be at least {ge:,}",
    "less_than_equal": "must be at most {le:,}",
    "greater_than": "must be more than {gt:,}",
    "less_than": "must be less than {lt:,}",
    "finite_number": "takes a finite number",
    "value_error": "{error}",
}


def _check_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty or contain a NUL character")
    return value


def _check_characters(value: str) -> str:
    """For every text, whatever its own `check` is: the system can be asked for such a name."""
    if "\0" in value:
        raise ValueError("must not be empty or contain a NUL character")
    try:
        value.encode("utf-8", "surrogateescape")  # bytes of a file name that are not UTF-8 pass
    except UnicodeEncodeError:
        raise ValueError("must not contain half a surrogate pair") from None
    return value


def check_unicode(value: str) -> str:
    """For `setting`: a text that can be part of a UTF-8 file."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return value


def setting(
    default: Any = MISSING,
    help_text: str = "",
    *,
    choices: tuple[str, ...] | Registry[Any] = (),
    check: Callable[[str], str] = _check_text,
    metavar: str | None = None,
    alone: str | None = None,
    flag: str | None = None,
    **limits: float,
) -> Any:
    """A dataclass field whose value can be checked.

    Args:
        default: ``None`` means unset: the value is chosen when the work is known.
        help_text: what ``--help`` says; without it the field is no flag.
        choices: names of which the value must be one; those of a registry are read when needed.
        check: returns a valid text, and raises ValueError with what is allowed for another.
        metavar: the value's name in ``--help``.
        alone: the value of a flag without one; unset: there must be one.
        flag: how the flag is spelled; unset: as the field, whose name cannot be Python's `from`.
        limits: ``ge``, ``le``, ``gt`` and ``lt``, as `pydantic.Field` takes them.
    """
    words = {"help": help_text, "choices": choices, "metavar": metavar, "alone": alone}
    rules = {"check": check, "limits": limits, "flag": flag}
    return field(default=default, metadata=words | rules)


@dataclass(frozen=True)
class Option:
    """One flag: the group and field it belongs to, and what it takes.

    Attributes:
        kind: bool, int, float or str; of one item, where the flag takes several (``many``).
        metadata: as declared with `setting`; ``choices`` are names.
    """

    group: str
    name: str
    kind: type
    many: bool
    default: Any
    metadata: dict[str, Any]

    @property
    def flag(self) -> str:
        """How the option is spelled on the command line."""
        return self.metadata["flag"] or "--" + self.name.replace("_", "-")

    def spell(self, value: Any) -> list[str]:
        """The words that set it to `value` on the command line."""
        if self.kind is bool:
            return [self.flag if value else self.flag.replace("--", "--no-", 1)]
        items = [str(item) for item in (value if self.many else [value])]
        if any(item.startswith("-") and item != "-" for item in items):
            return [f"{self.flag}={item}" for item in items]  # else argparse takes them for flags
        return [self.flag, *items]

    def read(self, raw: Any) -> Any:
        """Text from the command line or a JSON value, as the option's type.

        Raises:
            ValueError: naming the flag, the value given and what is allowed.
        """
        if self.many:
            items = raw if isinstance(raw, (list, tuple)) else [raw]
            return tuple(self._read_item(item) for item in items)
        return None if raw is self.default is None else self._read_item(raw)

    def _read_item(self, raw: Any) -> Any:
        if isinstance(raw, str) and self.kind in (int, float):
            with contextlib.suppress(ValueError):  # a text that spells no number is refused below
                raw = self.kind(raw)
        return _check_value(self.flag, self.kind, self.metadata, raw)


def list_options(group: str, settings: type) -> Iterator[Option]:
    """The flags of a settings class, in the order of its fields."""
    for item in fields(settings):
        if item.metadata.get("help"):
            kind, many = _split_type(item.type)
            yield Option(group, item.name, kind, many, item.default, _resolve_choices(item))


def check_fields(instance: Any) -> None:
    """Check the declared fields of a dataclass object that did not come from flags.

    Raises:
        ValueError: naming every field at fault.
    """
    faults = []
    for item in fields(instance):
        if getattr(instance, item.name) is item.default is None:
            continue
        try:
            kind, _ = _split_type(item.type)
            _check_value(item.name, kind, _resolve_choices(item), getattr(instance, item.name))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))


def _split_type(declared: Any) -> tuple[type, bool]:
    """``int | None`` is (int, False), ``tuple[str, ...]`` is (str, True)."""
    kind = next(part for part in get_args(declared) or (declared,) if part in _KINDS)
    return kind, get_origin(declared) is tuple


def _resolve_choices(item: Any) -> dict[str, Any]:
    """A field's metadata, with names for choices: a registry may have grown since."""
    choices = item.metadata["choices"]
    names = choices.names() if isinstance(choices, Registry) else choices
    return {**item.metadata, "choices": names}


def _check_value(name: str, kind: type, metadata: dict[str, Any], raw: Any) -> Any:
    """`raw`, if it is a `kind` within its limits; ValueError says what is allowed instead."""
    from pydantic import ValidationError

    limits = frozenset(metadata["limits"].items())
    adapter = _build_adapter(kind, metadata["choices"], metadata["check"], limits)
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise ValueError(_describe_fault(name, kind, metadata, raw, error)) from None


@functools.cache
def _build_adapter(
    kind: type,
    choices: tuple[str, ...],
    check: Callable[[str], str],
    limits: frozenset[tuple[str, float]],
) -> TypeAdapter[Any]:
    """Strict: 2.0 is no count, true is no number, "yes" is no boolean."""
    from pydantic import AfterValidator, Field, TypeAdapter

    declared: Any = Literal[choices]
    if not choices:
        rules: dict[str, Any] = dict(limits)
        if kind is float:
            rules["allow_inf_nan"] = False
        declared = Annotated[kind, Field(strict=True, **rules)]
        if kind is str:
            declared = Annotated[declared, AfterValidator(_check_characters), AfterValidator(check)]
    return TypeAdapter(declared)


def _describe_fault(
    name: str, kind: type, metadata: dict[str, Any], raw: Any, error: ValidationError
) -> str:
    """``--dropout must be less than 1, got 2.0``."""
    fault = error.errors(include_url=False)[0]
    if metadata["choices"] and isinstance(raw, str):
        return describe_unknown(name, raw, metadata["choices"])
    words = _FAULTS.get(fault["type"], f"takes {_KINDS[kind]}")
    values = {**fault.get("ctx", {}), **metadata["limits"]}
    return f"{name} {words.format(**values)}, got {repr(raw)[:60]}"
