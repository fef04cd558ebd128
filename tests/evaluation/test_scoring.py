"""Fast scoring against one continuation at a time, in batches of every size."""

from __future__ import annotations

import random

import pytest
import torch

from preflight.evaluation.encoding import Row, encode_task, list_windows
from preflight.evaluation.items import Item, ItemScore, Task, TaskKind
from preflight.evaluation.packing import plan_batches
from preflight.evaluation.scoring import RowScorer, collect_items, score_rows
from preflight.models.building import build_model
from preflight.tokenization import load_tokenizer

from .slow_scorer import build_config, score_slowly, score_tokens

FAMILIES = ("gpt2", "llama", "modern", "mlp")


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build_model(build_config(family)).eval()
    with torch.no_grad():  # far from the uniform guess, so that a wrong place shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def write(n: int, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh é") for _ in range(n - 1)) + "x"


def make_items(kind: TaskKind, seed: int) -> list[Item]:
    draw = random.Random(seed)
    if kind == "pages":
        return [Item("", (write(draw.randint(1, 70), draw),)) for _ in range(5)]
    n_choices = 4 if kind == "choices" else 1
    return [
        Item(
            write(draw.randint(1, 20), draw) if i else "",
            tuple(f" {write(draw.randint(1, 11), draw)}" for _ in range(n_choices)),
            draw.randrange(n_choices),
        )
        for i in range(7)
    ]


def score(model: torch.nn.Module, kind: TaskKind, items: list[Item], size: int) -> list[ItemScore]:
    task = Task("t", kind, "file", tuple(items))
    rows = encode_task(task, items, load_tokenizer("byte"), model.config.context_length).rows
    scorer = RowScorer(model, rows, size)
    return collect_items(scorer.rows, score_rows(scorer), len(items))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["choices", "last-word", "pages"])
def test_scores_are_those_of_one_continuation_at_a_time(family: str, kind: TaskKind) -> None:
    model, items = build(family), make_items(kind, 1)
    slow = score_slowly(model, load_tokenizer("byte"), kind, items)
    for size in (1, 100, 10_000):
        for fast, wanted in zip(score(model, kind, items, size), slow, strict=True):
            assert fast.log_likelihoods == pytest.approx(wanted.log_likelihoods, abs=2e-4)
            assert fast.n_tokens == wanted.n_tokens
            assert fast.is_greedy == wanted.is_greedy


def test_greedy_continuations_are_found() -> None:
    """Random continuations are never greedy: these are made by taking the most probable token."""
    model = build("gpt2")
    context, tokens = [5, 9], list[int]()
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([context + tokens]))[0, -1].argmax()))
    from preflight.evaluation.encoding import Branch

    other = [*tokens[:3], (tokens[3] + 1) % 257]
    row = Row(0, context, [Branch(0, other), Branch(1, tokens), Branch(2, tokens[:1])])
    [found] = score_rows(RowScorer(model, [row], 100)).values()
    assert [score.is_greedy for score in found] == [False, True, True]


def test_ranks_count_the_most_probable_tokens() -> None:
    model, tokenizer = build("modern"), load_tokenizer("byte")
    items = make_items("pages", 2)
    rows = encode_task(Task("t", "pages", "f", tuple(items)), items, tokenizer, 24).rows
    found = score_rows(RowScorer(model, rows, 100, wants_ranks=True))
    for i, row in enumerate(rows):
        ranks = score_tokens(model, row.context, row.branches[0].tokens)[2]
        assert found[i][0].n_top == tuple(sum(r < n for r in ranks) for n in (1, 5, 10))
    assert sum(score[0].n_top[2] for score in found.values()) > 0


def test_windows_predict_each_token_once_after_as_much_as_fits() -> None:
    for n in range(1, 40):
        windows = list(list_windows(range(100, 100 + n), 7, 8))
        assert [token for _, tokens in windows for token in tokens] == list(range(100, 100 + n))
        assert all(len(context) + len(tokens) <= 9 and context for context, tokens in windows)
        assert windows[0][0] == [7]
        if n > 8:  # the last is full
            assert len(windows[-1][0]) + len(windows[-1][1]) == 9


def test_batches_hold_every_row_once_longest_first_within_the_budget() -> None:
    items = make_items("choices", 4) * 3
    rows = encode_task(Task("t", "choices", "f", ()), items, load_tokenizer("byte"), 24).rows
    for size in (1, 90, 100_000):
        batches = plan_batches(rows, size, may_pack=True)
        assert sorted(i for batch in batches for i in batch.rows) == list(range(len(rows)))
        lengths = [rows[i].n_tokens for batch in batches for i in batch.rows]
        assert lengths == sorted(lengths, reverse=True)
        assert all(batch.n_tokens <= size or len(batch.rows) == 1 for batch in batches)
    assert len(plan_batches(rows, 100_000, may_pack=True)) == 1
