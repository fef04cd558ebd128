"""Files of tasks: what their fields say the items are, and every fault by file and line.

What a model reads follows the rules of lm-evaluation-harness, so that its figures are ours. Each
line is a JSON object. A text file (.txt) is WikiText, whose pages begin with a heading.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.core.storage import DISK_ERRNOS, storage_error
from preflight.core.strict_json import parse_json
from preflight.corpus.sources.protocol import text_error
from preflight.evaluation.items import Item, Task, TaskKind
from preflight.evaluation.wikitext import build_page, split_pages

# In a folder; a text beside the tasks is not WikiText unless it is called so.
_TASK_NAME = re.compile(r"[^.].*\.jsonl|wiki.*\.txt", re.IGNORECASE)
_QUESTIONS = ("question", "context", "query")
_CHOICES = ("choices", "endings", "options")
_LABELS = ("label", "answer", "gold", "answerKey")
_ADVICE = (
    "a line is an object with ctx_a, ctx_b, endings and label (HellaSwag); text (LAMBADA); "
    "context and continuation; page (WikiText); or question, choices and answer"
)
Record = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """What lines of a kind hold.

    Attributes:
        name: for messages.
        kind: of the task.
        marks: a first line with one of these fields is of this form.
        fields: of which each line has all; of names in a tuple, one.
        build: the item of a line's object and number; ValueError says what is wrong.
    """

    name: str
    kind: TaskKind
    marks: tuple[str, ...]
    fields: tuple[str | tuple[str, ...], ...]
    build: Callable[[Record, int], Item]


def find_task_files(files: Sequence[str], folder: str | None) -> list[Path]:
    """The files that are named, then those of a folder in the order of their names, each once.

    Raises:
        PreflightError: code TEXT, for a folder without any.
    """
    found = [Path(name) for name in files]
    if folder is not None:
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise text_error(folder, error.strerror or str(error), "check --tasks-dir") from None
        inside = [Path(folder, name) for name in names if _TASK_NAME.fullmatch(name)]
        if not inside:
            raise text_error(folder, "no .jsonl or wiki*.txt file in it", _ADVICE)
        found += inside
    return list({path.absolute(): path for path in found}.values())


def read_tasks(paths: Sequence[Path]) -> list[tuple[Task, str]]:
    """The tasks in these files, under names of their own, each with what it was taken for.

    Raises:
        PreflightError: as `read_task`.
    """
    found, names = [], set[str]()
    for path in paths:
        task, form = read_task(path)
        name = next(n for n in _list_names(path) if n not in names)
        names.add(name)
        found.append((Task(name, task.kind, task.source, task.items), form))
    return found


def _list_names(path: Path) -> Iterator[str]:
    yield path.stem
    yield from (f"{path.stem}-{number}" for number in range(2, 1_000_000))


def read_task(path: Path) -> tuple[Task, str]:
    """The task in a file, and what its lines were taken for: ``HellaSwag``, for example.

    Raises:
        PreflightError: code TEXT, naming the file, the line and the field at fault.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".txt":
                text = _decode(path, file.read(), 0)
                items = [build_page(p, n) for n, p in split_pages(text.splitlines(keepends=True))]
                if not items:
                    raise text_error(path, "there is no item in it", _ADVICE)
                return Task(path.stem, "pages", str(path), tuple(items)), "WikiText pages"
            lines = ((n, _parse_line(path, line, n)) for n, line in enumerate(file, 1))
            return build_task(path, path.stem, lines)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise storage_error(path, error) from None
        raise text_error(path, error.strerror or str(error), "check the name") from None


def build_task(
    place: Path | str, name: str, records: Iterable[tuple[int, Record | None]]
) -> tuple[Task, str]:
    """The task of records (number from 1, fields; None: nothing), and what it was taken for.

    Raises:
        PreflightError: code TEXT, naming the place, the record and the field at fault.
    """
    form, items = None, []
    for number, record in records:
        if record is None:
            continue
        form = form or _recognise(place, record, number)
        items.append(_build_item(place, form, record, number))
    if form is None:
        raise text_error(place, "there is no item in it", _ADVICE)
    return Task(name, form.kind, str(place), tuple(items)), form.name


def _decode(path: Path, raw: bytes, line: int) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        where = f"line {line}: " if line else ""
        raise text_error(path, f"{where}not UTF-8 at byte {error.start}", _ADVICE) from None


