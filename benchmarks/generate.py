"""Writing speed: ours beside Hugging Face's `generate` and the floor, alternating in one run.

    python benchmarks/generate.py             (small; the GPU, two minutes; else the CPU, seven)
    python benchmarks/generate.py --smoke     (a tiny model on the CPU; seconds)
    python benchmarks/generate.py --llama-cpp (beside llama.cpp; wants `pip install xllamacpp`)

Both write greedily from the same weights, and the texts have to be equal before anything is timed.
On the CPU the peer runs in fp32, in bf16 and in bf16 with a static cache, and ours is set against
its best: in the way of a short `--generate`, and in that of one which is long enough to measure.
The floor on the CPU is the weights' products of a token alone; on CUDA the time that
reading the weights and the cache takes at the card's bandwidth. llama.cpp reads our own exports:
f32 beside fp32, q8_0 beside int8. It times its tokens itself, without the prompt; ours are with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import (  # noqa: E402
    alternate,
    build_hugging_face,
    list_product_weights,
    print_rows,
)

from generate import generate_batch  # noqa: E402
from preflight.device.cards import match_device  # noqa: E402
from preflight.device.runtime import build_runtime, describe_device  # noqa: E402
from preflight.formats.gguf_export import GgufExporter  # noqa: E402
from preflight.formats.protocol import OutgoingModel  # noqa: E402
from preflight.models.cost import count_parameters  # noqa: E402
from preflight.models.quantization import quantize_model  # noqa: E402
from preflight.models.single_row import one_torch_thread  # noqa: E402
from preflight.modes.decoding_way import choose_decoding  # noqa: E402
from preflight.modes.quantizing import choose_dtype  # noqa: E402
from preflight.settings import ModelConfig, ModelSettings, SamplingConfig, SystemSettings  # noqa: E402
from preflight.tokenization import load_tokenizer  # noqa: E402
from transformer_model import DecoderOnlyTransformer  # noqa: E402

PROMPT = "In the beginning the machine was quiet, and then"
Row = tuple[str, Any, str]


def build_peer(
    model: DecoderOnlyTransformer,
    prompts: list[list[int]],
    n_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> Callable[[], Tensor]:
    """Hugging Face's `generate`, greedy, with its KV cache; the ids that it adds."""
    peer = build_hugging_face(model)[0].to(device=device, dtype=dtype).eval()
    ids = torch.tensor(prompts, device=device)
    mask = torch.ones_like(ids)

    def write() -> Tensor:
        with torch.inference_mode():
            return peer.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **options,
            )[:, ids.shape[1] :]

    return write


def copy_model(
    model: DecoderOnlyTransformer, dtype: torch.dtype, device: torch.device
) -> DecoderOnlyTransformer:
    """As `--generate` loads it."""
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)


def build_own(
    own: DecoderOnlyTransformer, n_prompts: int, n_tokens: int
) -> Callable[[], list[str]]:
    """Ours, through what `--generate` uses."""
    tokenizer = load_tokenizer("gpt2")
    config = SamplingConfig(max_new_tokens=n_tokens, temperature=0.0)

    def write() -> list[str]:
        answers = generate_batch(own, tokenizer, [PROMPT] * n_prompts, config)
        assert all(answer.n_tokens == n_tokens for answer in answers)
        return [answer.text for answer in answers]

    return write


def build_floor(own: DecoderOnlyTransformer, n_tokens: int) -> Callable[[], None]:
    """Each of the weights times one vector, once a token, in numpy, as ours unmeasured.

    The weights themselves, not others like them: where they lie in memory moves it by some percent.
    """
    pairs = [
        (torch.randn(weight.shape[1]).numpy(), weight.numpy())
        for weight in list_product_weights(own)
    ]

    def multiply() -> None:
        with one_torch_thread():
            for _ in range(n_tokens):
                for x, weight in pairs:
                    x @ weight.T

    return multiply


