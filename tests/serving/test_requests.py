"""Bodies: each field, each refusal, and thousands of damaged requests."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from preflight.serving.errors import ApiError
from preflight.serving.limits import Limits
from preflight.serving.requests import read_chat, read_completion
from preflight.settings import SamplingConfig
from preflight.tokenization.chats import Message
from serving.fake_store import FakeModel, FakeSettings, FakeStore, serve
from serving.test_app import ask, expect

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"prompt": "hello"}
DEFAULTS = SamplingConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1)


def chat(**more: Any) -> Any:
    return read_chat(CHAT | more, DEFAULTS)


def complete(**more: Any) -> Any:
    return read_completion(TEXT | more, DEFAULTS)


def test_defaults_are_those_of_the_server():
    wanted = chat()
    sampling = wanted.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 40, 0.9)
    assert (sampling.min_p, sampling.logprobs, sampling.stop) == (0.1, None, ())
    assert (wanted.model, wanted.max_tokens, wanted.n, wanted.stream) == (None, None, 1, False)
    assert complete().max_tokens == 16
    greedy = read_chat(CHAT, SamplingConfig(do_sample=False))
    assert (greedy.sampling.temperature, greedy.sampling.do_sample) == (0, True)


def test_null_asks_for_nothing():
    names = ("model", "n", "stop", "seed", "stream", "stream_options", "logprobs", "tools")
    assert chat(**dict.fromkeys(names)).n == 1
    assert complete(**dict.fromkeys([*names, "echo", "best_of", "suffix"])).echo is False


def test_messages():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    from_sdk = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []}
    wanted = chat(messages=[{"role": "developer", "content": content}, from_sdk])
    assert wanted.messages == (Message("system", "ab"), Message("assistant", "c"))


NEUTRAL = [
    {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0},
    {"logit_bias": {}, "tools": [], "tool_choice": "auto", "functions": [], "best_of": 1},
    {"response_format": {"type": "text"}, "suffix": "", "modalities": ["text"]},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True},
]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_fields_that_ask_for_nothing_are_accepted(fields):
    assert chat(**fields).n == 1
    assert complete(**fields).n == 1


WRONG = [
    ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
    ({"presence_penalty": -1}, "presence_penalty", "unsupported_parameter"),
    ({"tools": [{}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"logit_bias": {"5": 100}}, "logit_bias", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"audio": {}}, "audio", "unsupported_parameter"),
    ({"tempo": 1}, "tempo", "unknown_parameter"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"n": 9}, "n", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"seed": 2**70}, "seed", "invalid_value"),
    ({"seed": 1.0}, "seed", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"stop": "x" * 201}, "stop", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", 1]}, "stop", "invalid_type"),
    ({"stop": {"a": 1}}, "stop", "invalid_value"),
    ({"stop": "\ud800"}, "stop", "invalid_value"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": "\udfff"}, "model", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
    (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        "unknown_parameter",
    ),
]
WRONG_CHAT = [
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"echo": True}, "echo", "unknown_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "x"}, "messages", "invalid_value"),
    ({"messages": [1]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        "messages[0].name",
        "unsupported_parameter",
    ),
]
WRONG_TEXT = [
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ["x"] * 65}, "prompt", "invalid_value"),
    ({"prompt": ["x"] * 9, "n": 8}, "prompt", "invalid_value"),
    ({"prompt": ["x", 1]}, "prompt[1]", "invalid_type"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_type"),
    ({"prompt": [True]}, "prompt[0]", "invalid_type"),
    ({"prompt": "\ud800"}, "prompt", "invalid_value"),
]


@pytest.mark.parametrize(
    ("read", "fields", "param", "code"),
    [(read, *case) for case in WRONG for read in (chat, complete)]
    + [(chat, *case) for case in WRONG_CHAT]
    + [(complete, *case) for case in WRONG_TEXT],
)
def test_wrong_fields_are_refused_by_name(read, fields, param, code):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param in error.message


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b'{"prompt": "a", "prompt": "b"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "\xff"}', 400),
        ('{"prompt": "a"}'.encode("utf-16"), 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"\\ud800": 1, "prompt": "a"}', 400),
        (b'{"prompt": [256]}', 400),
        (b'{"prompt": [-1]}', 400),
        (b'{"prompt": "' + b"a" * 600 + b'"}', 400),
        (json.dumps({str(i): i for i in range(100)}).encode(), 400),
        (b'{"prompt": "a", "model": "' + b"x" * 5000 + b'"}', 404),
        (b'{"prompt": ""}', 200),
    ],
)
def test_odd_bodies(body, status, fuzzed):
    url, _ = fuzzed
    reply = exchange(url, [wrap(body)])
    assert reply.startswith(b"HTTP/1.1 %d " % status)
    assert len(reply) < 2000  # a client's own words do not come back in full


@pytest.fixture(scope="module")
def fuzzed():
    model = FakeModel("fox")
    limits = Limits(arrival_seconds=0.5, keep_alive_seconds=1)
    with serve(FakeStore(model), FakeSettings(limits=limits)) as url:
        yield url, model


def wrap(body: bytes, path: str = "/v1/completions", extra: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode()
    head += extra or b"Content-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def exchange(url: str, parts: list[bytes], cut: bool = False) -> bytes:
    """Send the parts one by one; what comes back until the server closes."""
    place = urlsplit(url)
    received = b""
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            if cut:
                return b""
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received


STATUSES = (200, 400, 403, 404, 405, 408, 413, 415, 503)
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 0.5, -0.0, 1e308, 10**400, "", "x"),
    *("\ud800", "\0", "user", "x" * 2000, [], {}, [None], ["a", "b"], [[1]], [1, 2], [[]]),
    *({"type": "text"}, {"role": "user", "content": "x"}, [{"role": "user", "content": "x"}]),
]
NAMES = [
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "stop", "seed", "stream", "stream_options", "n", "logprobs"),
    *("top_logprobs", "echo", "tools", "best_of", "user", "unknown", "\ud800", "role"),
]


def make_request(source: random.Random) -> tuple[list[bytes], bool]:
    """One damaged request: its parts, and whether the connection is cut behind them."""
    is_chat = source.random() < 0.5
    body = dict(CHAT if is_chat else TEXT)
    for name in source.sample(NAMES, source.randrange(5)):
        body[name] = source.choice(VALUES)
    raw = json.dumps(body).encode(source.choice(["utf-8"] * 8 + ["utf-16", "utf-32"]))
    extra = source.choice(
        [b""] * 8
        + [b"Content-Type: text/plain\r\n", b"Content-Type: application/json;charset=x\r\n"]
        + [b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n", b"X: \xff\r\n"]
        + [b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"]
        + [b"Content-Type: application/json\r\nContent-Length: 5\r\n", b"Expect: 1\r\n"]
    )
    path = source.choice(["/v1/chat/completions" if is_chat else "/v1/completions"] * 6 + ["/"])
    data = bytearray(wrap(raw, path, extra))
    kind = source.randrange(6)
    if kind == 0:
        for _ in range(source.randrange(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
    elif kind == 1:
        del data[source.randrange(len(data)) :]
    elif kind == 2:
        start = source.randrange(len(data))
        data[start:start] = data[source.randrange(len(data)) :][: source.randrange(200)]
    cuts = sorted(source.sample(range(len(data) + 1), min(source.randrange(4), len(data))))
    parts = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return parts, source.random() < 0.1


@pytest.mark.parametrize("n", [500, pytest.param(2_000, marks=pytest.mark.slow)])
def test_damaged_requests_are_answered(fuzzed, n, full):
    """No answer of 500, no hang, and no row is left behind."""
    n = 10_000 if full else n
    url, model = fuzzed

    def try_one(seed: int) -> bytes:
        parts, cut = make_request(random.Random(seed))
        return exchange(url, parts, cut)[:13]

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(try_one, range(n)))
    seen = {reply.split(b" ")[1] if reply else b"" for reply in replies}
    assert seen <= {b"", *(b"%d" % code for code in STATUSES)}
    assert {b"200", b"400", b"408", b"415"} <= seen
    assert sum(reply == b"" for reply in replies) < n / 4  # cut by the client, or a head cut short
    expect(lambda: not model.running, 20)
    assert ask(url, "GET", "/health")[0] == 200
    _, metrics = ask(url, "GET", "/metrics")
    assert 'status="500"' not in metrics
