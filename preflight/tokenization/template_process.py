"""Rendering chats in a process of its own, which is ended when a template takes too long.

A template can loop, multiply texts and search for ways out. No check of its source excludes that,
so its process has a limit of time and of memory, and gets nothing but the chats.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.libraries import import_library
from preflight.core.processes import shield_children
from preflight.tokenization.chat_template import ChatTemplate
from preflight.tokenization.chats import Message

# The process ends itself after a second of work. It may have to wait for a processor, and a system
# without such timers waits for this.
_PATIENCE_SECONDS, _START_SECONDS = 20.0, 120.0


@dataclass(frozen=True)
class RenderJob:
    """A chat to render.

    Attributes:
        messages: its turns.
        place: for messages.
        prompt: whether the beginning of an answer is to follow (``add_generation_prompt``).
        answers: ``all`` or ``last``: those to find by rendering what comes before them; else those
            that the template marks.
    """

    messages: Sequence[Message]
    place: str = ""
    prompt: bool = False
    answers: str = ""


@dataclass(frozen=True)
class Rendering:
    """A chat as text.

    Attributes:
        text: what the template writes.
        spans: begin and end of each answer in it, in characters.
        rewrites: the text of a part of the chat is not the beginning of the whole's, so that
            answers cannot be found by it. There are no spans then.
    """

    text: str
    spans: list[tuple[int, int]]
    rewrites: bool


class TemplateProcess:
    """The process. It starts when it is first needed, and again after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._n_awaited = 0  # answers to the request that is being answered
        self._owner = 0  # the id of the process that started it: a fork does not own it

    @contextlib.contextmanager
    def rendering(
        self,
        template: ChatTemplate,
        variables: Mapping[str, str],
        jobs: Sequence[RenderJob],
        *,
        today: bool = False,
    ) -> Iterator[Iterator[Rendering]]:
        """The renderings of `jobs`, in order, while the next ones are still being made.

        Args:
            template: it may be a stranger's.
            variables: what the template knows besides the messages.
            jobs: at least one.
            today: `strftime_now` tells today's date; else always the same day.

        Raises:
            PreflightError: the template's code, where it fails or needs too much; TEXT, where it
                refuses a chat (`raise_exception`).
        """
        request = {
            "source": template.source,
            "variables": dict(variables),
            "today": today,
            "jobs": [
                {
                    "messages": [(each.role, each.content) for each in job.messages],
                    "prompt": job.prompt,
                    "answers": job.answers,
                }
                for job in jobs
            ],
        }
        with self._lock:
            connection = self._start(template)
            self._n_awaited = len(jobs)
            try:
                with contextlib.suppress(ConnectionError):  # told when the answer is missing
                    connection.send_bytes(json.dumps(request).encode())
                yield self._receive(connection, template, jobs)
            finally:
                if self._n_awaited:  # nobody takes these answers any more
                    self._end()

    def _receive(
        self, connection: Connection, template: ChatTemplate, jobs: Sequence[RenderJob]
    ) -> Iterator[Rendering]:
        patience = _START_SECONDS  # it may still be importing
        for job in jobs:
            try:
                found = connection.recv_bytes() if connection.poll(patience) else None
            except (EOFError, ConnectionError):
                found = None
            patience = _PATIENCE_SECONDS
            if found is None:
                raise _describe_fault(template, job, "it needs more than 1 s or 512 MiB")
            self._n_awaited -= 1
            answer = json.loads(found)
            if "refusal" in answer:
                raise PreflightError(
                    ExitCode.TEXT,
                    f"{job.place or 'the chat'}: {template.name} refuses it: {answer['refusal']}",
                    "change the chat, or name another template with --chat-template",
                )
            if "fault" in answer:
                raise _describe_fault(template, job, answer["fault"])
            spans = [(begin, end) for begin, end in answer["spans"]]
            yield Rendering(answer["text"], spans, answer["rewrites"])

    def _start(self, template: ChatTemplate) -> Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        # It imports jinja2, which this process has no other use for.
        serve = import_library(f"{__package__}.template_rendering", "jinja2", template.name).serve
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # A daemon: Python would wait for another at its exit.
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        try:
            with shield_children():
                self._process.start()
        except OSError as error:
            self._process = self._connection = None
            raise PreflightError(
                ExitCode.WORKER_LOST,
                f"the process that renders chats cannot be started: {error.strerror or error}",
                "run the same command again",
            ) from None
        theirs.close()
        self._owner = os.getpid()
        return self._connection

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _describe_fault(template: ChatTemplate, job: RenderJob, fault: str) -> PreflightError:
    at = f" at {job.place}" if job.place else ""
    return PreflightError(
        template.code,
        f"{template.name} does not work{at}: {fault}",
        "name another with --chat-template, or correct it",
    )


TEMPLATE_PROCESS = TemplateProcess()
