"""The engine: its thread, its queue, its limits; and the store that feeds it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psutil
import pytest
from serving_models import answer_alone, make_job, make_model, make_tokenizer

from preflight.serving.batch import RowBatch
from preflight.serving.engine import Engine, EngineAnswer
from preflight.serving.protocol import EndEvent, Job, QueueFullError, TokenEvent

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines that are closed at the end."""
    made: list[Engine] = []

    def make(family: str = "gpt2", n_slots: int = 3, **flags: Any) -> Engine:
        batch = RowBatch(make_model(family), make_tokenizer(), n_slots, 16)
        made.append(Engine(batch, **flags))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)
        assert not engine._thread.is_alive()


async def collect(answer: EngineAnswer) -> tuple[str, EndEvent]:
    events = [event async for event in answer]
    *tokens, end = events
    assert isinstance(end, EndEvent)
    assert all(isinstance(event, TokenEvent) for event in tokens)
    return "".join(event.text for event in tokens), end  # type: ignore[union-attr]


def run(main: Awaitable[Any], seconds: float = 30) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main, seconds)  # type: ignore[arg-type]

    return asyncio.run(bounded())


async def wait_for(is_true: Callable[[], bool], seconds: float = 5) -> float:
    """Seconds until it is true."""
    began = time.perf_counter()
    while not is_true():
        assert time.perf_counter() - began < seconds
        await asyncio.sleep(0.001)
    return time.perf_counter() - began


def slow_down(engine: Engine, seconds: float = 0.01) -> None:
    """Make each step take so long, so that a test can act between two of them."""
    step = engine._batch.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    engine._batch.step = slow_step  # type: ignore[method-assign]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_equal_those_alone(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family)
    rng = random.Random(4)
    jobs = [
        make_job(
            [rng.randrange(256) for _ in range(rng.randint(1, 40))],
            index % 3,
            max_new_tokens=rng.choice([1, 5, 20]),
            stop=rng.choice([(), ("a",)]),
            seed=index,
        )
        for index in range(25)
    ]

    async def ask(job: Job) -> tuple[str, EndEvent]:
        await asyncio.sleep(rng.random() / 20)
        return await collect(engine.submit(job))

    async def main() -> list[tuple[str, EndEvent]]:
        return await asyncio.gather(*map(ask, jobs))

    for job, (text, end) in zip(jobs, run(main()), strict=True):
        assert (text, end.reason, end.n_tokens) == answer_alone(make_model(family), job)
        assert end.n_prompt_tokens == len(job.ids)
    assert engine.is_idle
    told = engine.rates.describe()
    assert told["answers"] == 25
    assert told["failed"] == 0


def test_a_cancelled_answer_frees_its_row_before_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(n_slots=1)
    slow_down(engine)

    async def main() -> None:
        first = engine.submit(make_job([1], max_new_tokens=10_000))
        events: AsyncIterator[Any] = aiter(first)
        await anext(events)
        second = engine.submit(make_job([2], max_new_tokens=2))
        assert engine.n_waiting == 1
        first.cancel()
        text, end = await collect(second)
        assert (text, end.reason, end.n_tokens) == answer_alone(make_model(), second.job)
        assert [event async for event in events] == []  # no event comes after that

    run(main())


def test_whoever_waits_for_a_cancelled_answer_is_let_go(make_engine: MakeEngine) -> None:
    engine = make_engine(n_slots=1)
    slow_down(engine, 0.2)

    async def main() -> None:
        running = engine.submit(make_job([1], max_new_tokens=10_000))
        waiting = engine.submit(make_job([2], max_new_tokens=5))
        collecting = asyncio.create_task(asyncio.wait_for(anext(aiter(waiting)), 2))
        await asyncio.sleep(0.05)
        threading.Thread(target=waiting.cancel).start()  # from any thread
        with pytest.raises(StopAsyncIteration):
            await collecting
        assert engine.n_waiting == 0
        running.cancel()
        assert await wait_for(lambda: engine.is_idle) < 0.5

    run(main())