def _parse_line(path: Path, line: bytes, number: int) -> Record | None:
    """The object of a line; None for an empty one."""
    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    if not line.strip():
        return None
    try:
        record = parse_json(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise text_error(path, f"line {number}: {error}", _ADVICE) from None
    return record


def _recognise(path: Path | str, record: Record, number: int) -> _Form:
    """The form of a file by its first line's fields."""
    for form in _FORMS:
        if _find_field(record, form.marks) is not None:
            return form
    held = ", ".join(repr(name)[:40] for name in list(record)[:8]) or "no field"
    raise text_error(path, f"line {number}: no known kind of item has {held}", _ADVICE)


def _build_item(path: Path | str, form: _Form, record: Record, number: int) -> Item:
    try:
        for names in form.fields:
            if _find_field(record, names) is None:
                named = names if isinstance(names, str) else " or ".join(names)
                raise ValueError(f"no field {named}")
        return form.build(record, number)
    except ValueError as error:
        told = f"line {number} ({form.name}): {error}"
        raise text_error(path, told, "mend the line, or remove it") from None


# ---- fields -------------------------------------------------------------------------------------


def _find_field(record: Record, names: str | tuple[str, ...]) -> str | None:
    """The name that the object has."""
    return next((n for n in ([names] if isinstance(names, str) else names) if n in record), None)


def _get(record: Record, names: str | tuple[str, ...]) -> tuple[str, Any]:
    name = _find_field(record, names)
    assert name is not None  # `_build_item` has looked
    return name, record[name]


def _get_text(record: Record, names: str | tuple[str, ...]) -> str:
    name, value = _get(record, names)
    return _check_text(name, value)


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {name} is not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"field {name} has half a surrogate pair")
    return value


def _get_choices(record: Record, clean: Callable[[str], str]) -> tuple[str, ...]:
    """The choices, at least two, none of them empty."""
    name, value = _get(record, _CHOICES)
    if isinstance(value, dict):  # as ARC has them: {"text": [...], "label": [...]}
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"field {name} is not a list of at least two texts")
    choices = [clean(_check_text(f"{name}[{i}]", text)) for i, text in enumerate(value)]
    for i, text in enumerate(choices):
        if not text.strip():
            raise ValueError(f"{name}[{i}] is empty")
    return tuple(choices)


def _get_label(record: Record, choices: tuple[str, ...]) -> int:
    """The index of the right choice, which is given as index, letter or text."""
    name, value = _get(record, _LABELS)
    keys = record.get("choices")
    listed = keys.get("label") if isinstance(keys, dict) else None
    if isinstance(listed, list) and value in listed[: len(choices)]:
        return listed.index(value)
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            value = int(value)
        elif re.fullmatch(r"[A-Za-z]", value):
            value = ord(value.upper()) - ord("A")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"field {name}: {str(value)[:40]!r} is no index, letter or text of a choice"
        )
    if not 0 <= value < len(choices):
        raise ValueError(f"field {name}: {value} is out of range, 0 to {len(choices) - 1}")
    return value


# ---- items --------------------------------------------------------------------------------------


def clean_hellaswag(text: str) -> str:
    """HellaSwag's text without what WikiHow's pages left in it (the harness's rule)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _build_hellaswag(record: Record, line: int) -> Item:
    parts = [_get_text(record, name) for name in ("ctx_a", "ctx_b")]
    activity = record.get("activity_label")
    begin = "" if activity is None else f"{_check_text('activity_label', activity)}: "
    context = clean_hellaswag(f"{begin}{parts[0]} {parts[1].capitalize()}")
    choices = _get_choices(record, clean_hellaswag)
    label = _get_label(record, choices)
    return Item(context, tuple(f" {choice}" for choice in choices), label, line)


def _build_choices(record: Record, line: int) -> Item:
    choices = _get_choices(record, str)
    label = _get_label(record, choices)
    context = _get_text(record, _QUESTIONS)
    return Item(context, tuple(f" {choice}" for choice in choices), label, line)


def _build_lambada(record: Record, line: int) -> Item:
    context, space, word = _get_text(record, "text").rpartition(" ")
    if not space or not word:
        raise ValueError("field text has no last word after a space")
    return Item(context, (f" {word}",), 0, line)


def _build_continuation(record: Record, line: int) -> Item:
    context, continuation = (_get_text(record, name) for name in ("context", "continuation"))
    if not continuation.strip():
        raise ValueError("field continuation is empty")
    is_joined = not context or context[-1].isspace() or continuation[0].isspace()
    return Item(context, (continuation if is_joined else f" {continuation}",), 0, line)


def _build_page(record: Record, line: int) -> Item:
    page = _get_text(record, "page")
    if not page.strip():
        raise ValueError("field page is empty")
    return build_page(page, line)


# The first whose mark a line has is taken: HellaSwag's lines have endings too.
_FORMS = (
    _Form(
        "HellaSwag",
        "choices",
        ("ctx_a", "ctx_b"),
        ("ctx_a", "ctx_b", "endings", "label"),
        _build_hellaswag,
    ),
    _Form("multiple choice", "choices", _CHOICES, (_QUESTIONS, _CHOICES, _LABELS), _build_choices),
    _Form(
        "continuations",
        "last-word",
        ("continuation",),
        ("context", "continuation"),
        _build_continuation,
    ),
    _Form("WikiText pages", "pages", ("page",), ("page",), _build_page),
    _Form("LAMBADA", "last-word", ("text",), ("text",), _build_lambada),
)
