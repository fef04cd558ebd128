"""What the process does that renders chats: it runs a stranger's template, within limits.

The template sees what `transformers` shows it (``utils/chat_template_utils.py``): the same
variables, functions and filters, in Jinja's sandbox. ``{% generation %}`` leaves marks in the text
that no content can forge, since they hold a random number.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import secrets
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from preflight.core.processes import end_with_parent

MAX_SECONDS = 1.0  # of the processor, for a chat
_MAX_BYTES = 512 * 2**20  # of memory, beyond what the process has when it starts
# Characters of a text: of the template's own, for each message, and for each of the contents.
_MAX_TEXT = (2**16, 2**10, 8)
_MAX_KEPT = 8  # templates
_BEGIN, _END = (f"\ue000{secrets.token_hex(16)}{kind}\ue001" for kind in "be")
_MARKS = re.compile(f"({_BEGIN}|{_END})")
# In training, so that the same chats give the same ids every day.
_FIXED_DAY = datetime.datetime(2024, 7, 26)


class _Refusal(jinja2.TemplateError):
    """The template called `raise_exception`: the chat is not one that it can write."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, around what the model is to write."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name one `self`
        self, values = args[0], dict(*args[1:], **kwargs)
        jinja2.utils.Namespace.__init__(self, {})
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: Any, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{str(name)[:40]!r} must not begin with _")
        super().__setitem__(name, value)


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message)[:200])


def _write_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class Renderer:
    """Renders chats. Templates are compiled once."""

    def __init__(self) -> None:
        self._now = _FIXED_DAY
        self._environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self._environment.filters["tojson"] = _write_json
        self._environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: self._now.strftime(form),
            "namespace": _Namespace,
        }
        self._templates: dict[str, jinja2.Template] = {}

    def answer(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One answer for each job: its text and the spans of its answers, or its fault."""
        self._now = datetime.datetime.now() if request["today"] else _FIXED_DAY
        for job in request["jobs"]:
            try:
                yield self._do(request["source"], request["variables"], job)
            except _Refusal as error:
                yield {"refusal": str(error)}
            except Exception as error:
                line = getattr(error, "lineno", None)
                place = f"line {line}: " if line else ""
                yield {"fault": f"{place}{type(error).__name__}: {str(error)[:200]}"}

    def _do(self, source: str, variables: dict[str, str], job: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in job["messages"]]

        def render(n_messages: int, *, prompt: bool) -> str:
            marked = self._render(source, variables, messages[:n_messages], prompt)
            return _take_marks_out(marked)[0]

        n = len(messages)
        text, spans = _take_marks_out(self._render(source, variables, messages, job["prompt"]))
        answer = {"text": text, "spans": spans, "rewrites": False}
        if job["answers"]:
            spans.clear()
        if job["answers"] == "last":
            before = render(n - 1, prompt=True) if n > 1 else ""
            # A prompt may begin what the answer does not have, such as a thought.
            spans.append([_count_common(before, text), len(text)])
        if job["answers"] == "all":
            for i in (i for i in range(n) if messages[i]["role"] == "assistant"):
                before = render(i, prompt=True) if i else ""
                after = render(i + 1, prompt=False) if i + 1 < n else text
                if not (text.startswith(after) and after.startswith(before)):
                    return answer | {"rewrites": True}
                spans.append([len(before), len(after)])
        return answer

    def _render(
        self, source: str, variables: dict[str, str], messages: list[dict[str, str]], prompt: bool
    ) -> str:
        by_text, by_message, by_content = _MAX_TEXT
        n_characters = sum(len(message["content"]) for message in messages)
        limit = by_text + by_message * len(messages) + by_content * n_characters
        with _limited_time():
            template = self._templates.get(source)
            if template is None:
                if len(self._templates) >= _MAX_KEPT:
                    self._templates.clear()
                template = self._templates[source] = self._environment.from_string(source)
            pieces, length = [], 0
            for piece in template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise OverflowError(f"the text has more than {limit:,} characters")
        return "".join(pieces)


def _count_common(first: str, second: str) -> int:
    """Characters at the beginning that two texts have in common."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), len(second))


def _take_marks_out(text: str) -> tuple[str, list[list[int]]]:
    """The text without marks, and what lay between them: (begin, end) of each."""
    if _BEGIN not in text:
        return text, []
    pieces, spans, length, depth = [], [], 0, 0
    for piece in _MARKS.split(text):
        if piece == _BEGIN:
            if not depth:
                spans.append([length, length])
            depth += 1
        elif piece == _END:
            depth -= 1
            spans[-1][1] = length
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """End the process when the block takes too much of the processor, whatever it is doing."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    yield
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there is no such limit
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MAX_BYTES, size + _MAX_BYTES))


def serve(connection: Connection) -> None:
    """Answer requests until the other side has gone."""
    end_with_parent()
    _limit_memory()
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process
    renderer = Renderer()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            for answer in renderer.answer(json.loads(connection.recv_bytes())):
                connection.send_bytes(json.dumps(answer).encode())
