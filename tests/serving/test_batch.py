"""Answers that run together equal the same answers alone, whatever joins and leaves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from serving_models import answer_alone, make_job, make_model, make_tokenizer

from preflight.models.kv_cache import KVCache
from preflight.serving import slots as slots_module
from preflight.serving.batch import RowBatch
from preflight.serving.pieces import PieceBudget, count_common
from preflight.serving.protocol import EndEvent, Job, TokenEvent
from preflight.serving.scoring import PromptScorer
from preflight.serving.slots import Task
from preflight.settings import SamplingConfig

FAMILIES = ["gpt2", "llama", "mlp"]
N_SLOTS = 4
Events = dict[int, list[TokenEvent | EndEvent]]


def make_batch(family: str, piece_tokens: int = 7, n_slots: int = N_SLOTS) -> RowBatch:
    batch = RowBatch(make_model(family), make_tokenizer(), n_slots, piece_tokens)
    batch._choosers.clear()
    return batch


def finish(batch: RowBatch, found: Events, limit: int = 10_000) -> None:
    for _ in range(limit):
        if not batch.tasks:
            return
        note(found, batch.step())
    raise AssertionError("it does not end")


def note(found: Events, events: list[Any]) -> None:
    for task, event in events:
        found.setdefault(task.owner, []).append(event)


def read(events: list[TokenEvent | EndEvent]) -> tuple[str, str, int]:
    *tokens, end = events
    assert isinstance(end, EndEvent)
    assert all(isinstance(event, TokenEvent) for event in tokens)
    assert len(tokens) == end.n_tokens
    return "".join(event.text for event in tokens), end.reason, end.n_tokens  # type: ignore[union-attr]


def draw_job(rng: random.Random, prompts: list[list[int]]) -> Job:
    """Prompts that often share a beginning; texts longer than the context; all settings."""
    kind = rng.random()
    if kind < 0.5 and prompts:
        ids = rng.choice(prompts)
        ids = ids[: rng.randint(1, len(ids))] + [
            rng.randrange(256) for _ in range(rng.randint(0, 9))
        ]
    else:
        ids = [rng.randrange(257) for _ in range(rng.randint(1, 47))]
    ids = ids[:47]
    prompts.append(ids)
    sampling = SamplingConfig(
        max_new_tokens=rng.choice([1, 3, 10, 30, 70]),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([None, 0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        stop=rng.choice([(), ("e",), ("ab", "q"), ("\ufffd\ufffd",)]),
        logprobs=rng.choice([None, None, 0, 3]),
        seed=rng.choice([1, 2, 2**40]),
    )
    stops = frozenset(rng.sample(range(256), rng.choice([0, 0, 10])))
    return Job(ids, sampling, stops, rng.randrange(3))


def run_schedule(seed: int, family: str) -> None:
    """Join, leave and cancel in a random order; every answer that ends is the one alone."""
    rng = random.Random(seed)
    batch = make_batch(family, piece_tokens=rng.choice([1, 3, 16, 200]), n_slots=rng.randint(1, 5))
    jobs: list[Job] = []
    found: Events = {}
    prompts: list[list[int]] = []
    cancelled: set[int] = set()
    for _ in range(rng.randint(20, 90)):
        if batch.n_free and rng.random() < 0.4:
            jobs.append(draw_job(rng, prompts))
            batch.join(jobs[-1], len(jobs) - 1)
        if batch.tasks and rng.random() < 0.06:
            task = rng.choice(batch.tasks)
            batch.leave(task)
            cancelled.add(task.owner)
        note(found, batch.step())
        check_slots(batch)
    finish(batch, found)
    for owner, job in enumerate(jobs):
        if owner in cancelled:
            assert not any(isinstance(event, EndEvent) for event in found.get(owner, []))
        else:
            assert read(found[owner]) == answer_alone(make_model(family), job), (seed, owner)


def check_slots(batch: RowBatch) -> None:
    """What the batch believes of its cache."""
    for i, slot in enumerate(batch.slots.all):
        assert batch.slots.cache.lengths[i] == len(slot.held)
        ready = slot.task is not None and len(slot.held) == len(slot.task.window) - 1
        assert ready == (i < batch.slots.n_ready)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that has to grow while rows use it."""
    monkeypatch.setattr(slots_module, "FIRST_CAPACITY", 4)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("seed", range(40))
def test_schedules(seed: int) -> None:
    run_schedule(seed, FAMILIES[seed % 3])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 260))
