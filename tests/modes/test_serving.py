"""`--serve` as a user starts it, and `--serve --check`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import make_model, save_run

import main
from conftest import ROOT, build
from generate import generate_text, load_model
from preflight.checkpoints.store import open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.device.runtime import Runtime
from preflight.models.cost import count_parameters
from preflight.modes import serve
from preflight.modes.quantizing import quantize_loaded
from preflight.serving import store as store_module
from preflight.serving.foresight import estimate_memory, fit_rows
from preflight.serving.keys import is_loopback, load_key
from preflight.serving.protocol import EndEvent, Job, TokenEvent
from preflight.serving.store import Store, find_entries
from preflight.settings import SamplingConfig

CPU = Runtime(torch.device("cpu"), torch.float32, False, ())


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Two runs with a checkpoint in each."""
    names = ("first", "second")
    for name, family in zip(names, ("gpt2", "llama"), strict=True):
        save_run(tmp_path / name, make_model(family))
    return str(tmp_path / names[0]), str(tmp_path / names[1])


# ---- the store ----------------------------------------------------------------------------------


async def answer(store: Store, name: str, prompt: str, sampling: SamplingConfig) -> str:
    model = await store.open(name)
    events = [event async for event in model.submit(Job(model.encode_text(prompt), sampling))]
    assert isinstance(events[-1], EndEvent)
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


def test_models_are_loaded_when_asked_for(runs: tuple[str, str]) -> None:
    sampling = SamplingConfig(max_new_tokens=12, seed=5)

    async def use() -> None:
        store = Store(find_entries(runs), CPU, rows=2)
        assert store.names() == ["first", "second"]
        assert [told["loaded"] for told in store.describe().values()] == [False, False]
        texts = await asyncio.gather(*(answer(store, n, "ab", sampling) for n in store.names()))
        for text, family in zip(texts, ("gpt2", "llama"), strict=True):
            tokenizer = store._entries["first"].served._tokenizer  # type: ignore[union-attr]
            assert text == generate_text(make_model(family), tokenizer, "ab", sampling)
        assert [told["loaded"] for told in store.describe().values()] == [True, True]
        with pytest.raises(KeyError):
            await store.open("third")
        json.dumps(store.describe())
        await store.close(1)

    asyncio.run(use())


