"""The thread that answers: it alone touches the model. Requests come from event loops.

A queue of bounded length feeds the rows of a `RowBatch`. Answers join and leave between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from preflight.core.log import log
from preflight.serving.batch import RowBatch
from preflight.serving.measuring import Rates
from preflight.serving.protocol import EndEvent, Job, QueueFullError, TokenEvent
from preflight.serving.slots import Task

MAX_WAITING = 64
ANSWER_SECONDS = 300.0
_MAX_RETRY_SECONDS = 60

Event = TokenEvent | EndEvent
Result = TypeVar("Result")


class EngineAnswer:
    """An `Answer` of the engine: its events wait in the event loop that asked for it."""

    def __init__(self, job: Job, deadline: float, forget: Callable[[EngineAnswer], None]) -> None:
        self.job, self.deadline = job, deadline
        self.submitted = time.perf_counter()
        self.is_cancelled = self.has_begun = False
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._forget = forget

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self.is_cancelled:
            event = await self._events.get()
            if event is None or self.is_cancelled:
                return
            yield event
            if isinstance(event, EndEvent):
                return

    def cancel(self) -> None:
        """As in `Answer`: whoever waits for an event finds that there are no more."""
        self.is_cancelled = True
        self._forget(self)
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self.loop.call_soon_threadsafe(self._events.put_nowait, None)

    def put(self, event: Event) -> None:
        """Add an event, in the thread of the loop."""
        self._events.put_nowait(event)


class Engine:
    """Answers the jobs of one model.

    Attributes:
        rates: what has been measured so far.

    Args:
        batch: nobody else uses it from now on.
        name: of the model, for the thread.
        max_waiting: jobs that may wait for a row.
        answer_seconds: from the submission; then an answer is cut.
        clock: seconds.
    """

    def __init__(
        self,
        batch: RowBatch,
        name: str = "model",
        *,
        max_waiting: int = MAX_WAITING,
        answer_seconds: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch, self._max_waiting = batch, max_waiting
        self._answer_seconds, self._clock = answer_seconds, clock
        self._waiting: deque[EngineAnswer] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        self._cancel_all = False
        self.n_running = 0
        self.rates = Rates()
        batch.on_step = self.rates.note_step
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Jobs that wait for a row."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is running or waiting."""
        return not self._waiting and not self._calls and not self.n_running

    def submit(self, job: Job) -> EngineAnswer:
        """Queue a job, from an event loop.

        Raises:
            QueueFullError: too many wait, or the engine is being closed.
        """
        answer = EngineAnswer(job, self._clock() + self._answer_seconds, self._forget)
        with self._condition:
            if self._is_closed:
                raise QueueFullError(1)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(self._estimate_wait())
            self._waiting.append(answer)
            self._condition.notify()
        return answer

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Let the thread call a function between two steps.

        Raises:
            QueueFullError: too much waits, or the engine is being closed.
        """
        future: Future[Result] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._condition:
            if self._is_closed or len(self._calls) >= self._max_waiting:
                raise QueueFullError(1 if self._is_closed else self._estimate_wait())
            self._calls.append(work)
            self._condition.notify()
        return future

    def close(self, seconds: float) -> None:
        """Let what is running end for so long, then cancel it. It waits for the thread's end."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join(seconds)
        with self._condition:
            self._cancel_all = True
            self._condition.notify()
        self._thread.join()

    def _estimate_wait(self) -> int:
        """Whole seconds after which a row may be free."""
        seconds = self.rates.answer_seconds or 1.0
        return min(_MAX_RETRY_SECONDS, max(1, math.ceil(seconds)))

    def _forget(self, answer: EngineAnswer) -> None:
        with self._condition:
            with contextlib.suppress(ValueError):  # it is running, or has ended
                self._waiting.remove(answer)
            self._condition.notify()

    # ---- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._has_work() or self._is_closed):
                    self._condition.wait()
                if not self._has_work():
                    return
            try:
                self._turn()
            except Exception as error:  # a fault of the engine itself: it must not end the server
                log.warning(f"all answers ended: internal error: {error!r}")
                self._end_all("error", f"internal error: {error!r}")

    def _has_work(self) -> bool:
        return bool(self._waiting or self._calls or self._batch.tasks)

    def _turn(self) -> None:
        """What happens between two steps, and a step."""
        if self._cancel_all:
            self._end_all("cancelled")
        for task in self._batch.tasks:
            if task.owner.is_cancelled:
                self._batch.leave(task)
        self._end_overdue()
        self._admit()
        if self._calls:
            self._calls.popleft()()
        events = self._batch.step()
        self.n_running = len(self._batch.tasks)
        self._deliver((task.owner, event) for task, event in events)

    def _admit(self) -> None:
        """Give free rows to those who have waited longest."""
        while self._batch.n_free:
            with self._condition:
                if not self._waiting:
                    break
                answer = self._waiting.popleft()
                self.n_running += 1
            try:
                self._batch.join(answer.job, answer)
            except Exception as error:
                log.warning(f"an answer ended: internal error: {error!r}")
                message = f"internal error: {error!r}"
                self._deliver([(answer, EndEvent("error", len(answer.job.ids), 0, 0, message))])
        self.n_running = len(self._batch.tasks)

    def _end_overdue(self) -> None:
        """Cut answers that have taken too long; those that never began have failed."""
        now = self._clock()
        for task in self._batch.tasks:
            if task.owner.deadline <= now:
                self._batch.leave(task)
                told = f"not finished within {self._answer_seconds:.0f} s"
                end = task.build_end("length" if task.row.pieces else "error", told)
                self._deliver([(task.owner, end)])
        with self._condition:
            late = [answer for answer in self._waiting if answer.deadline <= now]
            for answer in late:
                self._waiting.remove(answer)
        told = f"no row was free within {self._answer_seconds:.0f} s"
        self._deliver((a, EndEvent("error", len(a.job.ids), 0, 0, told)) for a in late)

    def _end_all(self, reason: str, message: str = "") -> None:
        tasks: list[Task] = self._batch.tasks
        for task in tasks:
            self._batch.leave(task)
        with self._condition:
            waiting = list(self._waiting)
            self._waiting.clear()
        self.n_running = 0
        self._deliver((task.owner, task.build_end(reason, message)) for task in tasks)
        self._deliver((a, EndEvent(reason, len(a.job.ids), 0, 0, message)) for a in waiting)

    def _note(self, answer: EngineAnswer, event: Event) -> None:
        seconds = time.perf_counter() - answer.submitted
        if isinstance(event, EndEvent):
            self.rates.note_end(seconds, event)
        elif not answer.has_begun:
            answer.has_begun = True
            self.rates.note_first(seconds)

    def _deliver(self, events: Iterable[tuple[EngineAnswer, Event]]) -> None:
        """Hand events to their event loops, those of one loop together."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EngineAnswer, Event]]] = {}
        for answer, event in events:
            self._note(answer, event)
            by_loop.setdefault(answer.loop, []).append((answer, event))
        for loop, found in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, found)
            except RuntimeError:  # the loop has ended: nobody will read them
                for answer, _ in found:
                    answer.is_cancelled = True


def _put_all(events: list[tuple[EngineAnswer, Event]]) -> None:
    for answer, event in events:
        answer.put(event)
