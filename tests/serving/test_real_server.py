"""The whole server with a real model behind it: HTTP, application, store, engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from serving_models import make_model, make_tokenizer, save_run

from generate import generate_text
from preflight.device.runtime import Runtime
from preflight.serving.engine import Engine
from preflight.serving.limits import Limits
from preflight.serving.store import Store, find_entries
from preflight.settings import SamplingConfig
from serving.fake_store import FakeSettings, serve
from serving.test_app import HELLO, ask, expect, send_request
from serving.test_engine import slow_down
from serving.test_requests import STATUSES, exchange, make_request

CPU = Runtime(torch.device("cpu"), torch.float32, False, ())
CONTEXT = 512


@contextlib.contextmanager
def serve_run(folder: Path, settings: FakeSettings | None = None) -> Iterator[tuple[str, Engine]]:
    """The address of a server with one small model of two rows, and the model's engine."""
    save_run(folder / "run", make_model("llama", CONTEXT))
    store = Store(find_entries([str(folder / "run")]), CPU, rows=2)
    try:
        with serve(store, settings) as url:
            assert ask(url, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
            yield url, store._entries["run"].served.engine
    finally:
        asyncio.run(store.close(0))


def test_answers_are_those_of_the_model(tmp_path):
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.9, seed=4)
    expected = generate_text(make_model("llama", CONTEXT), make_tokenizer(), "ab", sampling)
    body = {"prompt": "ab", "max_tokens": 20, "temperature": 0.9, "seed": 4}
    with serve_run(tmp_path) as (url, _), ThreadPoolExecutor(6) as pool:
        replies = pool.map(lambda _: ask(url, "POST", "/v1/completions", body), range(6))
        assert {told["choices"][0]["text"] for _, told in replies} == {expected}


def test_disconnects_free_the_rows_of_the_engine(tmp_path):
    """At 30 points: before, within and after the prompt, of streams and of whole answers."""
    with serve_run(tmp_path) as (url, engine):
        slow_down(engine, 0.004)
        for point in range(30):
            stream = point % 2 == 0
            content = "long " * (25 * (point % 3))
            messages = [*HELLO[:-1], {"role": "user", "content": "hello " + content}]
            body = {"messages": messages, "stream": stream, "n": 2, "max_tokens": 150}
            connection = send_request(url, body | {"temperature": 1.5, "seed": point})
            expect(lambda: not engine.is_idle, 5)
            if stream and point % 4:
                while b"content" not in connection.recv(300):
                    pass
            time.sleep(0.003 * point)
            assert not engine.is_idle  # it is cut off in the midst of it
            connection.close()
            left = time.monotonic()
            expect(lambda: engine.is_idle, 5)
            assert time.monotonic() - left < 0.5, point
            assert engine._batch.n_free == 2
        assert ask(url, "GET", "/health")[0] == 200


@pytest.mark.parametrize("n", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_damaged_requests_leave_no_row_behind(tmp_path, n, full):
    n = 10_000 if full else n
    settings = FakeSettings(limits=Limits(arrival_seconds=0.5, keep_alive_seconds=1))

    with serve_run(tmp_path, settings) as (url, engine):

        def try_one(seed: int) -> bytes:
            parts, cut = make_request(random.Random(seed))
            return exchange(url, parts, cut)[:13]

        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(try_one, range(n)))
        seen = {reply.split(b" ")[1] for reply in replies if reply}
        assert seen <= {b"%d" % code for code in STATUSES}
        assert {b"200", b"400"} <= seen
        expect(lambda: engine.is_idle, 30)
        assert engine._batch.n_free == 2
        assert engine._thread.is_alive()
        assert 'status="500"' not in ask(url, "GET", "/metrics")[1]


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_requests_by_http(tmp_path):
    process = psutil.Process()
    sizes = []
    with serve_run(tmp_path) as (url, engine), ThreadPoolExecutor(8) as pool:

        def try_one(seed: int) -> None:
            source = random.Random(seed)
            text = "".join(source.choices("abc é", k=source.randint(1, 200)))
            body: dict[str, Any] = {"prompt": text, "max_tokens": source.randint(1, 12)}
            body |= {"stream": source.random() < 0.5, "logprobs": source.choice([None, 3])}
            body["echo"] = source.random() < 0.2
            assert ask(url, "POST", "/v1/completions", body)[0] == 200

        for block in range(20):
            list(pool.map(try_one, range(100 * block, 100 * block + 100)))
            sizes.append(process.memory_info().rss)
        expect(lambda: engine.is_idle, 10)
    assert sizes[-1] - sizes[3] < 5 * 2**20, sizes


# ---- programs that people use -------------------------------------------------------------------


@pytest.mark.slow
def test_the_client_llm(tmp_path, monkeypatch):
    """Simon Willison's command-line client, configured for a server of this interface."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    import llm  # reads LLM_USER_PATH

    sampling = SamplingConfig(max_new_tokens=16, temperature=0.0)
    with serve_run(tmp_path) as (url, _):
        named = {"model_id": "ours", "model_name": "run", "api_base": url + "/v1"}
        (tmp_path / "extra-openai-models.yaml").write_text(
            json.dumps([named | {"completion": True}, named | {"model_id": "chat"}])
        )
        model = llm.get_model("ours")
        expected = generate_text(make_model("llama", CONTEXT), make_tokenizer(), "ab", sampling)
        for stream in (False, True):
            answer = model.prompt("ab", stream=stream, max_tokens=16, temperature=0, key="none")
            assert answer.text() == expected
        chat = llm.get_model("chat").conversation()
        first = chat.prompt("hello", max_tokens=8, temperature=0, key="none", stream=False)
        second = chat.prompt("and now", max_tokens=8, temperature=0, key="none", stream=True)
        assert first.text() != second.text()
        assert second.usage().output <= 8
        assert second.usage().input > first.usage().input  # it has the first turn


@pytest.mark.slow
def test_the_harness_gives_the_scores_of_evaluate(tmp_path):
    """lm-evaluation-harness asks the server for log-likelihoods of ids."""
    from lm_eval.api.instance import Instance  # slow to import: only here
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from preflight.evaluation.lm_eval_adapter import build_adapter

    source = random.Random(2)
    pairs = [
        tuple("".join(source.choices("abc dé", k=source.randint(1, 30))) for _ in range(2))
        for _ in range(25)
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model, tokenizer = make_model("llama", CONTEXT), make_tokenizer()
    with serve_run(tmp_path) as (url, _):
        client = LocalCompletionsAPI(
            model="run",
            base_url=url + "/v1/completions",
            tokenizer_backend=None,
            max_length=CONTEXT,
            num_concurrent=1,
            batch_size=1,
        )
        client.tokenizer, client.tokenized_requests = tokenizer, True
        client.tok_encode = lambda text, **flags: tokenizer.encode(text).tolist()
        found = client.loglikelihood(requests, disable_tqdm=True)
    expected = build_adapter(model, tokenizer).loglikelihood(requests)
    for (ours, is_greedy), (theirs, also_greedy) in zip(expected, found, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-3)
        assert is_greedy == also_greedy
