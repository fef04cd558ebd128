"""Serving: tokens per second of 8 clients beside 1, and times to the first token.

    python benchmarks/serve.py RUN            (a model of SmolLM2-135M's shape; some minutes)
    python benchmarks/serve.py RUN --rounds 1 --new-tokens 8

One client and eight alternate, through the engine alone and over HTTP. Two other servers are asked
on the same weights: llama.cpp's, where xllamacpp is installed, and litgpt's with `--litgpt PYTHON`,
an interpreter that has `pip install torch==2.13.0 litgpt litserve requests`.

Every client streams an answer to a prompt of its own. Other programs on the machine disturb all
alike: the ratios count. The CPU time of each thread is told too, since it does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As `main.py` has it: the engine alone and the server must not differ in this.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from generate import load_model  # noqa: E402
from preflight.checkpoints.store import open_checkpoint  # noqa: E402
from preflight.modes.decoding_way import choose_serving  # noqa: E402
from preflight.serving.batch import RowBatch  # noqa: E402
from preflight.serving.protocol import Job, TokenEvent  # noqa: E402
from preflight.settings import SamplingConfig  # noqa: E402

# No question: a model that was taught to chat would end here at once.
PROMPT = "Client number {0} begins: once upon a time, on the way from the mountains to the sea,"
CLIENTS = (1, 8)


@dataclass
class Times:
    """Of one round: seconds to the first token of each client, tokens per second of all, and
    milliseconds of CPU for each token, by threads, the busiest first. Prompts are in both.
    """

    firsts: list[float]
    rate: float
    busy: list[float]


Round = Callable[[int, int], Times]  # clients, tokens of each
Ask = Callable[[str, int], tuple[float, int]]  # prompt, tokens; seconds to the first, tokens


def read_cpu_seconds(pid: int) -> dict[str, float]:
    """What each thread of a process and of its children has computed. Only Linux tells it."""
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    threads = [each for one in pids for each in Path("/proc").glob(f"{one}/task/*")]
    found = {}
    for each in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found[each.name] = int((each / "schedstat").read_text().split()[0]) / 1e9
    return found


@contextlib.contextmanager
def counting_cpu(pid: int, found: list[float]) -> Iterator[None]:
    """Add the seconds of each thread to `found`, the busiest first."""
    before = read_cpu_seconds(pid)
    yield
    after = read_cpu_seconds(pid)
    found += sorted((at - before.get(name, 0) for name, at in after.items()), reverse=True)


def summarise(firsts: list[float], count: int, seconds: float, cpu: list[float]) -> Times:
    busy = [1e3 * each / count for each in cpu if 1e3 * each > 0.01 * count]
    return Times(sorted(firsts), count / seconds, busy)


def through_engine(run: str, dtype: torch.dtype, device: str) -> Round:
    model, tokenizer = load_model(open_checkpoint(run), torch.device(device), dtype)
    batch = RowBatch(choose_serving(model, max(CLIENTS)), tokenizer, max(CLIENTS))
    counter = iter(range(10**9))

    def go(n_clients: int, n_tokens: int) -> Times:
        began = time.perf_counter()
        for index in range(n_clients):
            ids = tokenizer.encode(PROMPT.format(next(counter))).tolist()
            batch.join(Job(ids, SamplingConfig(max_new_tokens=n_tokens), index=index), index)
        firsts: dict[int, float] = {}
        count = 0
        cpu: list[float] = []
        with counting_cpu(os.getpid(), cpu):
            while batch.tasks:
                for task, event in batch.step():
                    if isinstance(event, TokenEvent):
                        count += 1
                        firsts.setdefault(task.owner, time.perf_counter() - began)
        return summarise(list(firsts.values()), count, time.perf_counter() - began, cpu)

    return go


def over_http(ask: Ask, pid: int) -> Round:
    """Clients of a server, whose process is `pid`, all at once."""
    counter = iter(range(10**9))

    def go(n_clients: int, n_tokens: int) -> Times:
        prompts = [PROMPT.format(next(counter)) for _ in range(n_clients)]
        began = time.perf_counter()
        cpu: list[float] = []
        with counting_cpu(pid, cpu), ThreadPoolExecutor(n_clients) as pool:
            found = list(pool.map(lambda prompt: ask(prompt, n_tokens), prompts))
        seconds = time.perf_counter() - began
        firsts, counts = zip(*found, strict=True)
        return summarise(list(firsts), sum(counts), seconds, cpu)

    return go


def stream_lines(url: str, body: dict[str, Any]) -> Iterator[bytes]:
    """The lines of an answer, as they come."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        yield from answer


def ask_openai(address: str, model: str) -> Ask:
    """What asks a server of OpenAI's interface."""

    def ask(prompt: str, n_tokens: int) -> tuple[float, int]:
        body = {"model": model, "prompt": prompt, "max_tokens": n_tokens, "stream": True}
        body |= {"temperature": 0.8, "stream_options": {"include_usage": True}}
        began, first, count = time.perf_counter(), 0.0, 0
        for line in stream_lines(address + "/v1/completions", body):
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                first = first or time.perf_counter() - began
                count = (chunk.get("usage") or {}).get("completion_tokens", count)
        return first, count

    return ask