def build_model(shape: ModelConfig) -> DecoderOnlyTransformer:
    """Random weights, spread out so that greedy choices are no ties."""
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(shape)
    with torch.no_grad():
        model.norm.weight.mul_(4)
    return model.eval()


def compare_on_cpu(shape: ModelConfig, n_tokens: int, repeats: int) -> list[Row]:
    """Batch 1: the peer's best way and ours, and the floor of ours."""
    device, model = torch.device("cpu"), build_model(shape)
    tokenizer = load_tokenizer("gpt2")
    prompts = [tokenizer.encode(PROMPT).tolist()]
    ways: dict[str, tuple[torch.dtype, dict[str, str]]] = {
        "fp32": (torch.float32, {}),
        "bf16": (torch.bfloat16, {}),
        "bf16, static cache": (torch.bfloat16, {"cache_implementation": "static"}),
    }
    peers = {
        way: build_peer(model, prompts, n_tokens, dtype, device, **options)
        for way, (dtype, options) in ways.items()
    }
    expected = tokenizer.decode(peers["fp32"]()[0].tolist())
    own = copy_model(model, torch.float32, device)
    assert build_own(own, 1, n_tokens)() == [expected]
    trial = alternate(peers, 1)
    best = min(trial, key=lambda way: trial[way])
    measured = choose_decoding(copy_model(own, torch.float32, device), None, [1], 10**6)
    precision = str(next(measured.parameters()).dtype).removeprefix("torch.")
    write, write_measured = build_own(own, 1, n_tokens), build_own(measured, 1, n_tokens)
    turns = {"peer": peers[best], "unmeasured": write, "measured": write_measured}
    seconds = alternate(turns, repeats)
    # Apart, and in more turns: they differ by less than the machine does from turn to turn.
    close = alternate({"ours": write, "floor": build_floor(own, n_tokens)}, 3 * repeats)
    return [
        ("tokens/s, ours, unmeasured (fp32)", n_tokens / seconds["unmeasured"], ""),
        (f"tokens/s, ours, measured ({precision})", n_tokens / seconds["measured"], ""),
        (f"tokens/s, Hugging Face, {best} (its best)", n_tokens / seconds["peer"], ""),
        *(
            (f"Hugging Face, seconds, {way} over its best", trial[way] / trial[best], "")
            for way in ways
        ),
        ("ours over Hugging Face, unmeasured", seconds["peer"] / seconds["unmeasured"], ""),
        ("ours over Hugging Face", seconds["peer"] / seconds["measured"], ">= 1.7"),
        ("share of the weights' products alone, fp32", close["floor"] / close["ours"], ">= 0.8"),
    ]


