"""`--evaluate`: its figures against slow scoring, and what is kept when it is cut."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.slow_scorer import score_slowly, score_tokens

from generate import load_model
from main import main
from preflight.checkpoints.store import open_checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.items import Figure
from preflight.evaluation.results import TaskResult, format_table
from preflight.evaluation.scoring import RowScorer
from preflight.evaluation.tasks import read_task
from preflight.modes import evaluate as evaluate_mode

RUN = "--model-size custom --n-layers 2 --n-heads 2 --n-embeddings 32 --context-length 32"
Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny run of a byte model, and three files of tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    before = os.getcwd()
    os.chdir(folder)
    words = "the cat sat on a mat and the dog ran to a log".split()
    lines = [" ".join(words[(i * 5 + j * 3) % len(words)] for j in range(9)) for i in range(300)]
    Path("my.txt").write_text("\n".join(lines))
    flags = f"--train --text-file my.txt {RUN} --tokenizer byte --max-steps 30 --device cpu"
    code = main([*flags.split(), "--no-mixed-precision", "--learning-rate", "0.01"])
    assert code == 0
    records: dict[str, list[Any]] = {
        "words": [{"text": line} for line in lines[:9]],
        "choices": [
            {"question": line, "choices": [lines[-i][: 3 + i], "x", "the dog"], "answer": i % 3}
            for i, line in enumerate(lines[20:27])
        ],
        "pages": [{"page": "\n".join(lines[i : i + 2 + i])} for i in range(4)],
    }
    for name, items in records.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    yield folder
    os.chdir(before)


@pytest.fixture
def evaluate(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluate]:
    """Run the mode in the folder, whose results are removed afterwards."""
    monkeypatch.chdir(place)
    tasks = ("--tasks", "words.jsonl", "choices.jsonl", "pages.jsonl")
    small = ("--evaluation-batch-tokens", "100", "--device", "cpu")
    yield lambda level, *more: main(["--evaluate", level, *tasks, *small, *more])
    storage.remove_tree(place / "training_output/evaluation")


def read_result() -> dict[str, Any]:
    [path] = Path("training_output/evaluation").glob("*.json")
    return json.loads(path.read_text())


def read_tasks() -> list[Any]:
    return read_result()["tasks"]


def find_values(task: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in task["figures"]}


def test_figures_are_those_of_slow_scoring(evaluate: Evaluate) -> None:
    assert evaluate("all") == 0
    found = {task["name"]: task for task in read_tasks()}
    assert list(found) == ["text", "words", "choices", "pages", "generated"]
    checkpoint = open_checkpoint("training_output")
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    scores = {}
    for name in ("words", "choices", "pages"):
        task = read_task(Path(f"{name}.jsonl"))[0]
        scores[name] = (
            task.items,
            score_slowly(model, tokenizer, task.kind, list(task.items)),
        )
    items, slow = scores["words"]
    mean = sum(score.log_likelihoods[0] for score in slow) / len(slow)
    values = find_values(found["words"])
    assert values["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-5)
    assert values["acc"] == sum(score.is_greedy[0] for score in slow) / len(slow)
    items, slow = scores["choices"]
    right, right_normed = 0, 0
    for item, score in zip(items, slow, strict=True):
        normed = [
            v / (len(c) - 1) for v, c in zip(score.log_likelihoods, item.continuations, strict=True)
        ]
        right += score.log_likelihoods[item.label] == max(score.log_likelihoods)
        right_normed += normed[item.label] == max(normed)
    assert find_values(found["choices"]) == {"acc": right / 7, "acc_norm": right_normed / 7}
    items, slow = scores["pages"]
    loss = -sum(score.log_likelihoods[0] for score in slow)
    values = find_values(found["pages"])
    n_words = sum(len(item.continuations[0].split()) for item in items)
    n_bytes = sum(len(item.continuations[0]) for item in items)
    assert values["word_perplexity"] == pytest.approx(math.exp(loss / n_words), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(loss / n_bytes / math.log(2), rel=1e-5)
    assert values["byte_perplexity"] == pytest.approx(math.exp(loss / n_bytes), rel=1e-5)


def test_the_validation_part_by_hand(evaluate: Evaluate) -> None:
    assert evaluate("all") == 0
    values = find_values(read_tasks()[0])
    checkpoint = open_checkpoint("training_output")
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    import numpy as np

    ids = [int(i) for f in sorted(Path("data/val").iterdir()) for i in np.load(f)]
    loss, ranks, text = 0.0, [], b""
    for first in range(0, (len(ids) - 32) // 32 * 32, 32):
        found = score_tokens(model, ids[first : first + 1], ids[first + 1 : first + 33])
        loss, ranks = loss - found[0], ranks + found[2]
        text += tokenizer.decode_bytes(ids[first + 1 : first + 33])
    assert values["loss"] == pytest.approx(loss / len(ranks), rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(loss / len(ranks)), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(loss / len(text) / math.log(2), rel=1e-5)
    for top in (1, 5, 10):
        hits = sum(rank < top for rank in ranks) / len(ranks)
        assert values[f"top{top}_acc"] == pytest.approx(hits, abs=1e-9)
    n_words = len(text.split()) - 1  # the first begins with the token that is not predicted
    assert bytes(ids[:1]).strip()
    assert text[:1].strip()
    assert values["word_perplexity"] == pytest.approx(math.exp(loss / n_words), rel=1e-4)


def test_levels_score_the_first_items(evaluate: Evaluate) -> None:
    Path("many.jsonl").write_text('{"text": "a cat sat"}\n' * 130)
    assert main("--evaluate quick --tasks many.jsonl --device cpu".split()) == 0
    task = read_tasks()[1]
    assert (task["n_items"], task["n_available"]) == (50, 130)
    storage.remove_tree(Path("training_output/evaluation"))
    assert main("--evaluate --tasks many.jsonl --device cpu".split()) == 0
    assert read_tasks()[1]["n_items"] == 100


def test_a_text_file_stands_for_the_validation_part(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.txt").write_text("the cat ran on a log")
    flags = "--evaluate all --text-file other.txt --tasks words.jsonl --json --device cpu"
    assert main(flags.split()) == 0
    [line] = capsys.readouterr().out.splitlines()
    task, _ = json.loads(line)["tasks"]
    checkpoint = open_checkpoint("training_output")
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    ids = tokenizer.encode("the cat ran on a log").tolist()
    total, _, _ = score_tokens(model, [tokenizer.end_of_text_id], ids)
    values = find_values(task)
    assert values["loss"] == pytest.approx(-total / 20, rel=1e-5)
    assert values["word_perplexity"] == pytest.approx(math.exp(-total / 6), rel=1e-4)
    assert "scores" not in task


def test_the_table_has_every_figure_with_its_interval(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("all") == 0
    shown = capsys.readouterr().out
    [text] = Path("training_output/evaluation").glob("*.txt")
    assert text.read_text() == shown
    for task in read_tasks():
        for figure in task["figures"]:
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert any(
                figure["name"] in line and f"{figure['value']:,.4f}" in line
                for line in shown.splitlines()
            )
    assert "words: 9 items are few: acc is known to ±" in shown


def count_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[int]:
    """Let the scoring of a batch fail as a kill would, at the call of this number."""
    calls = [0]
    score = RowScorer.score

    def counted(self: RowScorer, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == fail_at:
            raise KeyboardInterrupt
        return score(self, batch)

    monkeypatch.setattr(RowScorer, "score", counted)
    return calls


def test_an_evaluation_cut_anywhere_goes_on_with_equal_figures(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls = count_calls(patch, 0)
        assert evaluate("all") == 0
    unbroken, n_batches = read_tasks(), calls[0]
    assert n_batches > 10
    for cut in (1, 3, n_batches // 2, n_batches):
        storage.remove_tree(Path("training_output/evaluation"))
        with monkeypatch.context() as patch:
            count_calls(patch, cut)
            assert evaluate("all") == ExitCode.SIGINT
        assert not list(Path("training_output/evaluation").glob("*.json"))
        with monkeypatch.context() as patch:
            calls = count_calls(patch, 0)
            assert evaluate("all") == 0
        assert calls[0] == n_batches - (cut - 1)
        assert read_tasks() == unbroken
        assert not list(Path("training_output/evaluation").glob("*.journal"))


def test_a_torn_journal_counts_up_to_its_last_whole_line(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("all") == 0
    unbroken = read_tasks()
    for share in (0.0, 0.3, 0.9):
        storage.remove_tree(Path("training_output/evaluation"))
        with monkeypatch.context() as patch:
            count_calls(patch, 5)
            assert evaluate("all") == ExitCode.SIGINT
        [journal] = Path("training_output/evaluation").glob("*-text-*.journal")
        content = journal.read_bytes()
        journal.write_bytes(content[: int(len(content) * share)])
        assert evaluate("all") == 0
        assert read_tasks() == unbroken


def test_a_journal_goes_on_in_the_batches_that_it_was_begun_with(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures would differ in their last digits otherwise: sums depend on the shapes."""
    monkeypatch.setattr(evaluate_mode, "load_own_tasks", list)  # the text alone
    flags = "--evaluate all --device cpu --evaluation-batch-tokens".split()
    with monkeypatch.context() as patch:
        calls = count_calls(patch, 0)
        assert main([*flags, "100"]) == 0
    n_batches = calls[0]
    storage.remove_tree(Path("training_output/evaluation"))
    with monkeypatch.context() as patch:
        count_calls(patch, 2)
        assert main([*flags, "100"]) == ExitCode.SIGINT
    with monkeypatch.context() as patch:
        calls = count_calls(patch, 0)
        assert main([*flags, "5000"]) == 0
    assert calls[0] == n_batches - 1 > 1


