"""`--compare`: completions equal `--generate`'s, columns, memory, marks, paired figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from conftest import build
from generate import generate_batch, load_model
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.comparing import (
    Column,
    compare_results,
    format_columns,
    make_printable,
    measure_width,
    wrap_text,
)
from preflight.modes import compare, compare_models
from preflight.modes.compare_models import Entry, choose_loading, find_best_entry, find_entries
from preflight.settings import ModelConfig
from preflight.tokenization import load_tokenizer
from transformer_model import DecoderOnlyTransformer

MODEL = ModelConfig(
    vocab_size=257, context_length=32, n_embeddings=16, n_heads=2, n_layers=1, ffn_hid_dim=32
)
FLAGS = ("--max-new-tokens", "9", "--device", "cpu")


def save_model(folder: Path, step: int, val_loss: float | None, data: str = "d") -> Path:
    torch.manual_seed(step)
    model = DecoderOnlyTransformer(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer("byte")
    config = {
        "model": dataclasses.asdict(MODEL),
        "tokenizer": tokenizer.describe(),
        "data": {"fingerprint": data},
    }
    weights = {name: p.detach() for name, p in model.named_parameters()}
    losses = {"val_loss": val_loss}
    return save_checkpoint(folder, step, weights, {}, config, losses, tokenizer).path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return [save_model(tmp_path / name, n, 5.0 - n) for n, name in enumerate("abc", 1)]


def compare_entries(*values: str) -> list[Entry]:
    return find_entries(build({"compare": list(values)}))


# ---- completions --------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [None, 60_000])  # bytes: one model fits, three do not
def test_completions_are_those_of_each_model_alone(
    free: int | None, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if free is not None:
        monkeypatch.setattr(compare, "measure_model_room", lambda device: free)
    argv = [
        "--compare",
        "a",
        "b",
        str(runs[2]),
        "--prompts",
        "Hi",
        "Who",
        "--output-file",
        "o.jsonl",
    ]
    assert main.main([*argv, *FLAGS]) == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["step"]) for row in rows] == [
        (prompt, step) for prompt in ("Hi", "Who") for step in (1, 2, 3)
    ]
    sampling = build({"max_new_tokens": 9}).sampling
    for path, step in zip(runs, (1, 2, 3), strict=True):
        model, tokenizer = load_model(
            open_checkpoint(str(path)), torch.device("cpu"), torch.float32
        )
        alone = generate_batch(model, tokenizer, ["Hi", "Who"], sampling)
        found = [row for row in rows if row["step"] == step]
        assert [row["text"] for row in found] == [g.text for g in alone]
        assert [row["n_tokens"] for row in found] == [g.n_tokens for g in alone]
        assert [row["finish_reason"] for row in found] == [g.finish_reason for g in alone]
        assert all(row["seconds"] > 0 for row in found)
        assert found[0]["val_loss"] == 5.0 - step


def test_columns_say_who_is_best_and_fastest(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--compare", "a", "b", "--prompts", "Hi", *FLAGS]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "> Hi"
    first, second = lines[1].split(" | ")
    assert first.startswith("a, step 1")
    assert second.startswith("b, step 2 [best")  # the lower validation loss
    assert out.count("fastest") == 1
    assert out.count("tokens/s") == 2
    assert "2 checkpoints" in err
    assert "free: all are loaded at once" in err
    assert "--evaluate --checkpoints" in err


def test_all_stands_for_every_run_below(runs: list[Path], tmp_path: Path) -> None:
    save_model(tmp_path / "more" / "a", 7, 1.0)
    (tmp_path / "more" / "none" / "milestones").mkdir(parents=True)
    names = [entry.name for entry in compare_entries("all")]
    assert names == ["a, step 1", "b, step 2", "c, step 3", "a, step 7"]
    assert [e.name for e in compare_entries("a", str(runs[0]), "b")] == ["a, step 1", "b, step 2"]
    below = find_entries(build({"compare": ["all", "b"], "output_dir": "more"}))
    assert [entry.checkpoint.step for entry in below] == [7, 2]


def test_equal_names_get_longer(runs: list[Path], tmp_path: Path) -> None:
    save_model(tmp_path / "more" / "a", 1, 1.0)
    assert [e.name.endswith("a, step 1") for e in compare_entries("a", "more/a")] == [True, True]
    assert compare_entries("a", "more/a")[1].name == "more/a, step 1"


def test_losses_on_other_data_name_no_best(runs: list[Path], tmp_path: Path) -> None:
    entries = compare_entries("a", "b", "c")
    best = find_best_entry(entries)
    assert best is not None
    assert best.name == "c, step 3"
    save_model(tmp_path / "d", 4, 0.1, data="other")
    assert find_best_entry(compare_entries("a", "d")) is None
    save_model(tmp_path / "e", 5, None)
    assert find_best_entry(compare_entries("a", "e")) is None


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["--compare", "a"], ExitCode.FLAGS, "at least two checkpoints, found 1"),
        (["--compare", "a", "nowhere"], ExitCode.CHECKPOINT, "not a Preflight checkpoint"),
        (["--compare", "a", "b", "--output-file", "x.txt"], ExitCode.FLAGS, "JSON lines"),
        (["--compare", "a", "b", "--with-evaluation", "much"], ExitCode.FLAGS, "quick"),
        (
            ["--compare", "a", "b", "--output-file", "a/metrics.jsonl", "--overwrite"],
            ExitCode.FLAGS,
            "record of its training",
        ),
    ],
)
def test_mistakes_are_told(
    argv: list[str], code: int, told: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a/metrics.jsonl").write_text("{}\n")
    assert main.main([*argv, "--prompts", "Hi", *FLAGS]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) <= 5
    assert Path("a/metrics.jsonl").read_text() == "{}\n"


def test_memory_is_judged_before_anything_is_loaded(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = compare_entries("a", "b", "c")
    size = 4 * entries[0].n_parameters
    assert choose_loading(entries, 4, 4 * size)
    assert not choose_loading(entries, 4, 4 * size - 1)
    assert choose_loading(entries, 2, 2 * size)  # half the bytes of a weight
    assert not choose_loading(entries, 4, size)
    monkeypatch.setattr(compare_models, "load_model", pytest.fail)
    with pytest.raises(PreflightError) as caught:
        choose_loading(entries, 4, size - 1)
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    assert "a, step 1" in caught.value.lines[0]


# ---- layout -------------------------------------------------------------------------------------

some_text = st.text(st.sampled_from("ab c\n\té日e\u0301"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(some_text, min_size=1, max_size=4), width=st.integers(20, 130))
def test_no_line_is_wider_than_the_terminal_and_no_text_is_lost(
    texts: list[str], width: int
) -> None:
    columns = [Column(f"t{i}", text, "end") for i, text in enumerate(texts)]
    lines = format_columns(columns, width)
    assert max(map(measure_width, lines)) <= width
    for text in texts:
        assert all(measure_width(line) <= width for line in wrap_text(text, width))
        kept = "".join("".join(wrap_text(text, width)).split())
        assert kept == "".join(text.split())
    is_beside = (width - 3 * (len(texts) - 1)) // len(texts) >= 28
    assert any("t0" in line and f"t{len(texts) - 1}" in line for line in lines) == (
        is_beside or len(texts) == 1
    )


def test_lines_break_between_words() -> None:
    assert wrap_text("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap_text("abcdefghijkl mn", 5) == ["abcde", "fghij", "kl mn"]
    assert wrap_text("日本語日本", 4) == ["日本", "語日", "本"]


def test_what_controls_a_terminal_is_spelled() -> None:
    assert make_printable("a\x1b[2J\u202eb\u00a0c\r\nd\re\t") == (
        "a\\x1b[2J\\u202eb\u00a0c\nd\ne\t"
    )


# ---- figures ------------------------------------------------------------------------------------


def build_result(shift: float, fingerprint: str = "f", n: int = 40) -> dict[str, Any]:
    """As `--evaluate` writes it; `shift` nats per byte worse than 1."""
    pages = [
        {"line": i, "n_bytes": 100 + i, "log_likelihoods": [-(1 + shift + i % 7 / 50) * (100 + i)]}
        for i in range(n)
    ]
    choices = [
        {"line": i, "log_likelihoods": [0, 0], "acc": i % 3 == 0, "acc_norm": i % 2 == 0}
        for i in range(n)
    ]
    return {
        "tokenizer": {"fingerprint": fingerprint},
        "tasks": [
            {"name": "p", "kind": "pages", "source": "s", "scores": pages},
            {"name": "c", "kind": "choices", "source": "s", "scores": choices},
        ],
    }


def test_a_difference_is_told_in_bits_per_byte() -> None:
    first, second = build_result(0.1), build_result(0.0)
    for row in second["tasks"][0]["scores"][::2]:
        row["log_likelihoods"][0] *= 1.01
    found, left_out = compare_results(first, second, ("A", "B"))
    assert left_out == []
    total = sum(100 + i for i in range(40))
    sums = [
        -sum(row["log_likelihoods"][0] for row in r["tasks"][0]["scores"])
        / total
        / 0.6931471805599453
        for r in (first, second)
    ]
    assert found[0].found.difference == pytest.approx(sums[1] - sums[0])
    assert found[0].describe().startswith(f"B is better by {sums[0] - sums[1]:.3f} ± 0.00")
    assert found[0].describe().endswith("bits per byte (p, 40 items)")
    turned = compare_results(second, first, ("B", "A"))[0][0].describe()
    assert turned.startswith(f"B is better by {sums[0] - sums[1]:.3f}")
    assert found[1].describe() == "no difference shown in acc (c, 40 items)"


def test_a_higher_accuracy_is_better() -> None:
    first, second = build_result(0), build_result(0)
    for row in second["tasks"][1]["scores"]:
        row["acc"] = True
    acc = compare_results(first, second, ("A", "B"))[0][1]
    assert acc.describe().startswith("B is better by 0.650 ± ")


def test_other_tokenizers_are_compared_in_bits_per_byte_alone() -> None:
    found, left_out = compare_results(build_result(0), build_result(1, "g"), ("A", "B"))
    assert [d.measure.name for d in found] == ["bits per byte"]
    assert left_out == ["c: the tokenizers differ, and it has no bits per byte"]


def test_three_items_show_nothing_and_bleu_is_not_paired() -> None:
    """Three signs alone are equal once in four times: no p-value below 0.05 can come of them."""
    first, second = build_result(1, n=3), build_result(0, n=3)
    for result in (first, second):
        result["tasks"].append({"name": "g", "kind": "generated", "source": "s", "scores": []})
    found, left_out = compare_results(first, second, ("A", "B"))
    assert left_out == []
    told = "no difference shown in bits per byte (p, 3 items: too few for the difference seen)"
    assert found[0].describe() == told


def test_scores_of_other_items_are_not_compared() -> None:
    first, second = build_result(0), build_result(1)
    second["tasks"][0]["scores"][3]["n_bytes"] += 1
    second["tasks"][1]["scores"].pop()
    found, left_out = compare_results(first, second, ("A", "B"))
    assert (found, left_out) == ([], ["p: the items differ", "c: 40 items against 39"])


def test_results_of_the_same_weights_are_found_and_told(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(config: Any, entries: Any, level: str) -> None:
        assert level == "quick"
        for entry, shift in zip(entries, (0.1, 0.0), strict=True):
            weights = entry.checkpoint.manifest.files["model.safetensors"].sha256
            facts = {"format": "preflight-evaluation", "weights_sha256": weights, "time": "2"}
            folder = entry.checkpoint.path.parent.parent / "evaluation"
            folder.mkdir()
            (folder / "x.json").write_text(json.dumps(facts | build_result(shift)))
            old = facts | {"time": "1"} | build_result(-9 * shift)
            (folder / "y.json").write_text(json.dumps(old))
            other = facts | {"time": "3", "weights_sha256": "0"} | build_result(5)
            (folder / "z.json").write_text(json.dumps(other))

    values = {"compare": ["a", "b"], "prompts": ["Hi"], "device": "cpu", "max_new_tokens": 3}
    assert compare.run(build(values | {"with_evaluation": "quick"}), evaluate) == 0
    out = capsys.readouterr().out
    assert "b, step 2 is better by 0.144 ± 0.000 bits per byte (p, 40 items)" in out


def test_a_person_chooses_until_there_are_two(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[runs[0]], [runs[0]], [runs[1]]]
    monkeypatch.setattr(compare_models, "pick_checkpoints", lambda root: answers.pop(0))
    with pytest.raises(PreflightError, match="no terminal") as caught:
        compare_entries("ask")
    assert caught.value.code == ExitCode.FLAGS
    monkeypatch.setattr(compare_models, "is_on_terminal", lambda: True)
    assert [entry.name for entry in compare_entries("ask")] == ["a, step 1", "b, step 2"]
    assert not answers
    answers[:] = [[runs[0]], []]  # the second question was left
    with pytest.raises(PreflightError, match="at least two"):
        compare_entries("ask")
