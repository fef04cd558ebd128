"""Parameters and floating-point operations of a model."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model by a closed formula, a tied embedding counted once.

    Nothing is built, so that a configuration can be refused before it is.
    """
    C, hidden = config.n_embeddings, config.ffn_hid_dim
    tables = count_embedding_parameters(config)
    if config.model_family == "mlp":
        biases = (config.n_layers * hidden + C) if config.bias else 0
        return (count_layer_inputs(config) + C) * hidden + biases + tables
    qkv = (config.n_heads + 2 * config.kv_heads) * config.head_dim
    up = hidden if config.feed_forward == "mlp" else 2 * hidden
    weights = C * qkv + C * C + C * up + hidden * C
    biases = (qkv + C + up + C) if config.bias else 0
    per_channel = 2 if config.bias and config.norm == "layer" else 1
    norms = per_channel * (2 * C + (2 * config.head_dim if config.qk_norm else 0))
    return tables + config.n_layers * (weights + biases + norms) + per_channel * C


def count_embedding_parameters(config: ModelConfig) -> int:
    """Those of the tables of tokens and positions, and of a head that is not tied."""
    rows = config.vocab_size * (1 if config.tied else 2)
    if config.positions == "learned" and config.model_family != "mlp":
        rows += config.context_length
    return rows * config.n_embeddings


def count_layer_inputs(config: ModelConfig) -> int:
    """Channels that enter the layers for each token, summed over the layers."""
    if config.model_family == "mlp":  # the first layer reads a whole context
        return config.context_length * config.n_embeddings + (
            (config.n_layers - 1) * config.ffn_hid_dim
        )
    return config.n_layers * config.n_embeddings


def count_tensors(config: ModelConfig) -> int:
    """Tensors in a checkpoint's file of weights."""
    first, second = (
        len(list(build_on_meta(dataclasses.replace(config, n_layers=n_layers)).parameters()))
        for n_layers in (1, 2)
    )
    return first + (config.n_layers - 1) * (second - first)


def estimate_flops_per_token(config: ModelConfig, *, training: bool = True) -> int:
    """Floating-point operations of the matmuls per token at full context.

    Counted by torch as a model without data runs; a backward pass does two matmuls for each of the
    forward pass. Attention counts the whole square of the context, as PaLM's formula does
    (Chowdhery et al. 2022, appendix B); a causal kernel does half of it.
    """
    return (3 if training else 1) * _count_forward_flops(config) // config.context_length


@functools.lru_cache(maxsize=64)
def _count_forward_flops(config: ModelConfig) -> int:
    """Of one sequence as long as the context. Layers are alike: two depths give a line."""
    counts = []
    for n_layers in (1, 2):
        model = build_on_meta(dataclasses.replace(config, n_layers=n_layers, dropout=0.0))
        tokens = torch.zeros((1, config.context_length), dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        counts.append(counter.get_total_flops())
    return counts[0] + (config.n_layers - 1) * (counts[1] - counts[0])