def test_a_disk_that_is_full_at_the_end_keeps_what_was_scored(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: Any) -> None:
        raise PreflightError(ExitCode.STORAGE, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", fail)
        assert evaluate("all") == ExitCode.STORAGE
    with monkeypatch.context() as patch:
        calls = count_calls(patch, 0)
        assert evaluate("all") == 0
    assert calls[0] == 0
    assert len(read_tasks()) == 5


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--tasks", "none.jsonl"], 3, "none.jsonl"),
        (["--tasks-dir", "data"], 3, "no .jsonl"),
        (["--tasks", "bad.jsonl"], 3, "line 2"),
        (["--tasks", "long.jsonl"], 3, "continuation 0 has"),
        (["--text-file", "none.txt"], 3, "none.txt"),
        (["--checkpoints", "data"], 5, "not a Preflight checkpoint"),
        (["--output-dir", "nowhere"], 5, "no checkpoint"),
        (["extensive"], 2, "--evaluate"),
    ],
)
def test_bad_input_ends_with_its_code(
    flags: list[str], code: int, told: str, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text('{"text": "a b"}\n{"tex": "a b"}\n')
    Path("long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b" * 40}) + "\n")
    assert main(["--evaluate", *flags, "--device", "cpu"]) == code
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert len([x for x in captured.err.splitlines() if x.startswith("preflight:")]) <= 5


