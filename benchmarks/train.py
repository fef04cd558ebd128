"""Training speed: ours beside Hugging Face's GPT-2 and the floor, alternating in one run.

    python benchmarks/train.py             (the GPU, some four minutes; else the CPU, some three)
    python benchmarks/train.py --smoke     (tiny shapes on the CPU; under a minute)

CPU: 6 layers, width 384, context 256, batch 8, vocabulary 50,257; default flags against the usual
fp32 loop and, where the CPU has bf16, the same under bf16 autocast. The floor is the step's matrix
products alone, forward and backward, in our precision. CUDA: small, context 1024, against
torch.compile, SDPA and fused AdamW in bf16, each at its best batch. All begin with the same
weights, and their first losses are compared before anything is timed. Where litgpt is installed
(pip install litgpt), its loop runs beside them on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import (  # noqa: E402
    alternate,
    build_hugging_face,
    list_product_weights,
    print_rows,
    run_apart,
)

import trainer  # noqa: E402
from preflight.device.cards import match_device  # noqa: E402
from preflight.device.runtime import Runtime, build_runtime, describe_device  # noqa: E402
from preflight.models.cost import estimate_flops_per_token  # noqa: E402
from preflight.modes import train as train_mode  # noqa: E402
from preflight.settings import (  # noqa: E402
    ControlSettings,
    ModelConfig,
    ModelSettings,
    SystemSettings,
    TrainingSettings,
    build_config,
)
from preflight.training.metrics import read_metrics  # noqa: E402
from preflight.training.plan import build_plan  # noqa: E402
from trainer import Trainer  # noqa: E402
from transformer_model import DecoderOnlyTransformer  # noqa: E402

CPU_SHAPE, CPU_BATCH = ModelConfig(50257, 256, 384, 6, 6, 1536), 8
SMOKE_SHAPE, SMOKE_BATCH = ModelConfig(5000, 64, 64, 4, 2, 256), 4
CUDA_BATCHES = (32, 64)  # each is compiled twice, half a minute each time
Row = tuple[str, Any, str]


def build_trainer(
    shape: ModelConfig, batch: int, system: SystemSettings, **options: Any
) -> Trainer:
    """Ours, as `--train` builds it for a long run."""
    training = TrainingSettings(batch_size=batch, learning_rate=1e-4)
    plan = build_plan(training, ControlSettings(), shape.context_length, 10**6, 100)
    return trainer.build_trainer(shape, training, plan, build_runtime(system, 10**5), **options)


def draw_batch(shape: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and the ids that follow."""
    ids = torch.randint(
        0,
        shape.vocab_size,
        (batch, shape.context_length + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build_peer_step(
    shape: ModelConfig, batch_size: int, dtype: torch.dtype, device_name: str
) -> Callable[[], float]:
    """The usual loop around Hugging Face's model with our weights: AdamW, clipping, its own loss;
    compiled on CUDA.
    """
    device = torch.device(device_name)
    compiled = device.type == "cuda"
    torch.manual_seed(TrainingSettings().seed)  # as `Trainer` does
    with device:
        own = DecoderOnlyTransformer(shape)
    options = {"attn_implementation": "sdpa", "use_cache": False}
    model = build_hugging_face(own, **options)[0].to(device).train()
    batch = draw_batch(shape, batch_size, device)
    del own
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=device.type == "cuda",
    )
    inputs, targets = batch
    # Its loss shifts labels by one: the last target has no place there.
    labels = torch.cat([inputs[:, :1], targets[:, :-1]], dim=1)

    def step() -> float:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def build_litgpt_step(shape: ModelConfig, batch_size: int) -> Callable[[], float]:
    """litgpt's GPT of this shape in its pretraining loop, fp32 on the CPU.

    Its positions are rotary and its head is a matrix of its own, so that its weights are not ours;
    the products of a step are as many.
    """
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            name="peer",
            block_size=shape.context_length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.n_embeddings,
            intermediate_size=shape.ffn_hid_dim,
            rotary_percentage=0.25,
            parallel_residual=False,
            bias=True,
            norm_class_name="LayerNorm",
            mlp_class_name="GptNeoxMLP",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = draw_batch(shape, batch_size, torch.device("cpu"))

    def step() -> float:
        loss = chunked_cross_entropy(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def build_own_step(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> Callable[[], float]:
    """Our step, its loss read as a run reads it."""
    return lambda: float(trainer.train_step(100, [batch]).loss)


def build_floor(trainer: Trainer, n_tokens: int) -> Callable[[], None]:
    """Every weight's three products of a step, forward and backward, and nothing else.

    Each is written in the order of its factors that is fastest here: the embedding's in chunks.
    """
    dtype, device = trainer.runtime.dtype, trainer.runtime.device
    embedding = trainer.model.embed_tokens.weight
    products = []
    for n_out, n_in in (each.shape for each in list_product_weights(trainer.model)):
        rows = min(n_tokens, 512) if n_out == len(embedding) else n_tokens
        weight = torch.randn(n_out, n_in, device=device).to(dtype)
        x = torch.randn(rows, n_in, device=device).to(dtype)
        # Column by column, as a product that begins with the weight leaves it, or row by row.
        grad = torch.randn(n_out, rows, device=device).to(dtype).T
        if rows == n_tokens:
            grad = grad.contiguous()
        products.append((weight, x, grad, n_tokens // rows))

    def multiply() -> None:
        for weight, x, grad, repeats in products:
            for _ in range(repeats):
                if grad.is_contiguous():
                    x @ weight.T
                else:
                    weight @ x.T
                grad @ weight
                grad.T @ x

    return multiply


def compare_on_cpu(shape: ModelConfig, batch_size: int, repeats: int) -> list[Row]:
    """Ours, the peer in fp32 and in bf16, and the floor."""
    trainer = build_trainer(shape, batch_size, SystemSettings(device="cpu"))
    batch = draw_batch(shape, batch_size, trainer.runtime.device)
    n_tokens = batch[0].numel()
    fast = trainer.runtime.dtype == torch.bfloat16
    subjects: dict[str, Callable[[], Any]] = {
        "peer fp32": run_apart(build_peer_step, shape, batch_size, torch.float32, "cpu")
    }
    if fast:  # else it is emulated, a minute a step: nobody would use it
        subjects["peer bf16"] = run_apart(build_peer_step, shape, batch_size, torch.bfloat16, "cpu")
    subjects |= {"ours": build_own_step(trainer, batch), "products": build_floor(trainer, n_tokens)}
    losses = [act() for name, act in subjects.items() if name != "products"]
    assert max(losses) - min(losses) < 0.02, f"the losses differ: {losses}"
    has_litgpt = importlib.util.find_spec("litgpt") is not None
    if has_litgpt:  # with weights of its own
        subjects["litgpt"] = run_apart(build_litgpt_step, shape, batch_size)
    seconds = alternate(subjects, repeats)
    rows = [
        ("tokens/s, ours", n_tokens / seconds["ours"], ""),
        ("tokens/s, Hugging Face fp32", n_tokens / seconds["peer fp32"], ""),
        ("ours over fp32", seconds["peer fp32"] / seconds["ours"], ">= 3" if fast else ""),
        (
            f"share of products alone ({str(trainer.runtime.dtype).removeprefix('torch.')})",
            seconds["products"] / seconds["ours"],
            ">= 0.8",
        ),
    ]
    if has_litgpt:
        rows += [
            ("tokens/s, litgpt fp32", n_tokens / seconds["litgpt"], ""),
            ("ours over litgpt fp32", seconds["litgpt"] / seconds["ours"], ""),
        ]
    if fast:
        rows.append(("ours over bf16 autocast", seconds["peer bf16"] / seconds["ours"], ">= 2"))
    return rows


# ---- CUDA ---------------------------------------------------------------------------------------


def measure_on_cuda(act: Callable[[], Any], steps: int) -> tuple[float, int] | None:
    """Median seconds of a step and peak bytes; None when it does not fit."""
    try:
        for _ in range(4):  # compiles
            act()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            act()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds), torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def clear_cuda() -> None:
    """Free what the subject before held, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure_own(
    shape: ModelConfig, batch_size: int, steps: int, **options: Any
) -> tuple[float, int] | None:
    """Ours on CUDA: seconds and peak bytes."""
    clear_cuda()
    trainer = build_trainer(shape, batch_size, SystemSettings(device="cuda"), **options)
    batch = draw_batch(shape, batch_size, trainer.runtime.device)
    return measure_on_cuda(lambda: trainer.train_step(100, [batch]), steps)


def measure_peer(shape: ModelConfig, batch_size: int, steps: int) -> tuple[float, int] | None:
    """Hugging Face on CUDA: seconds and peak bytes."""
    clear_cuda()
    return measure_on_cuda(build_peer_step(shape, batch_size, torch.bfloat16, "cuda"), steps)


def compare_on_cuda(batches: tuple[int, ...], steps: int) -> Iterator[Row]:
    """Best batch against best batch, utilisation, memory, and what checkpointing costs."""
    small, medium = (ModelSettings(model_size=size).resolve(50257) for size in ("small", "medium"))
    tokens = small.context_length
    card = match_device(
        torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    )
    own: dict[int, tuple[float, int]] = {}
    peer: dict[int, tuple[float, int]] = {}
    for size in batches:  # in turns
        for name, measure, results in (
            ("ours", measure_own, own),
            ("Hugging Face", measure_peer, peer),
        ):
            if found := measure(small, size, steps):
                results[size] = found
                yield f"tokens/s, {name}, batch {size}", size * tokens / found[0], ""
    best, best_peer = (
        max(size * tokens / found[0] for size, found in results.items()) for results in (own, peer)
    )
    yield "ours over Hugging Face, best batch each", best / best_peer, ">= 1.25"
    largest = max(own.keys() & peer.keys())
    yield (
        f"peak memory over Hugging Face's, batch {largest}",
        own[largest][1] / peer[largest][1],
        "<= 0.6",
    )
    smallest = min(own)
    plain = own[smallest]
    again = measure_own(small, smallest, steps, gradient_checkpointing=True)
    assert again is not None
    held = 16 * sum(
        weight.numel()
        for weight in list_product_weights(
            build_trainer(small, 1, SystemSettings(device="cuda", compile_model=False)).model
        )
    )
    yield "gradient checkpointing, tokens/s lost", 1 - plain[0] / again[0], "<= 0.3"
    yield (
        "gradient checkpointing, activation memory saved",
        1 - (again[1] - held) / (plain[1] - held),
        ">= 0.6",
    )
    if card is not None:
        peak = card.rate_tflops("bfloat16") * 1e12
        yield (
            "model FLOPs utilisation, small",
            best * estimate_flops_per_token(small) / peak,
            ">= 0.55",
        )
        found = measure_own(medium, 16, steps)
        assert found is not None
        best = 16 * tokens / found[0]
        yield (
            "model FLOPs utilisation, medium",
            best * estimate_flops_per_token(medium) / peak,
            ">= 0.6",
        )


# ---- the loop around the step -------------------------------------------------------------------


def measure_loop(runtime: Runtime, steps: int) -> list[Row]:
    """What logging, progress, checks and signals cost, and whether speed and memory stay flat."""
    shape = {
        "model_size": "custom",
        "n_layers": 2,
        "n_heads": 2,
        "n_embeddings": 64,
        "context_length": 32,
        "batch_size": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("a line of words to learn from, and more\n" * 20_000)
        flags = shape | {
            "text_file": [f"{folder}/text.txt"],
            "data_dir": f"{folder}/data",
            "output_dir": f"{folder}/out",
            "device": str(runtime.device),
            "max_steps": steps,
            "eval_every": steps,
            "checkpoint_every": steps,
            "log_level": "error",
            "tokenizer": "gpt2",
            "compile_model": False,
        }
        config = build_config(flags, dict.fromkeys(flags, "the benchmark"))
        resident: list[int] = []
        inside: list[float] = []
        speeds: list[float] = []
        original = Trainer.train_step
        weight, x = (torch.randn(rows, 64, device=runtime.device) for rows in (50257, 32))

        def timed(self: Trainer, *arguments: Any) -> Any:
            began = time.perf_counter()
            float((weight @ x.T).sum())  # the same work at every step: the machine's speed then
            middle = time.perf_counter()
            result = original(self, *arguments)
            float(result.loss)  # a CPU step is over then; a CUDA loop reads it a step later
            ended = time.perf_counter()
            inside.append(ended - began)
            speeds.append((middle - began) / (ended - middle))
            resident.append(psutil.Process().memory_info().rss)
            return result

        Trainer.train_step = timed  # type: ignore[method-assign]
        try:
            train_mode.run(config)
        finally:
            Trainer.train_step = original  # type: ignore[method-assign]
        rows = [r for r in read_metrics(Path(folder) / "out/metrics.jsonl") if r["event"] == "step"]
    tokens = 32
    whole = [tokens / row["tokens_per_second"] for row in rows]
    tenth = steps // 10
    around = statistics.median(a - b for a, b in zip(whole[tenth:], inside[tenth:], strict=True))
    half = statistics.median(speeds[steps // 2 :]), statistics.median(speeds[tenth : steps // 2])
    return [
        ("milliseconds of the loop around a step", 1000 * around, ""),
        (
            f"speed in units of a fixed product's, second half of {steps} steps over the first",
            half[0] / half[1],
            "0.95-1.05",
        ),
        (
            f"resident memory, step {steps} over step {tenth}",
            resident[-1] / resident[tenth],
            "<= 1.02",
        ),
    ]


def measure_start(repeats: int) -> list[Row]:
    """Seconds of `--help`, and from the command to the first step's line: nano, data prepared."""
    main = [sys.executable, str(ROOT / "main.py")]
    helps, firsts = [], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("a line of words to learn from, and more\n" * 20_000)
        train = [
            *main,
            "--train",
            "--model-size",
            "nano",
            "--text-file",
            "text.txt",
            "--batch-size",
            "4",
            "--no-compile-model",
            "--max-steps",
        ]
        subprocess.run(
            [*train, "1", "--output-dir", "first"], cwd=folder, check=True, capture_output=True
        )
        for number in range(repeats):
            began = time.perf_counter()
            subprocess.run([*main, "--help"], check=True, capture_output=True)
            helps.append(time.perf_counter() - began)
            began = time.perf_counter()
            command = [*train, "500", "--output-dir", f"out{number}"]
            with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as run:
                assert run.stderr is not None
                for line in run.stderr:
                    if line.startswith("step 1/"):
                        firsts.append(time.perf_counter() - began)
                        run.kill()
    return [
        ("seconds, --help", statistics.median(helps), "<= 0.15"),
        ("seconds to the first training step, nano", statistics.median(firsts), "<= 5"),
    ]


def run(smoke: bool, batches: tuple[int, ...]) -> Iterator[Row]:
    """All rows, as they come."""
    on_cuda = torch.cuda.is_available() and not smoke
    runtime = build_runtime(SystemSettings(device="cuda" if on_cuda else "cpu"))
    yield from measure_loop(runtime, 60 if smoke else 1000)  # first: its memory is looked at
    if on_cuda:
        yield from compare_on_cuda(batches, steps=12)
    elif smoke:
        yield from compare_on_cpu(SMOKE_SHAPE, SMOKE_BATCH, repeats=3)
    else:
        yield from compare_on_cpu(CPU_SHAPE, CPU_BATCH, repeats=7)
    nano = build_trainer(
        replace(ModelSettings(model_size="nano").resolve(50257)),
        8,
        SystemSettings(device=runtime.device.type, compile_model=False),
    )
    batch = draw_batch(nano.model.config, 8, nano.runtime.device)
    step = alternate({"step": build_own_step(nano, batch)}, 3 if smoke else 10)["step"]
    yield "milliseconds of a step, nano, batch 8", 1000 * step, ""
    yield from measure_start(1 if smoke else 2 if on_cuda else 5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=CUDA_BATCHES, help="batch sizes on CUDA"
    )
    given = parser.parse_args()
    rows = []
    for row in run(given.smoke, tuple(given.batches)):
        rows.append(row)
        print_rows([row])
        sys.stdout.flush()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.smoke else "cpu")
    print(
        json.dumps(
            {
                "device": describe_device(device),
                "torch": str(torch.__version__),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "rows": rows,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
