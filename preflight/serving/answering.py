"""From a checked request to its answer, whole or as a stream.

Whoever hangs up, waits too long or meets an error frees the rows of all answers of the request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from preflight.serving.errors import ApiError, busy, encode_json
from preflight.serving.limits import Limits
from preflight.serving.metrics import Metrics
from preflight.serving.protocol import (
    Answer,
    EndEvent,
    Job,
    QueueFullError,
    ServedModel,
    TokenEvent,
)
from preflight.serving.requests import AnswerRequest
from preflight.serving.responses import Choice, Form, count_usage

_SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
)


@dataclass(frozen=True)
class Prompted:
    """A prompt, ready for the engine.

    Attributes:
        ids: of the prompt.
        echoed: text that comes before the completion.
        scored: the prompt's tokens with their log-probabilities, for `echo`.
    """

    ids: tuple[int, ...]
    echoed: str = ""
    scored: tuple[TokenEvent, ...] = ()


class AnswerResponse(Response):
    """The answers to one request. It is what the endpoint returns; Starlette calls it."""

    def __init__(
        self,
        model: ServedModel,
        wanted: AnswerRequest,
        prompts: Sequence[Prompted],
        form: Form,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        super().__init__()  # its own headers are not sent
        self._model, self._wanted, self._prompts, self._form = model, wanted, prompts, form
        self._metrics = metrics
        self._started = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + limits.answer_seconds
        self._choices = [Choice(i) for i in range(len(prompts) * wanted.n)]
        self._is_chat = bool(wanted.messages)
        self._with_logprobs = wanted.sampling.logprobs is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves."""
        answers = self._submit()
        try:
            work = self._stream(answers, send) if self._wanted.stream else self._send(answers, send)
            await until_gone(receive, work)
        finally:
            for answer in answers:
                answer.cancel()

    # ---- the engine -------------------------------------------------------------------------

    def _submit(self) -> list[Answer]:
        """Queue an answer for each choice.

        Raises:
            ApiError: 503, when too many are waiting.
        """
        answers: list[Answer] = []
        if self._wanted.max_tokens == 0:
            return answers
        try:
            for choice in self._choices:
                answers.append(self._model.submit(self._job(choice.index)))
        except QueueFullError as error:
            for answer in answers:
                answer.cancel()
            raise busy("too many requests are waiting", error.retry_after_seconds) from None
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _job(self, index: int) -> Job:
        prompt, which = divmod(index, self._wanted.n)
        ids = self._prompts[prompt].ids
        room = self._model.context_length - len(ids)
        limit = min(self._wanted.max_tokens or room, room)
        sampling = dataclasses.replace(self._wanted.sampling, max_new_tokens=limit)
        stops = self._model.chat_stop_ids if self._is_chat else frozenset()
        return Job(ids, sampling, stops, which)

    async def _events(
        self, answers: Sequence[Answer]
    ) -> AsyncIterator[tuple[Choice, TokenEvent, str]]:
        """The tokens of all answers as they come, with the text to show.

        Raises:
            ApiError: 503 or 504, when an answer fails, is cancelled or takes too long.
        """
        for choice in self._choices:
            prompt = self._prompts[choice.index // self._wanted.n]
            for token in self._echo(prompt):
                yield choice, token, token.text
                choice.add(token, token.text)
            choice.n_scored = len(choice.tokens)
            if not answers:
                choice.end = EndEvent("length", len(prompt.ids), 0)
        async for index, event in merge(answers, self._deadline):
            choice = self._choices[index]
            if isinstance(event, EndEvent):
                self._finish(choice, event)
                continue
            if not choice.has_begun:
                choice.has_begun = True
                self._metrics.first_token.observe(time.monotonic() - self._started)
            # A template has white space before an answer; it is no part of what is said.
            text = event.text if choice.text or not self._is_chat else event.text.lstrip()
            yield choice, event, text
            choice.add(event, text)

    @staticmethod
    def _echo(prompt: Prompted) -> Sequence[TokenEvent]:
        if prompt.scored:
            return prompt.scored
        return [TokenEvent(prompt.echoed)] if prompt.echoed else []

    def _finish(self, choice: Choice, end: EndEvent) -> None:
        self._metrics.count_answer(
            end.reason, end.n_prompt_tokens, end.n_cached_tokens, end.n_tokens
        )
        if end.reason == "cancelled":
            raise busy("the server is stopping", 10)
        if end.reason == "error":
            raise ApiError(503, f"the model failed: {end.message}", code="model_error")
        choice.end = end
        self._metrics.duration.observe(time.monotonic() - self._started)

    def _usage(self) -> dict[str, Any]:
        ends = [choice.end for choice in self._choices if choice.end is not None]
        return count_usage((len(prompt.ids) for prompt in self._prompts), ends)

    # ---- what is sent -----------------------------------------------------------------------

    async def _send(self, answers: Sequence[Answer], send: Send) -> None:
        """The whole answer at its end."""
        async for _ in self._events(answers):
            pass
        choices = [self._form.whole(choice, self._with_logprobs) for choice in self._choices]
        whole = self._form.envelope(False) | {"choices": choices, "usage": self._usage()}
        body = encode_json(whole)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, answers: Sequence[Answer], send: Send) -> None:
        """Chunks as server-sent events."""
        headers = list(_SSE_HEADERS)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks(answers):
                await _send_event(send, encode_json(chunk))
        except ApiError as error:  # the status is out already
            await _send_event(send, encode_json(error.body))
        else:
            await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self, answers: Sequence[Answer]) -> AsyncIterator[dict[str, Any]]:
        envelope = self._form.envelope(True)
        if self._wanted.include_usage:
            envelope["usage"] = None
        for choice in self._choices:
            if opening := self._form.opening(choice.index):
                yield envelope | {"choices": [opening]}
        told: set[int] = set()
        async for choice, event, text in self._events(answers):
            logprobs = self._chunk_logprobs(choice, event)
            if text or logprobs is not None:
                piece = self._form.piece(choice.index, text, logprobs, None)
                yield envelope | {"choices": [piece]}
            for ending in self._endings(told):
                yield envelope | {"choices": [ending]}
        for ending in self._endings(told):
            yield envelope | {"choices": [ending]}
        if self._wanted.include_usage:
            yield envelope | {"choices": [], "usage": self._usage()}

    def _endings(self, told: set[int]) -> list[dict[str, Any]]:
        """The last chunks of the choices that have ended since."""
        ended = [c for c in self._choices if c.end is not None and c.index not in told]
        told.update(choice.index for choice in ended)
        return [
            self._form.piece(choice.index, "", None, choice.end.reason)
            for choice in ended
            if choice.end is not None
        ]

    def _chunk_logprobs(self, choice: Choice, event: TokenEvent) -> Any:
        if not self._with_logprobs or event.chosen is None:
            return None
        # Only what `echo` puts first has nothing before it.
        first = len(choice.tokens) if self._wanted.echo else 1
        return self._form.logprobs([event], [len(choice.text)], first)


