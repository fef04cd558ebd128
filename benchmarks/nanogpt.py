"""Training steps on the CPU: ours, nanoGPT as shipped and tuned by hand, Hugging Face's, in turn.

    python benchmarks/nanogpt.py --nanogpt FOLDER [--shapes 6L nano] [--rounds 3]

FOLDER is a clone of karpathy/nanoGPT. As shipped its CPU loop is fp32 without compilation. By hand
it is torch.compile and fused AdamW, in bf16 autocast or in fp32, as Hugging Face's GPT-2 in bf16.
`matmuls` are those of our step alone, in our layouts and precision. Each subject has a process of
its own in every round; its figure is the median of its rounds, each the median of six steps after
two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SHAPES = {  # layers, heads, hidden size, context, batch
    "6L": (6, 6, 384, 256, 8),
    "nano": (3, 4, 128, 256, 8),
    "micro": (4, 4, 256, 256, 8),
    "small": (12, 12, 768, 1024, 2),
}
PEERS = ("nanoGPT", "nanoGPT by hand", "nanoGPT by hand, fp32", "transformers")
SUBJECTS = ("ours", "ours, compiled", *PEERS, "matmuls")
COMMON = """
import json, resource, statistics, sys, time
import torch
subject, folder, layers, heads, width, context, batch = json.loads(sys.argv[1])
V = 50257
x = torch.randint(0, V, (batch, context + 1), generator=torch.Generator().manual_seed(0))
inputs, targets = x[:, :-1].contiguous(), x[:, 1:].contiguous()
def report(step):
    step(), step()
    seconds = []
    for _ in range(6):
        began = time.perf_counter(); step(); seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([batch * context / statistics.median(seconds), peak]))
"""
OURS = """
sys.path.insert(0, folder)
from preflight.device.runtime import build_runtime
from preflight.settings import ControlSettings, ModelConfig, SystemSettings, TrainingSettings
from preflight.training.plan import build_plan
from trainer import build_trainer
runtime = build_runtime(SystemSettings(compile_model=subject == "ours, compiled"), 1000)
config = ModelConfig(V, context, width, heads, layers, 4 * width)
if subject == "matmuls":
    pairs = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    pairs.append((V, width))
    n = batch * context
    work = [(torch.randn(n, i, dtype=runtime.dtype), torch.randn(o, i, dtype=runtime.dtype),
             torch.randn(n, o, dtype=runtime.dtype)) for o, i in pairs]
    def step():
        for a, w, g in work:
            a @ w.T, g @ w, g.T @ a
else:
    settings = TrainingSettings(batch_size=batch, learning_rate=1e-3, max_steps=1000)
    plan = build_plan(settings, ControlSettings(), context, 10**6, 10**3)
    trainer = build_trainer(config, settings, plan, runtime)
    number = [0]
    def step():
        number[0] += 1
        float(trainer.train_step(number[0], [(inputs, targets)]).loss)
report(step)
"""
PEER = """
sys.path.insert(0, folder)
by_hand = subject != "nanoGPT"
if subject == "transformers":
    from transformers import GPT2Config, GPT2LMHeadModel
    whole = GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    class Model(torch.nn.Module):
        def forward(self, inputs, targets):  # the labels are the inputs, which it shifts itself
            return None, whole(inputs, labels=inputs).loss
    model = Model()
    model.whole = whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
else:
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=context, vocab_size=V, n_layer=layers, n_head=heads,
                          n_embd=width, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
if by_hand:
    groups = optimizer.param_groups
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    model = torch.compile(model)
def step():
    with torch.autocast("cpu", torch.bfloat16, enabled=by_hand and "fp32" not in subject):
        _, loss = model(inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
report(step)
"""


def run(subject: str, shape: tuple[int, ...], nanogpt: str) -> tuple[float, float]:
    """Tokens/s and peak resident MiB."""
    is_peer = subject in PEERS
    folder = nanogpt if is_peer else str(Path(__file__).resolve().parent.parent)
    script = COMMON + (PEER if is_peer else OURS)
    environment = dict(os.environ)
    if not is_peer:  # as main.py does
        environment.setdefault("GOMP_SPINCOUNT", "2000")
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([subject, folder, *shape])],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=environment,
    )
    rate, peak = json.loads(done.stdout.splitlines()[-1])
    return rate, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["6L", "nano"])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name in given.shapes:
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(given.rounds):
            for subject in given.subjects:
                found.setdefault(subject, []).append(run(subject, SHAPES[name], given.nanogpt))
        ours = statistics.median(rate for rate, _ in found.get("ours", [(float("nan"), 0.0)]))
        for subject, figures in found.items():
            rate = statistics.median(rate for rate, _ in figures)
            peak = max(peak for _, peak in figures)
            print(
                f"{name:6} {subject:22} {rate:10,.0f} tokens/s  ours over it {ours / rate:6.2f}  "
                f"{peak:8,.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