def test_several_checkpoints_give_a_result_each(
    evaluate: Evaluate, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(folder) for folder in Path("training_output/milestones").iterdir()]
    assert len(folders) > 1
    named = ("--checkpoints", "training_output", *folders)  # the best under two names
    assert evaluate("all", *named, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(row["checkpoint"] for row in rows) == sorted(folders)
    assert len(list(Path("training_output/evaluation").glob("*.json"))) == len(folders)


def test_without_tasks_the_own_sets_are_scored_and_named_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["--evaluate", "quick", "--device", "cpu", "--json"]) == ExitCode.DONE
    out, told = capsys.readouterr()
    tasks = {t["name"]: t for t in json.loads(out)["tasks"]}
    # Choices of more bytes than this model's context holds are left out: nobody asked for them.
    assert "own-choices is left out" in told
    own = {"own-last-word": 20, "own-pages": 3}
    assert {name: task["n_items"] for name, task in tasks.items() if name[:4] == "own-"} == own
    assert {tasks[name]["source"] for name in own} == {"built-in"}
    assert all(tasks[name]["contaminated"] == 0 for name in own)


def test_items_of_the_training_text_are_found(
    evaluate: Evaluate, place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two of four items are lines of the text that the run learned from."""
    lines = Path("my.txt").read_text().splitlines()
    texts = [f"{lines[40]} {lines[41]}", "one two three four five six seven eight nine ten " * 2]
    texts += [f"{lines[90]} {lines[91]}", "a sentence of eleven words that no cat has ever read"]
    task = tmp_path / "planted.jsonl"
    task.write_text("".join(json.dumps({"text": text.strip()}) + "\n" for text in texts))
    # A line ends a document's line, not its words.
    assert evaluate("all", "--tasks", str(task), "--json") == ExitCode.DONE
    [found] = [t for t in json.loads(capsys.readouterr().out)["tasks"] if t["name"] == "planted"]
    assert found["contaminated"] == 0.5
    told = [note.split()[1] for note in found["notes"] if "stands in document" in note]
    assert told == ["1", "3"]
    assert evaluate("all", "--tasks", str(task), "--json", "--contamination", "no") == 0
    [found] = [t for t in json.loads(capsys.readouterr().out)["tasks"] if t["name"] == "planted"]
    assert found["contaminated"] is None


def test_another_runs_text_says_nothing_of_contamination(
    evaluate: Evaluate, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("quite another text, of which the run has learned nothing at all\n" * 300)
    data = ["--data-dir", str(tmp_path / "data")]
    assert main(["--prepare", "--text-file", str(other), "--tokenizer", "byte", *data]) == 0
    capsys.readouterr()
    assert evaluate("quick", "--json", *data) == ExitCode.DONE
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert {task["contaminated"] for task in tasks} == {None}


def test_generated_text_is_scored_against_the_held_out_one(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run of three lines over and over knows its validation part nearly by heart."""
    assert evaluate("quick", "--json") == ExitCode.DONE
    [found] = [t for t in json.loads(capsys.readouterr().out)["tasks"] if t["kind"] == "generated"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert set(figures) >= {"rouge1", "rouge2", "rougeL"}
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert any("sacrebleu" in note and "tok:" in note for note in found["notes"])


def test_without_the_scorers_the_rest_is_evaluated(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert evaluate("quick", "--json") == ExitCode.DONE
    out, told = capsys.readouterr()
    assert "pip install sacrebleu" in told
    assert "generated" not in {task["kind"] for task in json.loads(out)["tasks"]}


def test_the_interval_of_a_single_item_is_unknown() -> None:
    one = Figure("loss", 2.0, -math.inf, math.inf, 1, False)
    two = Figure("loss", 2.0, 1.0, 3.0, 2, False)
    results = [
        TaskResult("a", "text", "s", "f", [one], 1, 1),
        TaskResult("b", "text", "s", "f", [two], 2, 2),
    ]
    lines = format_table(results)
    assert lines[2].endswith("unknown")
    assert lines[3].endswith("1.0000 to 3.0000")