def test_more_schedules(seed: int) -> None:
    run_schedule(seed, FAMILIES[seed % 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_extending_equals_prefilling(family: str) -> None:
    model = make_model(family)
    rng = random.Random(5)
    texts = [[rng.randrange(257) for _ in range(n)] for n in (40, 3, 47, 17)]
    caches: list[KVCache] = []
    with torch.inference_mode():
        for cut in (None, [(0,), (9, 1, 30, 16), (25, 3, 33, 17)]):
            cache = model.build_cache(6, torch.device("cpu"), torch.float32)
            rows = [4, 0, 2, 3]
            ends = [len(text) for text in texts]
            if cut is None:
                padded = torch.tensor([t + [0] * (47 - len(t)) for t in texts])
                model.prefill(padded, cache, rows, ends)
            else:
                before = [0] * 4
                for stops in [*cut[1:], tuple(ends)]:
                    parts = [t[a:b] for t, a, b in zip(texts, before, stops, strict=True)]
                    T = max(map(len, parts))
                    padded = torch.tensor([p + [0] * (T - len(p)) for p in parts])
                    model.extend(padded, cache, rows, list(map(len, parts)))
                    before = list(stops)
            assert cache.lengths == [3, 0, 47, 17, 40, 0]
            caches.append(cache)
    for whole, pieces in zip(caches[0].layers, caches[1].layers, strict=True):
        for row, text in zip(rows, texts, strict=True):
            a = whole[:, row].narrow(caches[0].token_dim - 1, 0, len(text))
            b = pieces[:, row].narrow(caches[0].token_dim - 1, 0, len(text))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_full_refuses_more() -> None:
    model = make_model("llama")
    cache = model.build_cache(1, torch.device("cpu"), torch.float32, capacity=10)
    with torch.inference_mode():
        model.extend(torch.zeros(1, 8, dtype=torch.long), cache, [0], [8])
        with pytest.raises(ValueError, match="11 tokens"):
            model.extend(torch.zeros(1, 3, dtype=torch.long), cache, [0], [3])
    assert cache.lengths == [8]


class Spy:
    """Counts the tokens that a model reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family: str = "llama") -> None:
        self.pieces: list[list[int]] = []
        model = make_model(family)
        extend = model.extend

        def note_extend(tokens: Any, cache: Any, rows: Any, lengths: list[int]) -> None:
            self.pieces.append(lengths)
            extend(tokens, cache, rows, lengths)

        monkeypatch.setattr(model, "extend", note_extend)

    @property
    def n_tokens(self) -> int:
        return sum(map(sum, self.pieces))


def test_of_a_chat_only_the_newest_turn_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    batch = make_batch("llama", piece_tokens=100)
    first = make_job(range(20), temperature=0, max_new_tokens=5)
    found: Events = {}
    batch.join(first, 0)
    finish(batch, found)
    assert spy.n_tokens == 19
    answer = [event.text for event in found[0][:-1]]  # type: ignore[union-attr]
    assert len(answer) == 5
    held = batch.slots.all[0].held
    assert held[:20] == list(range(20))
    assert len(held) == 24  # all but the last token
    other = make_job(range(100, 110), temperature=0, max_new_tokens=2)
    batch.join(other, 1)
    finish(batch, found)
    assert spy.n_tokens == 19 + 9
    second = make_job([*held, 7, 8, 9], temperature=0, max_new_tokens=4)
    task = batch.join(second, 2)
    finish(batch, found)
    assert spy.n_tokens == 19 + 9 + 2
    assert task.n_cached == 24
    end = found[2][-1]
    assert isinstance(end, EndEvent)
    assert (end.n_prompt_tokens, end.n_cached_tokens) == (27, 24)
    assert read(found[2]) == answer_alone(make_model("llama"), second)


def test_chats_that_begin_alike_are_both_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    batch = make_batch("llama", piece_tokens=100)
    found: Events = {}
    system = list(range(6))
    chats = [[*system, *range(start, start + 20)] for start in (40, 80)]
    for owner, ids in enumerate([*chats, *chats]):
        batch.join(make_job(ids, max_new_tokens=1), owner)
        finish(batch, found)
    assert spy.n_tokens == 25 + 19  # the second has the system message from the first


def test_several_answers_to_one_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    batch = make_batch("llama", piece_tokens=11)
    jobs = [make_job(range(40), index, max_new_tokens=6) for index in range(4)]
    found: Events = {}
    for owner, job in enumerate(jobs):
        batch.join(job, owner)
    finish(batch, found)
    assert spy.n_tokens == 39
    texts = [read(found[owner]) for owner in range(4)]
    assert texts == [answer_alone(make_model("llama"), job) for job in jobs]
    assert len({text for text, *_ in texts}) > 1


def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    batch = make_batch("llama", piece_tokens=32)
    batch.join(make_job(range(47), max_new_tokens=3), 0)
    batch.join(make_job(range(100, 110), max_new_tokens=3), 1)
    events = batch.step()
    assert spy.pieces == [[16, 9]]  # each has half of the piece
    assert [task.owner for task, _ in events] == [1]  # whose first token is there


def test_streams_go_on_while_a_long_prompt_is_read() -> None:
    batch = make_batch("llama", piece_tokens=16)
    batch.join(make_job([1], max_new_tokens=40), 0)
    batch.step()
    batch.join(make_job(range(100, 147), max_new_tokens=1), 1)
    owners = [[task.owner for task, _ in batch.step()] for _ in range(3)]
    assert owners == [[0], [0], [0, 1, 1]]


def test_leaving_frees_the_row_at_once() -> None:
    batch = make_batch("gpt2", n_slots=2)
    tasks = [batch.join(make_job([n], max_new_tokens=40), n) for n in (1, 2)]
    batch.step()
    assert (batch.n_free, batch.slots.n_ready) == (0, 2)
    batch.leave(tasks[0])
    assert (batch.n_free, batch.slots.n_ready) == (1, 1)
    assert {task.owner for task, _ in batch.step()} == {2}


def test_characters_across_tokens_come_whole() -> None:
    text = "naïve 日本語 🙂 fin"
    script = list(text.encode())
    batch = make_batch("gpt2")
    place = {"n": 0}

    def choose(logits: Any, tasks: list[Task]) -> dict[int, int | Exception]:
        token = script[place["n"]] if place["n"] < len(script) else 256
        place["n"] += 1
        return {id(task): token for task in tasks}

    batch._choose = choose  # type: ignore[method-assign, assignment]
    found: Events = {}
    batch.join(make_job([1], max_new_tokens=100), 0)
    finish(batch, found)
    pieces = [event.text for event in found[0][:-1]]  # type: ignore[union-attr]
    assert "".join(pieces) == text
    assert "🙂" in pieces


def test_logprobs_are_those_of_the_model() -> None:
    batch = make_batch("llama")
    job = make_job(range(30), temperature=0, max_new_tokens=4, logprobs=3)
    found: Events = {}
    batch.join(job, 0)
    finish(batch, found)
    ids = list(range(30))
    for event in found[0][:-1]:
        assert isinstance(event, TokenEvent)
        assert event.chosen is not None
        expected = make_model("llama")(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert event.chosen.logprob == pytest.approx(float(expected[event.chosen.token]), abs=1e-4)
        assert [a.token for a in event.alternatives] == expected.topk(3).indices.tolist()
        assert event.alternatives[0] == event.chosen
        assert event.chosen.data == bytes([event.chosen.token])
        ids.append(event.chosen.token)


# ---- failures -----------------------------------------------------------------------------------


def test_an_error_of_a_row_ends_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch("gpt2")
    good = make_job([5, 6, 7], max_new_tokens=12)
    found: Events = {}
    batch.join(good, 0)
    bad = batch.join(make_job([8, 9], max_new_tokens=12), 1)
    batch.step()
    monkeypatch.setattr(bad.row, "accept", lambda token: 1 / 0)
    # Of other settings: the choice itself fails.
    worse = batch.join(make_job([8, 9], max_new_tokens=12, top_p=0.5), 2)
    monkeypatch.setattr(worse.row, "random", None)
    found = {0: []}
    finish(batch, found)
    for owner in (1, 2):
        [end] = found[owner]
        assert isinstance(end, EndEvent)
        assert end.reason == "error"
    after = make_job([5, 6, 7, 8], max_new_tokens=12)
    batch.join(after, 3)
    finish(batch, found)
    assert read(found[3]) == answer_alone(make_model("gpt2"), after)
    assert "".join(e.text for e in found[0][:-1]) in answer_alone(make_model("gpt2"), good)[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["extend", "decode_step"])
def test_a_lack_of_memory_ends_answers_and_not_the_batch(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch("llama")
    found: Events = {}
    job = make_job(range(9), max_new_tokens=4)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(make_model("llama"), where, fail)
        batch.join(job, 0)
        finish(batch, found)
    [end] = found[0]
    assert isinstance(end, EndEvent)
    assert (end.reason, end.message) == ("error", "out of memory")
    batch.join(job, 1)
    finish(batch, found)
    assert read(found[1]) == answer_alone(make_model("llama"), job)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_scored_in_pieces(family: str) -> None:
    model, ids = make_model(family), [(7 * i * i) % 257 for i in range(40)]
    scorer = PromptScorer(model, make_tokenizer(), ids, 2, PieceBudget(9))
    told = [scorer.read_piece() for _ in range(5)]
    assert told == [True, True, True, True, False]
    expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    for place, event in enumerate(scorer.events[1:]):
        assert event.chosen is not None
        assert event.chosen.token == ids[place + 1]
        assert event.chosen.logprob == pytest.approx(
            float(expected[place, ids[place + 1]]), abs=1e-4
        )
        assert [a.token for a in event.alternatives] == expected[place].topk(2).indices.tolist()


# ---- pieces -------------------------------------------------------------------------------------


def test_common_beginnings() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a = [rng.randrange(2) for _ in range(rng.randint(0, 12))]
        b = [rng.randrange(2) for _ in range(rng.randint(0, 12))]
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        assert count_common(a, b) == n


def test_a_piece_follows_the_time_that_it_takes() -> None:
    budget = PieceBudget()
    first = budget.find(is_alone=False)
    assert budget.find(is_alone=True) == 4 * first
    budget.note(first, 0.01)
    assert budget.find(is_alone=False) == 2 * first
    budget.note(3, 0.001)  # so few tokens say nothing
    assert budget.find(is_alone=False) == 2 * first
    budget.note(2 * first, 2.5)
    assert budget.find(is_alone=False) == first
    budget.note(first, 0.25 / 0.75)
    assert budget.find(is_alone=False) == first * 3 // 4
    for _ in range(9):
        budget.note(first, 30.0)
    assert budget.find(is_alone=False) == 64
    assert PieceBudget(5).find(is_alone=True) == 5
