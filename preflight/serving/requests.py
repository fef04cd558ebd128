"""Bodies of requests: read within bounds, checked field by field.

A field that has no effect here is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from preflight.core.strict_json import parse_json
from preflight.serving.errors import ApiError, wrong
from preflight.serving.fields import Fields, check_text
from preflight.serving.limits import Limits
from preflight.settings import SamplingConfig
from preflight.tokenization.chats import Message

MAX_STOPS, MAX_STOP_LENGTH = 16, 200
MAX_ANSWERS = 64  # of one request: prompts times n
MAX_MESSAGES = 1000
# OpenAI's own default for completions; an answer in a chat may fill the context.
DEFAULT_COMPLETION_TOKENS = 16

# Fields that clients send routinely and that ask for nothing which a server can leave undone.
_IDLE = frozenset(
    ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# What we do not do, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# In a message; SDKs send these back with the answers they received.
_MESSAGE_EXTRAS = ("annotations", "audio", "function_call", "name", "refusal", "tool_calls")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class AnswerRequest:
    """What a client asked for.

    Attributes:
        model: its name; ``None`` for the default one.
        messages: of a chat; empty for plain prompts.
        prompts: texts or ids; empty for a chat.
        max_tokens: ``None``: as many as fit.
        n: answers to each prompt.
        sampling: all but `max_new_tokens`, which needs the prompt's length.
        echo: the prompt comes before the completion.
    """

    model: str | None
    messages: tuple[Message, ...]
    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    n: int
    sampling: SamplingConfig
    stream: bool
    include_usage: bool
    echo: bool = False


# ---- the body ---------------------------------------------------------------------------------


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ApiError: 400, 408, 413 or 415.
    """
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.arrival_seconds):
            raw = await _receive(request, limits)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.arrival_seconds:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _check_headers(request: Request, limits: Limits) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body must not be compressed", code="unsupported_content_encoding")
    length = request.headers.get("content-length", "")
    # A client that asks first has sent nothing yet; another one would not read the answer while
    # it sends, so that `_receive` reads on for a while.
    if length.isdecimal() and int(length) > limits.body_bytes and "expect" in request.headers:
        raise _too_large(limits)


async def _receive(request: Request, limits: Limits) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limits.body_bytes:
            chunks.append(chunk)
        elif size > 8 * limits.body_bytes:
            break
        else:
            chunks.clear()
    if size > limits.body_bytes:
        raise _too_large(limits)
    return b"".join(chunks)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limits.body_bytes:,} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )


# ---- its fields -------------------------------------------------------------------------------


def read_chat(body: dict[str, Any], defaults: SamplingConfig) -> AnswerRequest:
    """A body of ``/v1/chat/completions``.

    Raises:
        ApiError: 400, with the field.
    """
    fields = Fields(body)
    messages = _read_messages(fields.need("messages"))
    logprobs = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, 20, None)
    if top is not None and not logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    limit = fields.integer("max_completion_tokens", 1, 2**31 - 1, None)
    older = fields.integer("max_tokens", 1, 2**31 - 1, None)
    return _finish(
        fields,
        defaults,
        messages=messages,
        max_tokens=older if limit is None else limit,
        logprobs=(top or 0) if logprobs else None,
    )


def read_completion(body: dict[str, Any], defaults: SamplingConfig) -> AnswerRequest:
    """A body of ``/v1/completions``.

    Raises:
        ApiError: 400, with the field.
    """
    fields = Fields(body)
    prompts = _read_prompts(fields.need("prompt"))
    logprobs = fields.integer("logprobs", 0, 20, None)
    echo = fields.boolean("echo", False)
    # 0 with `echo` scores a prompt and generates nothing.
    limit = fields.integer("max_tokens", 0 if echo else 1, 2**31 - 1, DEFAULT_COMPLETION_TOKENS)
    return _finish(
        fields,
        defaults,
        prompts=prompts,
        max_tokens=limit,
        logprobs=logprobs,
        echo=echo,
    )