LLAMA_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], 1, 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(params)
print("address:", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """llama.cpp's server on our export of a model, in a process of its own."""

    def __init__(self, model: DecoderOnlyTransformer, path: Path, kind: str) -> None:
        tokenizer = load_tokenizer("gpt2")
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        sample = torch.from_numpy(tokenizer.encode(PROMPT).astype("int64"))
        outgoing = OutgoingModel(model.config, weights, tokenizer, None, {"name": "gpt2"}, sample)
        GgufExporter().export(outgoing, path, kind)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LLAMA_SERVER, str(path), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if line.startswith("address: "))
        self.address = line.split()[1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def write(self, n_tokens: int) -> tuple[str, float]:
        """Greedy: the text, and the seconds of its tokens."""
        body = {"prompt": PROMPT, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            self.address + "/completion",
            json.dumps(body | {"cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
        assert found["timings"]["predicted_n"] == n_tokens
        return found["content"], found["timings"]["predicted_ms"] / 1000


def compare_with_llama_cpp(shape: ModelConfig, n_tokens: int, repeats: int) -> Iterator[Row]:
    """Batch 1, on the CPU, in turns; in fp32 both have to write the same text."""
    runtime = build_runtime(SystemSettings(device="cpu", mixed_precision=False))
    device, model = runtime.device, build_model(shape)
    small = copy_model(model, choose_dtype(runtime), device)
    quantize_model(small, choose_dtype(runtime))
    pairs = (("f32", "fp32", copy_model(model, torch.float32, device)), ("q8_0", "int8", small))
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, own in pairs:
            peer = LlamaCpp(model, Path(folder) / f"{kind}.gguf", kind)
            write = build_own(own, 1, n_tokens)
            (text,), (expected, _) = write(), peer.write(n_tokens)
            assert kind != "f32" or text == expected
            seconds: list[tuple[float, float]] = []
            for _ in range(repeats):
                began = time.perf_counter()
                write()
                seconds.append((time.perf_counter() - began, peer.write(n_tokens)[1]))
            ours, theirs = (statistics.median(each) for each in zip(*seconds, strict=True))
            yield f"tokens/s, ours, {name}", n_tokens / ours, ""
            yield f"tokens/s, llama.cpp, {kind}", n_tokens / theirs, ""
            yield f"ours over llama.cpp, {name}", theirs / ours, ">= 1"
            peer.close()


def compare_on_cuda(shape: ModelConfig, n_tokens: int, repeats: int) -> Iterator[Row]:
    """Batch 1 and 32 in the card's precision."""
    runtime = build_runtime(SystemSettings(device="cuda"))
    model, prompt = build_model(shape), load_tokenizer("gpt2").encode(PROMPT).tolist()
    card = match_device(
        torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    )
    own = copy_model(model, runtime.dtype, runtime.device)
    for batch in (1, 32):
        seconds = alternate(
            {
                "peer": build_peer(
                    model, [prompt] * batch, n_tokens, runtime.dtype, runtime.device
                ),
                "ours": build_own(own, batch, n_tokens),
            },
            repeats,
        )
        yield f"tokens/s, ours, batch {batch}", batch * n_tokens / seconds["ours"], ""
        yield f"tokens/s, Hugging Face, batch {batch}", batch * n_tokens / seconds["peer"], ""
        yield (
            f"ours over Hugging Face, batch {batch}",
            seconds["peer"] / seconds["ours"],
            ">= 3" if batch == 1 else "",
        )
        if card is not None:
            length = len(prompt) + n_tokens / 2
            cache = 2 * shape.n_layers * shape.kv_heads * shape.head_dim * length * batch
            size = runtime.dtype.itemsize * (count_parameters(shape) + cache)
            least = n_tokens * size / (card.bandwidth_gb_per_second * 1e9)
            yield f"share of the bandwidth limit, batch {batch}", least / seconds["ours"], ">= 0.7"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--llama-cpp", action="store_true", help="beside llama.cpp, on the CPU")
    parser.add_argument("--tokens", type=int, default=None, help="new tokens")
    given = parser.parse_args()
    on_cuda = torch.cuda.is_available() and not (given.smoke or given.llama_cpp)
    small = ModelSettings(model_size="small").resolve(50257)
    found: Iterable[Row]
    tiny = ModelConfig(50257, 64, 64, 4, 2, 256)
    if given.llama_cpp:
        shape = tiny if given.smoke else small
        found = compare_with_llama_cpp(shape, given.tokens or 256, repeats=5)
    elif on_cuda:
        found = compare_on_cuda(small, given.tokens or 256, repeats=3)
    elif given.smoke:
        found = compare_on_cpu(tiny, given.tokens or 24, repeats=2)
    else:
        found = compare_on_cpu(small, given.tokens or 256, repeats=5)
    rows = []
    for row in found:
        rows.append(row)
        print_rows([row])
    device = torch.device("cuda" if on_cuda else "cpu")
    print(
        json.dumps(
            {
                "device": describe_device(device),
                "torch": str(torch.__version__),
                "threads": torch.get_num_threads(),
                "rows": rows,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