def test_the_model_that_was_used_last_stays(
    runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = find_entries(runs)[1].checkpoint.model_config
    needed = estimate_memory(config, torch.float32, 2).total
    store = None

    def measure(device: torch.device) -> int:  # room for one model at a time
        loaded = sum(entry.served is not None for entry in store._entries.values())  # type: ignore
        return 4 * needed if loaded == 0 else 0

    async def use() -> None:
        nonlocal store
        monkeypatch.setattr(store_module, "measure_model_room", measure)
        store = Store(find_entries(runs), CPU, rows=2)
        first = await store.open("first")
        await store.open("second")
        assert [told["loaded"] for told in store.describe().values()] == [False, True]
        # While an answer runs, its model is not unloaded.
        second = await store.open("second")
        running = second.submit(Job([1], SamplingConfig(max_new_tokens=10_000, temperature=0)))
        await anext(aiter(running))
        with pytest.raises(PreflightError) as refused:
            await store.open("first")
        assert refused.value.code == ExitCode.OUT_OF_MEMORY
        running.cancel()
        await asyncio.sleep(0.2)
        assert await store.open("first") is not first
        await store.close(0)

    asyncio.run(use())


def test_fewer_rows_where_memory_is_short() -> None:
    config = make_model("llama").config
    eight = estimate_memory(config, torch.float32, 8)
    assert eight.weights == 4 * count_parameters(config)
    cache = make_model("llama").build_cache(8, torch.device("cpu"), torch.float32)
    assert eight.cache == sum(layer.nbytes for layer in cache.layers)
    assert fit_rows(config, torch.float32, 8, eight.total) == 8
    assert fit_rows(config, torch.float32, 8, eight.total - 1) == 7
    assert fit_rows(config, torch.float32, 8, 0) == 0
    # Packed weights take a tied table of tokens twice.
    packed = estimate_memory(config, torch.float32, 8, packs=True)
    table = 4 * config.vocab_size * config.n_embeddings if config.tied else 0
    assert packed.weights == eight.weights + table > eight.weights
    assert fit_rows(config, torch.float32, 8, packed.total, packs=True) == 8
    assert fit_rows(config, torch.float32, 8, packed.total - 1, packs=True) == 7


def test_two_checkpoints_of_a_run_have_names_of_their_own(tmp_path: Path) -> None:
    for step in (3, 7):
        save_run(tmp_path / "run", make_model(), step)
    folders = sorted(str(path) for path in (tmp_path / "run" / "milestones").iterdir())
    assert [entry.name for entry in find_entries(folders)] == ["run@3", "run@7"]
    assert [entry.name for entry in find_entries(folders[:1] * 2)] == ["run"]


def test_a_quantised_model_answers(
    runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the weights of `--generate --quantize int8`, and so with its text."""
    monkeypatch.chdir(tmp_path)
    config = build({"serve": [runs[0]], "serve_rows": 1, "quantize": "int8", "device": "cpu"})
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)

    async def use() -> str:
        store = serve.build_store(config)
        text = await answer(store, "first", "ab", sampling)
        await store.close(1)
        return text

    runtime = serve.build_exact_runtime(config.system)
    model, tokenizer = load_model(open_checkpoint(runs[0]), runtime.device, runtime.dtype)
    quantised = quantize_loaded(model, tokenizer, config, runtime)
    assert asyncio.run(use()) == generate_text(quantised, tokenizer, "ab", sampling)


def test_a_prompt_is_scored_as_the_model_does(runs: tuple[str, str]) -> None:
    async def use() -> None:
        store = Store(find_entries(runs), CPU, rows=1)
        for name, family in (("first", "gpt2"), ("second", "llama")):
            ids = [5, 200, 17, 17, 99]
            model = await store.open(name)
            events = await model.score(ids, 2)
            logprobs = make_model(family)(torch.tensor([ids]))[0].log_softmax(-1)
            assert [event.chosen.token for event in events if event.chosen] == ids
            assert (events[0].chosen.logprob, events[0].alternatives) == (0.0, ())  # type: ignore
            for place, event in enumerate(events[1:]):
                assert event.chosen is not None
                expected = float(logprobs[place, event.chosen.token])
                assert event.chosen.logprob == pytest.approx(expected, abs=1e-5)
                best = logprobs[place].topk(2).indices.tolist()
                assert [other.token for other in event.alternatives] == best
            with pytest.raises(ValueError):
                model.check_ids([257])
        await store.close(0)

    asyncio.run(use())


# ---- who may use it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_addresses_of_this_machine(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_a_key_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(PreflightError, match="--api-key-file") as refused:
        load_key("0.0.0.0", None)
    assert refused.value.code == ExitCode.FLAGS
    assert load_key("127.0.0.1", None) is None
    key = load_key("0.0.0.0", str(path))
    assert key is not None
    assert len(key) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key("127.0.0.1", str(path)) == key
    path.write_text("short\n")
    with pytest.raises(PreflightError, match="16 to 512"):
        load_key("127.0.0.1", str(path))
    with pytest.raises(PreflightError):
        load_key("127.0.0.1", str(tmp_path / "missing" / "key"))


# ---- the process --------------------------------------------------------------------------------


def test_a_port_in_use_is_told(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main.main(["--serve", runs[0], "--port", port]) == int(ExitCode.FLAGS)
    told = capsys.readouterr().err
    assert f"port {port}: another program uses it" in told
    assert "--port" in told.splitlines()[-1]


def test_other_faults_of_the_flags(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main(["--serve", runs[0], "--host", "0.0.0.0"]) == int(ExitCode.FLAGS)
    assert "--api-key-file" in capsys.readouterr().err
    assert main.main(["--serve", "nothing", "--port", "0"]) == int(ExitCode.CHECKPOINT)
    capsys.readouterr()
    elsewhere = ["--host", "203.0.113.1", "--api-key-file", runs[0] + "/key"]
    assert main.main(["--serve", runs[0], *elsewhere]) == int(ExitCode.FLAGS)
    assert "does not have that address" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "preflight.serving.listening", raising=False)
    assert main.main(["--serve", runs[0]]) == int(ExitCode.FLAGS)
    assert "pip install starlette uvicorn" in capsys.readouterr().err


def start(*argv: str) -> tuple[subprocess.Popen[str], str]:
    """The process, and the address that it tells."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *argv, "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if "chat: http" in line:
            return process, line.split("chat: ")[1].split("/ ")[0]
    raise AssertionError("".join(told))


def ask(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        address + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_lets_running_answers_end(runs: tuple[str, str]) -> None:
    process, address = start("--serve", *runs)
    with process:
        try:
            body = {"prompt": "ab", "temperature": 0, "max_tokens": 40, "seed": 1}
            whole = json.load(ask(address, **body))["choices"][0]["text"]
            other = json.load(ask(address, model="second", prompt="x", max_tokens=3))
            assert other["model"] == "second"
            stream = ask(address, stream=True, **body)
            first = stream.readline()
            process.send_signal(signal.SIGINT)
            lines = [first, *stream]
            chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
            assert text == whole
            began = time.monotonic()
            assert process.wait(15) == int(ExitCode.SIGINT)
            assert time.monotonic() - began < 10
        finally:
            process.kill()


# ---- --check ------------------------------------------------------------------------------------


def test_what_serving_needs_and_gives_is_predicted(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--serve", *runs, "--check", "--serve-rows", "3", "--no-mixed-precision"]
    assert main.main(argv) == 0
    told = capsys.readouterr().out
    assert "first in float32: fits" in told
    assert "1 person" in told
    assert "3 people" in told
    assert main.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["model"] for each in found["models"]] == ["first", "second"]
    for each in found["models"]:
        assert [speed["people"] for speed in each["speed"]] == [1, 3]
        assert all(speed["tokens_per_second"] > 0 for speed in each["speed"])


def test_flags_of_a_training_are_not_used(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    mode, config = main.parse_command_line(["--check", "--serve", runs[0], "--n-layers", "3"])
    assert mode == "check"
    _, unused = main.drop_unused(mode, config)
    assert {*unused} == {"n_layers"}
    _, unused = main.drop_unused("check", build({"port": 1}))
    assert {*unused} == {"port"}
