"""A store whose model speaks from a script, one word at a time; and the server, run for real."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from preflight.core.errors import ExitCode, PreflightError
from preflight.serving.app import build_app
from preflight.serving.limits import Limits
from preflight.serving.listening import build_server
from preflight.serving.protocol import Alternative, EndEvent, Job, QueueFullError, TokenEvent
from preflight.settings import SamplingConfig
from preflight.tokenization.chats import Message, PromptTooLongError

WORDS = (" the", " quick", " brown", " fox", " Größe", " 🦊", ",", " jumps", " over", "\n")
N_BYTES, CONTEXT = 256, 512


@dataclasses.dataclass(frozen=True)
class FakeSettings:
    host: str = "127.0.0.1"
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)


class FakeAnswer:
    """A scripted answer; it counts as running until its end or `cancel`."""

    def __init__(self, model: FakeModel, job: Job) -> None:
        self.model, self.job = model, job
        self.cancelled_at: float | None = None
        model.running.add(self)

    def cancel(self) -> None:
        if self in self.model.running:
            self.cancelled_at = time.monotonic()
            self.model.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[TokenEvent | EndEvent]:
        sampling = self.job.sampling
        source = random.Random(f"{sampling.seed} {self.job.index}")
        reason, n_tokens, text = "length", 0, ""
        for n in range(sampling.max_new_tokens):
            await asyncio.sleep(self.model.delay)
            if self not in self.model.running:
                return
            if n == self.model.fails_at:
                self.model.running.discard(self)
                yield EndEvent("error", len(self.job.ids), n, message="out of memory")
                return
            word = self.model.next_word(n, source)
            if word is None or any(stop in text + word for stop in sampling.stop):
                reason = "stop"
                break
            text, n_tokens = text + word, n_tokens + 1
            yield self._event(word, source)
        self.model.running.discard(self)
        yield EndEvent(reason, len(self.job.ids), n_tokens, min(3, len(self.job.ids)))

    def _event(self, word: str, source: random.Random) -> TokenEvent:
        n = self.job.sampling.logprobs
        if n is None:
            return TokenEvent(word)
        weights = sorted((source.random() ** 6 for _ in range(max(n, 1))), reverse=True)
        total = sum(weights) * 1.1
        others = [word, *random.Random(word).sample([w for w in WORDS if w != word], 9)]
        others += [f" w{i}" for i in range(10)]
        tops = tuple(
            Alternative(i, text, text.encode(), math.log(weight / total))
            for i, (text, weight) in enumerate(zip(others[:n], weights, strict=False))
        )
        chosen = tops[0] if tops else Alternative(0, word, word.encode(), -0.5)
        return TokenEvent(word, chosen, tops)


class FakeModel:
    """Ids are bytes; one id a byte."""

    def __init__(self, name: str, delay: float = 0.0, script: Sequence[str] | None = None) -> None:
        self.name, self.context_length, self.created = name, CONTEXT, 1_700_000_000
        self.delay, self.script = delay, script
        self.running: set[FakeAnswer] = set()
        self.jobs: list[Job] = []
        self.answers: list[FakeAnswer] = []
        self.max_running = 64
        self.fails_at = -1

    def next_word(self, n: int, source: random.Random) -> str | None:
        if self.script is None:
            return source.choice(WORDS)
        return self.script[n] if n < len(self.script) else None

    def encode_chat(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        if messages[-1].content == "REFUSE":
            raise PreflightError(ExitCode.TEXT, "the template refuses this chat")
        ids = [byte for m in messages for byte in f"{m.role}: {m.content}\n".encode()]
        if len(ids) > max(CONTEXT - max_new_tokens, CONTEXT // 2):
            raise PromptTooLongError(ExitCode.TEXT, f"the message has {len(ids)} tokens")
        return ids

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode()) or [0]

    @property
    def chat_stop_ids(self) -> frozenset[int]:
        return frozenset({0})

    def check_ids(self, ids: Sequence[int]) -> None:
        if not all(0 <= i < N_BYTES for i in ids):
            raise ValueError(f"ids must be from 0 to {N_BYTES - 1}")

    async def score(self, ids: Sequence[int], n_alternatives: int) -> list[TokenEvent]:
        events = []
        for place, token in enumerate(ids):
            data = bytes([token])
            text = data.decode(errors="replace")
            chosen = Alternative(token, text, data, -token / 100 if place else 0.0)
            events.append(TokenEvent(text, chosen, (chosen,) * n_alternatives if place else ()))
        return events

    def submit(self, job: Job) -> FakeAnswer:
        if len(self.running) >= self.max_running:
            raise QueueFullError(7)
        self.jobs.append(job)
        self.answers.append(FakeAnswer(self, job))
        return self.answers[-1]


class FakeStore:
    def __init__(self, *models: FakeModel) -> None:
        self.models = {model.name: model for model in models}

    def names(self) -> list[str]:
        return [*self.models, "broken"]

    async def open(self, name: str) -> FakeModel:
        if name == "broken":
            raise PreflightError(ExitCode.CHECKPOINT, "the weights are damaged")
        return self.models[name]

    def describe(self) -> Mapping[str, Any]:
        return {
            name: {"loaded": True, "rows": len(model.running), "created": model.created}
            for name, model in self.models.items()
        }

    async def close(self, seconds: float) -> None:
        pass


@contextlib.contextmanager
def serve(store: FakeStore, settings: FakeSettings | None = None) -> Iterator[str]:
    """The server on a port of its own, in a thread; its address."""
    settings = settings or FakeSettings()
    server: uvicorn.Server = build_server(
        build_app(store, settings), "127.0.0.1", 0, settings.limits
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(10)
    listener.close()
    assert not thread.is_alive()
