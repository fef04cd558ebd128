"""What the benchmarks share: Hugging Face's GPT-2 with our weights, and runs in alternation."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from transformer_model import DecoderOnlyTransformer


def build_hugging_face(
    ours: DecoderOnlyTransformer, **options: Any
) -> tuple[GPT2LMHeadModel, dict[str, str]]:
    """GPT-2 of the same weights, and its parameter names by ours; `options` are its config's."""
    config = ours.config
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.n_embeddings,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.ffn_hid_dim,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=1e-5,
            **options,
        )
    )
    parts = {
        "input_layernorm": "ln_1",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    names = {
        "embed_tokens.weight": "transformer.wte.weight",
        "embed_positions.weight": "transformer.wpe.weight",
    }
    names |= {f"norm.{kind}": f"transformer.ln_f.{kind}" for kind in ("weight", "bias")}
    names |= {
        f"layers.{i}.{part}.{kind}": f"transformer.h.{i}.{theirs}.{kind}"
        for i in range(config.n_layers)
        for part, theirs in parts.items()
        for kind in ("weight", "bias")
    }
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs[names[name]].copy_(to_hugging_face(name, parameter))
    return peer, names


def to_hugging_face(name: str, tensor: Tensor) -> Tensor:
    """Conv1D keeps its weights as (in, out), nn.Linear as (out, in)."""
    is_linear = tensor.dim() == 2 and "embed" not in name
    return tensor.T if is_linear else tensor


def alternate(
    subjects: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each subject. They take turns, so that noise meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(warm_up + repeats):
        for name, act in subjects.items():
            began = time.perf_counter()
            act()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def run_apart(build: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    """What ``build(*arguments)`` gives, called in a process of its own.

    So a peer runs as it would alone: what ours asks of malloc is not asked for it.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, build, arguments), daemon=True).start()
    there.close()  # so that a peer that fails is noticed here

    def act() -> Any:
        here.send(None)
        return here.recv()

    return act


def _serve(
    connection: Connection, build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]
) -> None:
    act = build(*arguments)
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while True:
            connection.recv()
            connection.send(act())


def list_product_weights(model: DecoderOnlyTransformer) -> list[Tensor]:
    """Every weight (out, in) that takes part in a product, the head among them."""
    return [
        p
        for name, p in model.named_parameters()
        if p.dim() == 2 and name != "embed_positions.weight"
    ]


def print_rows(rows: list[tuple[str, Any, str]]) -> None:
    """Name, figure and goal, a line each."""
    for name, value, goal in rows:
        shown = (
            f"{value:,.3f}"
            if isinstance(value, float) and value < 100
            else (f"{value:,.0f}" if isinstance(value, (int, float)) else str(value))
        )
        print(f"{name:58} {shown:>12} {goal:>10}")