@pytest.mark.parametrize("place", [0, 1, 7, 30])
def test_disconnects_free_the_row(place: int, make_engine: MakeEngine) -> None:
    engine = make_engine(n_slots=2)
    slow_down(engine, 0.002)

    async def main() -> None:
        answer = engine.submit(make_job([1], max_new_tokens=10_000, temperature=0))
        events = aiter(answer)
        for _ in range(place):
            await anext(events)
        answer.cancel()
        assert await wait_for(lambda: engine.is_idle) < 0.5

    run(main())


def test_a_full_queue_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(n_slots=1, max_waiting=3)
    slow_down(engine)

    async def main() -> None:
        running = engine.submit(make_job([1], max_new_tokens=10_000))
        await wait_for(lambda: engine.n_running == 1)
        waiting = [engine.submit(make_job([2], max_new_tokens=1)) for _ in range(3)]
        with pytest.raises(QueueFullError) as refused:
            engine.submit(make_job([3], max_new_tokens=1))
        assert 1 <= refused.value.retry_after_seconds <= 60
        waiting[1].cancel()  # its place is free at once
        last = engine.submit(make_job([3], max_new_tokens=1))
        running.cancel()
        for answer in (waiting[0], waiting[2], last):
            assert (await collect(answer))[1].n_tokens == 1

    run(main())


def test_an_answer_that_takes_too_long_is_cut(make_engine: MakeEngine) -> None:
    now = [0.0]
    engine = make_engine(n_slots=1, answer_seconds=300, clock=lambda: now[0])
    slow_down(engine)

    async def main() -> None:
        running = engine.submit(make_job([1], max_new_tokens=10_000, temperature=0))
        waiting = engine.submit(make_job([2], max_new_tokens=5))
        await anext(aiter(running))
        now[0] = 301.0
        _, end = await collect(running)
        assert end.reason == "length"
        _, end = await collect(waiting)
        assert (end.reason, end.n_tokens) == ("error", 0)
        assert "300 s" in end.message
        _, end = await collect(engine.submit(make_job([2], max_new_tokens=5)))  # it lives on
        assert end.reason in ("length", "stop")

    run(main())


def test_a_fault_of_the_engine_does_not_end_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine._batch, "join", lambda job, owner: 1 / 0)
            _, end = await collect(engine.submit(make_job([1], max_new_tokens=5)))
            assert end.reason == "error"
        job = make_job([1], max_new_tokens=5)
        text, end = await collect(engine.submit(job))
        assert (text, end.reason, end.n_tokens) == answer_alone(make_model(), job)

    run(main())


@pytest.mark.parametrize(("seconds", "reason"), [(10, "length"), (0, "cancelled")])
def test_closing_lets_answers_end_for_a_while(
    seconds: float, reason: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(n_slots=1)
    slow_down(engine)

    async def main() -> None:
        answers = [engine.submit(make_job([1], max_new_tokens=20, temperature=0)) for _ in range(2)]
        await wait_for(lambda: engine.n_running == 1)
        await asyncio.to_thread(engine.close, seconds)
        assert [(await collect(answer))[1].reason for answer in answers] == [reason] * 2
        with pytest.raises(QueueFullError):
            engine.submit(make_job([1]))

    run(main())


def test_calls_run_between_steps(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert engine.call(lambda: threading.current_thread().name).result(5).startswith("engine of")
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(5)
    assert engine.call(lambda: 3).result(5) == 3


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_requests(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", n_slots=8)
    process = psutil.Process()
    rng = random.Random(7)

    async def ask() -> None:
        ids = [rng.randrange(256) for _ in range(rng.randint(1, 47))]
        job = make_job(ids, max_new_tokens=rng.randint(1, 12), logprobs=rng.choice([None, 5]))
        answer = engine.submit(job)
        if rng.random() < 0.2:
            await anext(aiter(answer))
            answer.cancel()
        else:
            await collect(answer)

    async def main() -> list[int]:
        sizes = []
        for _ in range(50):
            await asyncio.gather(*(ask() for _ in range(40)))
            sizes.append(process.memory_info().rss)
        return sizes

    sizes = run(main(), 600)
    assert sizes[-1] - sizes[4] < 5 * 2**20, sizes