async def _send_event(send: Send, data: bytes) -> None:
    body = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def merge(
    answers: Sequence[Answer], deadline: float
) -> AsyncIterator[tuple[int, TokenEvent | EndEvent]]:
    """The events of several answers as they come, until all have ended.

    Args:
        answers: each is iterated once.
        deadline: on the loop's clock.

    Raises:
        ApiError: 504 at the deadline.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, TokenEvent | EndEvent | Exception]] = asyncio.Queue(16)

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for event in answer:
                await queue.put((index, event))
                if isinstance(event, EndEvent):
                    return
            await queue.put((index, EndEvent("cancelled", 0, 0)))
        except Exception as error:
            await queue.put((index, error))

    tasks = [loop.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
    n_left = len(tasks)
    try:
        while n_left:
            try:
                # Not wait_for: in Python 3.11 it loses a cancellation that comes with an event.
                async with asyncio.timeout_at(deadline):
                    index, event = await queue.get()
            except TimeoutError:
                raise ApiError(
                    504, "the answer took too long: ask for fewer tokens", code="timeout"
                ) from None
            if isinstance(event, Exception):
                raise event
            n_left -= isinstance(event, EndEvent)
            yield index, event
    finally:
        await _stop(tasks)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; cancel it as soon as the client hangs up."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        await _stop(tasks)


async def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
