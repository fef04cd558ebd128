"""What a file of tasks is taken for, what a model reads of it, and each fault by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.tasks import find_task_files, read_task, read_tasks
from preflight.evaluation.wikitext import count_words, restore_spacing, split_pages

HELLASWAG = {
    "ctx_a": "A man sits down. [header] Ice [title] Snow.",
    "ctx_b": "he THEN",
    "endings": ["stands [step] up.", "falls  over."],
    "label": "1",
    "activity_label": "Sitting",
}


def write(folder: Path, *records: Any, name: str = "t.jsonl") -> Path:
    path = folder / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_hellaswag_is_cleaned_up_as_the_harness_does(tmp_path: Path) -> None:
    task, form = read_task(write(tmp_path, HELLASWAG))
    [item] = task.items
    assert (form, task.kind) == ("HellaSwag", "choices")
    # By hand, from the harness's rules: brackets go, then two spaces become one.
    assert item.context == "Sitting: A man sits down. Ice. Snow. He then"
    assert item.continuations == (" stands up.", " falls over.")
    assert (item.label, item.line) == (1, 1)


def test_lambada_is_cut_before_its_last_word(tmp_path: Path) -> None:
    task, form = read_task(write(tmp_path, {"text": "He said, no.  Then left"}))
    assert (form, task.kind) == ("LAMBADA", "last-word")
    assert task.items[0].context == "He said, no.  Then"
    assert task.items[0].continuations == (" left",)


@pytest.mark.parametrize(
    ("context", "continuation", "wanted"),
    [
        ("a b", "c", " c"),
        ("a b ", "c", "c"),
        ("a b", " c", " c"),
        ("a\n", "c", "c"),
        ("", "c", "c"),
    ],
)
def test_continuations_get_one_space(
    context: str, continuation: str, wanted: str, tmp_path: Path
) -> None:
    task, _ = read_task(write(tmp_path, {"context": context, "continuation": continuation}))
    assert task.items[0].context == context
    assert task.items[0].continuations == (wanted,)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"question": "q", "choices": ["x", "y", "z"], "answer": 2}, 2),
        ({"context": "q", "endings": ["x", "y"], "label": "1"}, 1),
        ({"query": "q", "options": ["x", "y", "z"], "gold": "c"}, 2),
        ({"question": "q", "choices": ["3", "1", "2"], "answer": "2"}, 2),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, 1),
        (
            {
                "question": "q",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "1",
            },
            0,
        ),
    ],
)
def test_choices_by_any_of_their_names(fields: Any, label: int, tmp_path: Path) -> None:
    task, form = read_task(write(tmp_path, fields))
    assert (form, task.kind) == ("multiple choice", "choices")
    assert task.items[0].label == label
    assert task.items[0].context == "q"
    assert all(text.startswith(" ") for text in task.items[0].continuations)


BASE = {"question": "q", "choices": ["x", "y"], "answer": 0}
FAULTS = [
    ({**BASE, "answer": 2}, "line 2 (multiple choice): field answer: 2 is out of range, 0 to 1"),
    ({**BASE, "answer": "C"}, "field answer: 2 is out of range"),
    ({**BASE, "answer": -1}, "out of range"),
    ({**BASE, "answer": True}, "no index, letter or text"),
    ({**BASE, "answer": "yes"}, "'yes' is no index"),
    ({**BASE, "choices": ["x", " "]}, "choices[1] is empty"),
    ({**BASE, "choices": ["x", 3]}, "choices[1] is not a text"),
    ({**BASE, "choices": ["x"]}, "choices is not a list of at least two"),
    ({"question": "q", "choices": ["x", "y"]}, "no field label or answer or gold"),
    ({"choices": ["x", "y"], "answer": 0}, "no field question or context or query"),
    ('{"question": ', "line 2: Expecting value"),
    ("[1]", "line 2: not a JSON object"),
    ('{"question": "\\ud800", "choices": ["x", "y"], "answer": 0}', "half a surrogate"),
]


@pytest.mark.parametrize(("record", "told"), FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_told_by_file_and_line(record: Any, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, BASE, record)
    with pytest.raises(PreflightError) as caught:
        read_task(path)
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    assert told in " ".join(caught.value.lines)
    assert "line 2" in " ".join(caught.value.lines)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"ctx_a": "a", "endings": ["x", "y"], "label": 0}, "no field ctx_b"),
        ({**HELLASWAG, "endings": ["[step]", "b"]}, "endings[0] is empty"),
        ({"text": "word"}, "no last word"),
        ({"context": "a"}, "no known kind of item has 'context'"),
        ({"context": "a", "continuation": " "}, "continuation is empty"),
        ({"page": " \n"}, "page is empty"),
    ],
)
def test_a_first_line_that_lacks_something(record: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="line 1") as caught:
        read_task(write(tmp_path, record))
    assert told in " ".join(caught.value.lines)


def test_files_without_items_or_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a \xff"}\n')
    for path, told in (
        (write(tmp_path, "", name="e.jsonl"), "no item"),
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path / "bad.jsonl", "not UTF-8"),
    ):
        with pytest.raises(PreflightError, match=told) as caught:
            read_task(path)
        assert caught.value.code == ExitCode.TEXT


def test_a_folder_gives_its_tasks_in_order_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "wiki.txt", "notes.txt", ".hidden.jsonl"):
        write(tmp_path, {"text": "a b"}, name=name)
    found = find_task_files([str(tmp_path / "b.jsonl")], str(tmp_path))
    assert [path.name for path in found] == ["b.jsonl", "a.jsonl", "wiki.txt"]
    with pytest.raises(PreflightError, match=r"no \.jsonl"):
        find_task_files([], str(tmp_path.parent / tmp_path.name / ".."))


def test_tasks_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder, {"text": "a b"}))
    assert [task.name for task, _ in read_tasks(paths)] == ["t", "t-2"]


PAGE = (
    " = Valkyria =\n \n The game 's battle , a 3 @-@ year @,@ old ( or so ) one : it "
    'cost 1 @.@ 5 \N{DEGREE SIGN} C . \n = = Play = = \n He said " go " ; N'
)


def test_a_page_is_read_with_its_spacing_and_counted_without() -> None:
    # By hand from the harness's rules, in their order.
    assert restore_spacing(PAGE) == (
        " = Valkyria =\n\nThe game's battle, a 3-year,old (or so) one: it cost 1.5 "
        '\N{DEGREE SIGN} C.\n== Play ==\nHe said "go"; N'
    ).replace(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")
    assert count_words("a  b\n c ") == 4  # the empty part behind the last space counts


def test_pages_begin_at_headings_of_the_first_level(tmp_path: Path) -> None:
    text = " \n = One = \n \n a \n = = Part = = \n b \n = Two = \n c \n"
    assert list(split_pages(text.splitlines(keepends=True))) == [
        (2, " = One = \n \n a \n = = Part = = \n b \n"),
        (7, " = Two = \n c \n"),
    ]
    (tmp_path / "w.txt").write_text(text)
    task, form = read_task(tmp_path / "w.txt")
    assert (task.kind, form, len(task.items)) == ("pages", "WikiText pages", 2)
    assert task.items[1].n_bytes == len(" = Two = \n c \n")
    assert task.items[1].n_words == 6
