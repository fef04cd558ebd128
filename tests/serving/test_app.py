"""The server as OpenAI's own client sees it, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from preflight.serving.limits import Limits
from serving.fake_store import CONTEXT, FakeModel, FakeSettings, FakeStore, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    sent = None if body is None else json.dumps(body)
    if sent is not None:
        headers.setdefault("Content-Type", "application/json")
    connection.request(method, path, sent, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(data) if is_json else data.decode()


def expect(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- what is answered ---------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fox", "owl", "broken"]
    assert client.models.retrieve("owl").created == 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="no model cat") as caught:
        client.models.retrieve("cat")
    assert caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_are_equal(client, model):
    wanted: dict[str, Any] = {
        "model": "fox",
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be"}]}, *HELLO],
        "max_completion_tokens": 12,
        "seed": 5,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 4,
        "user": "somebody",
    }
    whole = client.chat.completions.create(**wanted)
    assert bytes(model.jobs[-1].ids) == b"system: Be\nuser: hello\n"
    assert model.jobs[-1].stop_ids == {0}
    chunks = list(
        client.chat.completions.create(
            **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == len(b"system: Be\nuser: hello\n")
    assert whole.usage.prompt_tokens_details.cached_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({choice.message.content for choice in whole.choices}) == 3  # each draws its own
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason == "length"
        streamed = [token for c in mine if c.logprobs for token in c.logprobs.content]
        assert streamed == choice.logprobs.content
        assert len(streamed) == 12
        assert all(len(token.top_logprobs) == 4 for token in streamed)
        spoken = b"".join(bytes(token.bytes) for token in streamed).decode()
        assert spoken.lstrip() == choice.message.content


def test_the_same_seed_gives_the_same_answer(client):
    def say(**more: Any) -> str:
        answer = client.chat.completions.create(model="fox", messages=HELLO, max_tokens=20, **more)
        return str(answer.choices[0].message.content)

    assert say(seed=-3) == say(seed=-3)
    assert say() != say()


def test_sampling_reaches_the_engine(client, model):
    extra = {"top_k": -1, "min_p": 0.25}
    client.completions.create(
        model="fox", prompt="a", temperature=0, top_p=0.5, stop=["x", "\n\n"], extra_body=extra
    )
    sampling = model.jobs[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.min_p, sampling.stop, sampling.max_new_tokens) == (0.25, ("x", "\n\n"), 16)
    assert (sampling.logprobs, sampling.beams, sampling.do_sample) == (None, 1, True)
    client.completions.create(model="fox", prompt="a" * (CONTEXT - 3), max_tokens=100)
    assert model.jobs[-1].sampling.max_new_tokens == 3  # what fits


def test_stop_ends_an_answer(client):
    answer = client.completions.create(model="fox", prompt="a", stop=",", max_tokens=300, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    assert "," not in answer.choices[0].text


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([65, 66], ["AB"]), ([[65], [66]], ["A", "B"])],
)
def test_completions_of_every_kind_of_prompt(client, model, prompt, texts):
    answer = client.completions.create(model="fox", prompt=prompt, max_tokens=2, n=2, seed=1)
    assert [bytes(job.ids).decode() for job in model.jobs[-2 * len(texts) :]] == [
        text for text in texts for _ in range(2)
    ]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))
    assert answer.usage.prompt_tokens == sum(map(len, texts))


def test_echo_scores_the_prompt_as_the_harness_asks(client):
    """lm-evaluation-harness reads ``token_logprobs[ctxlen:-1]`` and ``top_logprobs``."""
    wanted: dict[str, Any] = {"model": "fox", "prompt": [[65, 66, 67]], "logprobs": 1, "seed": 1}
    answer = client.completions.create(**wanted, max_tokens=1, echo=True, temperature=0)
    found = answer.choices[0].logprobs
    assert found.token_logprobs[:3] == [None, -0.66, -0.67]
    assert found.top_logprobs[:3] == [None, {"B": -0.66}, {"C": -0.67}]
    assert found.text_offset == [0, 1, 2, 3]
    assert len(found.tokens) == 4
    assert answer.choices[0].text == "ABC" + found.tokens[3]
    only = client.completions.create(**wanted, max_tokens=0, echo=True)
    assert only.choices[0].logprobs.token_logprobs == [None, -0.66, -0.67]
    assert (only.choices[0].text, only.usage.completion_tokens) == ("ABC", 0)
    chunks = list(client.completions.create(**wanted, max_tokens=1, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [v for c in streamed for v in c.token_logprobs] == found.token_logprobs
    assert [v for c in streamed for v in c.text_offset] == found.text_offset
    plain = client.completions.create(model="fox", prompt="Größe", max_tokens=1, echo=True)
    assert plain.choices[0].text.startswith("Größe")


def test_async_clients_are_served_side_by_side(url):
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="x") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=("fox", "owl")[i % 2], messages=HELLO, max_tokens=30, seed=i
                    )
                    for i in range(20)
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == asyncio.run(ask_all())


def test_errors_are_those_of_openai(client, model):
    def fails(kind: type[openai.APIStatusError], **more: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": "fox", "messages": HELLO} | more)
        return caught.value

    assert fails(openai.NotFoundError, model="cat").code == "model_not_found"
    long = [{"role": "user", "content": "x" * CONTEXT}]
    assert fails(openai.BadRequestError, messages=long).code == "context_length_exceeded"
    refused = [{"role": "user", "content": "REFUSE"}]
    assert "template refuses" in fails(openai.BadRequestError, messages=refused).message
    error = fails(openai.BadRequestError, frequency_penalty=0.5)
    assert (error.param, error.code) == ("frequency_penalty", "unsupported_parameter")
    assert "weights are damaged" in fails(openai.InternalServerError, model="broken").message
    model.max_running = 2
    busy = fails(openai.InternalServerError, n=3)
    model.max_running = 64
    assert (busy.status_code, busy.response.headers["retry-after"]) == (503, "7")
    assert not model.running  # the two that had a place were cancelled


def test_an_engine_that_fails_tells_the_client(client, model):
    model.fails_at = 2
    try:
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.chat.completions.create(model="fox", messages=HELLO, n=2)
        stream = client.chat.completions.create(model="fox", messages=HELLO, stream=True)
        said: list[str] = []  # tokens that come while the client is busy share a piece
        with pytest.raises(openai.APIError, match="out of memory"):
            said.extend(piece.choices[0].delta.content or "" for piece in stream)
        assert 1 <= len(said) <= 3  # the role, and two tokens
    finally:
        model.fails_at = -1
    assert not model.running


def test_health_and_metrics(url):
    status, health = ask(url, "GET", "/health")
    assert status == 200
    assert health["models"]["fox"]["rows"] == 0
    ask(url, "POST", "/v1/completions", {"prompt": "abc", "max_tokens": 5})
    _, text = ask(url, "GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(lines['preflight_tokens_total{kind="generated"}']) >= 5
    assert int(lines['preflight_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert lines['preflight_model_rows{model="fox"}'] == "0"
    n = int(lines["preflight_answer_seconds_count"])
    assert int(lines['preflight_answer_seconds_bucket{le="+Inf"}']) == n >= 1
    assert float(lines["preflight_first_token_seconds_sum"]) > 0


# ---- clients that leave, stall or come in too large a number ------------------------------------


def send_request(url: str, body: dict[str, Any]) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    connection.settimeout(10)
    connection.connect((parts.hostname, parts.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_disconnects_free_their_rows(stream):
    """At 15 points each of a stream and of a whole answer, most of them after the first token."""
    model = FakeModel("slow", delay=0.02)
    with serve(FakeStore(model)) as url:
        for point in range(15):
            body = {"messages": HELLO, "stream": stream, "n": 2, "max_tokens": 100}
            connection = send_request(url, body)
            expect(lambda: len(model.running) == 2, 5)
            if stream and point % 3:
                while b"content" not in connection.recv(300):
                    pass
            time.sleep(0.004 * point)
            answers = model.answers[-2:]
            left = time.monotonic()
            connection.close()
            expect(lambda: not model.running, 0.5)
            assert all(answer.cancelled_at is not None for answer in answers)
            assert all(answer.cancelled_at - left < 0.5 for answer in answers)
        assert ask(url, "GET", "/health")[0] == 200


def test_an_answer_that_takes_too_long_ends(url):
    model = FakeModel("slow", delay=0.05)
    with serve(FakeStore(model), FakeSettings(limits=Limits(answer_seconds=0.3))) as url:
        body = {"messages": HELLO, "max_tokens": 100}
        status, told = ask(url, "POST", "/v1/chat/completions", body)
        assert (status, told["error"]["code"]) == (504, "timeout")
        status, text = ask(url, "POST", "/v1/chat/completions", body | {"stream": True})
        assert status == 200
        assert '"code":"timeout"' in text.splitlines()[-2]
        expect(lambda: not model.running, 0.5)


def test_a_client_that_reads_nothing_is_cut_off():
    model = FakeModel("wordy", delay=0, script=["word " * 20_000] * 100)
    with serve(FakeStore(model), FakeSettings(limits=Limits(stall_seconds=0.3))) as url:
        connection = send_request(url, {"messages": HELLO, "stream": True})
        expect(lambda: bool(model.running), 5)
        expect(lambda: not model.running, 20)
        assert ask(url, "GET", "/health")[0] == 200
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(2**20):
                pass  # what had been sent before
        connection.close()


def test_heads_and_bodies_must_arrive_in_time():
    limits = Limits(arrival_seconds=0.4, keep_alive_seconds=1)
    with serve(FakeStore(FakeModel("fox")), FakeSettings(limits=limits)) as url:
        parts = urlsplit(url)
        for sent in (b"", b"GET / HTTP/1.1\r\nHo"):
            connection = socket.create_connection((parts.hostname, parts.port), timeout=5)
            connection.sendall(sent)
            begun = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            assert 0.2 < time.monotonic() - begun < 2
            connection.close()
        connection = socket.create_connection((parts.hostname, parts.port), timeout=5)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 10\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        connection.close()


def test_connections_above_the_limit_are_told_to_come_back():
    model = FakeModel("fox", delay=0.02)
    with serve(FakeStore(model), FakeSettings(limits=Limits(connections=4))) as url:
        parts = urlsplit(url)
        held = [send_request(url, {"messages": HELLO, "max_tokens": 200}) for _ in range(4)]
        expect(lambda: len(model.running) == 4, 5)
        status, told = ask(url, "GET", "/health")
        assert (status, told["error"]["code"]) == (503, "overloaded")
        more = [socket.create_connection((parts.hostname, parts.port)) for _ in range(8)]
        for connection in [*more, *held]:
            connection.close()
        expect(lambda: not model.running, 1)
        expect(lambda: ask(url, "GET", "/health")[0] == 200, 1)