def _finish(
    fields: Fields,
    defaults: SamplingConfig,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    messages: tuple[Message, ...] = (),
    prompts: tuple[Prompt, ...] = (),
    echo: bool = False,
) -> AnswerRequest:
    """The fields that both kinds of request have."""
    stream = fields.boolean("stream", False)
    n = fields.integer("n", 1, 8, 1) or 1
    if n * max(len(prompts), 1) > MAX_ANSWERS:
        raise wrong("prompt", f"asks for more than {MAX_ANSWERS} answers: prompts times n")
    wanted = AnswerRequest(
        model=fields.text("model"),
        messages=messages,
        prompts=prompts,
        max_tokens=max_tokens,
        n=n,
        sampling=_read_sampling(fields, defaults, logprobs),
        stream=stream,
        include_usage=_read_stream_options(fields, stream),
        echo=echo,
    )
    fields.refuse_rest(_UNSUPPORTED, _IDLE)
    return wanted


def _read_sampling(
    fields: Fields, defaults: SamplingConfig, logprobs: int | None
) -> SamplingConfig:
    greedy = not defaults.do_sample
    temperature = fields.number("temperature", 0, 2, 0.0 if greedy else defaults.temperature)
    top_p = fields.number("top_p", 0, 1, defaults.top_p)
    top_k = fields.integer("top_k", -1, 2**31 - 1, defaults.top_k)
    seed = fields.integer("seed", -(2**63), 2**64 - 1, None)
    return dataclasses.replace(
        defaults,
        do_sample=True,  # temperature 0 is greedy
        temperature=temperature,
        top_p=max(top_p, 1e-9),  # 0 keeps the most probable token, as everywhere
        top_k=max(top_k or 0, 0),  # -1 means all to other servers
        min_p=fields.number("min_p", 0, 1, defaults.min_p),
        stop=_read_stop(fields.take("stop")),
        logprobs=logprobs,
        seed=secrets.randbits(53) if seed is None else seed,
        beams=1,
        repetition_penalty=1.0,
    )


def _read_stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise wrong("stop", f"must be a text or a list of at most {MAX_STOPS} texts")
    for stop in stops:
        if not 1 <= len(check_text("stop", stop)) <= MAX_STOP_LENGTH:
            raise wrong("stop", f"must have texts of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _read_stream_options(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        raise wrong("stream_options", "needs stream: true")
    if not isinstance(value, dict):
        raise wrong("stream_options", "must be an object", "invalid_type")
    options = Fields(value, "stream_options.")
    usage = options.boolean("include_usage", False)
    options.refuse_rest({"include_obfuscation": (False,)}, frozenset())
    return usage


def _read_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise wrong("messages", f"must be a list of 1 to {MAX_MESSAGES:,} messages")
    return tuple(_read_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _read_message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise wrong(place, "must be an object with role and content", "invalid_type")
    fields = Fields(value, f"{place}.")
    role = fields.need("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{place}.role", f"must be one of {', '.join(_ROLES)}")
    content = _read_content(fields.need("content"), f"{place}.content")
    fields.refuse_rest(dict.fromkeys(_MESSAGE_EXTRAS, ([],)), frozenset())
    return Message(_ROLES[role], content)


def _read_content(value: Any, place: str) -> str:
    if not isinstance(value, list):
        return check_text(place, value)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong(f"{place}[{i}]", 'must be a part of type "text"')
        fields = Fields(part, f"{place}[{i}].")
        fields.take("type")
        texts.append(check_text(f"{place}[{i}].text", fields.need("text")))
        fields.refuse_rest({}, frozenset())
    return "".join(texts)


def _read_prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (check_text("prompt", value),)
    if _is_ids(value):
        return (tuple(value),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ANSWERS:
        raise wrong("prompt", f"must be a text, ids, or a list of 1 to {MAX_ANSWERS} of them")
    return tuple(
        tuple(item) if _is_ids(item) else check_text(f"prompt[{i}]", item)
        for i, item in enumerate(value)
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