def ask_litgpt(address: str) -> Ask:
    """What asks litgpt's server. It generates as many tokens as it was started with, one a line."""

    def ask(prompt: str, n_tokens: int) -> tuple[float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        for line in stream_lines(address + "/predict", {"prompt": prompt}):
            if line.strip():
                first = first or time.perf_counter() - began
                count += 1
        return first, count

    return ask


@contextlib.contextmanager
def start_server(run: str, *flags: str) -> Iterator[tuple[str, int]]:
    """`--serve` in a process of its own: its address and the number of the process."""
    argv = [sys.executable, str(ROOT / "main.py"), "--serve", run, "--port", "0"]
    process = subprocess.Popen([*argv, *flags], stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "chat: http" in line)
        yield line.split("chat: ")[1].split("/ ")[0], process.pid
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def our_server(run: str, dtype: torch.dtype, device: str) -> Iterator[Round]:
    flag = "--mixed-precision" if dtype == torch.bfloat16 else "--no-mixed-precision"
    with start_server(run, "--device", device, flag) as (address, pid):
        with urllib.request.urlopen(address + "/v1/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        yield over_http(ask_openai(address, name), pid)


def export(run: str, path: Path, quantization: str) -> Path:
    """`--export`, whose proof has to hold."""
    argv = [sys.executable, str(ROOT / "main.py"), "--export", str(path), "--checkpoint-path", run]
    subprocess.run([*argv, "--quantize", quantization, "--force"], check=True, capture_output=True)
    return path


@contextlib.contextmanager
def llama_server(run: str, folder: Path) -> Iterator[Round]:
    """llama.cpp's server in this process, in fp16 weights: it has no fp32 kernels to speak of."""
    import xllamacpp

    path = export(run, folder / "model.gguf", "f16")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 8 * 1024, max(CLIENTS)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    yield over_http(ask_openai(server.listening_address, "model"), os.getpid())
    del server


@contextlib.contextmanager
def litgpt_server(
    run: str, folder: Path, python: str, dtype: torch.dtype, n_tokens: int
) -> Iterator[Round]:
    """litgpt's own server, in the environment of `python`, on the same weights.

    The shape has to be SmolLM2-135M's: litgpt converts folders of the models that it knows.
    """
    path = export(run, folder / "litgpt", "f32")
    command = [python, "-m", "litgpt"]
    convert = ["convert_to_litgpt", str(path), "--model_name", "SmolLM2-135M"]
    subprocess.run([*command, *convert], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    precision = "bf16-true" if dtype == torch.bfloat16 else "32-true"
    flags = {"port": port, "stream": "true", "max_new_tokens": n_tokens, "timeout": 600}
    flags |= {"accelerator": "cpu", "precision": precision}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [*command, "serve", str(path), *argv], start_new_session=True, **quiet
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address + "/health", process)
        yield over_http(ask_litgpt(address), process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers outlive it
        process.wait(20)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers."""
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server ended with {process.returncode}")


def summarise_busy(rounds: list[Times]) -> list[float]:
    """The least of all rounds, thread by thread, of the four busiest."""
    busiest = (times.busy[:4] for times in rounds)
    return [round(min(each), 2) for each in zip(*busiest, strict=False)]


def compare(name: str, go: Round, rounds: int, n_tokens: int) -> dict[str, Any]:
    go(max(CLIENTS), 2)
    found: dict[int, list[Times]] = {n: [] for n in CLIENTS}
    for _ in range(rounds):
        for n in CLIENTS:
            found[n].append(go(n, n_tokens))
    one, many = (found[n] for n in CLIENTS)
    ratio = statistics.median(b.rate / a.rate for a, b in zip(one, many, strict=True))
    alone = statistics.median(times.firsts[0] for times in one)
    row = {
        "name": name,
        "tokens_per_second_of_1": round(statistics.median(t.rate for t in one), 1),
        "tokens_per_second_of_8": round(statistics.median(t.rate for t in many), 1),
        "ratio": round(ratio, 2),
        "cpu_ms_per_token_of_1": summarise_busy(one),
        "cpu_ms_per_token_of_8": summarise_busy(many),
        "first_token_alone": round(alone, 3),
        "first_of_8": round(statistics.median(t.firsts[0] for t in many), 3),
        "eighth_of_8": round(statistics.median(t.firsts[-1] for t in many), 3),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--litgpt", metavar="PYTHON", help="of an environment with litgpt, requests and litserve"
    )
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.bf16 else torch.float32
    name = "bf16" if given.bf16 else "fp32"
    rounds, n_tokens = given.rounds, given.new_tokens
    compare(f"engine, {name}", through_engine(given.run, dtype, given.device), rounds, n_tokens)
    with our_server(given.run, dtype, given.device) as go:
        compare(f"HTTP, {name}", go, rounds, n_tokens)
    if importlib.util.find_spec("xllamacpp") is not None:
        with tempfile.TemporaryDirectory() as folder, llama_server(given.run, Path(folder)) as go:
            compare("llama-server, fp16", go, rounds, n_tokens)
    if given.litgpt:
        with (
            tempfile.TemporaryDirectory() as folder,
            litgpt_server(given.run, Path(folder), given.litgpt, dtype, n_tokens) as go,
        ):
            compare(f"litgpt serve, {name}", go, rounds, n_tokens)


if __name__ == "__main__":
    main()
