"""Parameters and floating-point operations of a model."""

from __future__ import annotations

import dataclasses

from preflight.models.building import build_on_meta
from preflight.models.lora import no_target_error
from preflight.settings import ModelConfig
from preflight.settings.finetuning import AdapterConfig


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
    """Floating-point operations of the matmuls per token at full context, by a closed formula.

    Two for each weight of a matrix; a backward pass does two matmuls for each of the forward pass.
    Attention counts the whole square of the context, as PaLM's formula does (Chowdhery et al. 2022,
    appendix B); a causal kernel does half of it.
    """
    C = config.n_embeddings
    weights = config.vocab_size * C
    weights += sum(i * o for block in list_linear_shapes(config) for i, o in block.values())
    if config.model_family == "mlp":
        weights, attended = weights + C * config.ffn_hid_dim, 0  # the last layer's down_proj
    else:
        attended = config.n_layers * 2 * config.context_length * C  # scores, and their values
    return (3 if training else 1) * 2 * (weights + attended)


def list_linear_shapes(config: ModelConfig) -> list[dict[str, tuple[int, int]]]:
    """Inputs and outputs of the linear layers of each block, by name, in the order of computing."""
    C, hidden = config.n_embeddings, config.ffn_hid_dim
    if config.model_family == "mlp":
        inputs = [config.context_length * C] + [hidden] * (config.n_layers - 1)
        return [{"up_proj": (n_inputs, hidden)} for n_inputs in inputs]
    block = {
        "qkv_proj": (C, (config.n_heads + 2 * config.kv_heads) * config.head_dim),
        "o_proj": (C, C),
    }
    if config.feed_forward == "mlp":
        block["up_proj"] = (C, hidden)
    else:
        block["gate_up_proj"] = (C, 2 * hidden)
    return [block | {"down_proj": (hidden, C)}] * config.n_layers


def resolve_adapter(config: ModelConfig, adapter: AdapterConfig) -> AdapterConfig:
    """`adapter` with the targets that this model has, in the order of their names.

    Raises:
        PreflightError: code FLAGS, when the model has none of them.
    """
    present = set(list_linear_shapes(config)[0])
    targets = tuple(sorted(present & set(adapter.targets)))
    if not targets:
        raise no_target_error(adapter, present)
    return dataclasses.replace(adapter, targets=targets)


def count_adapter_parameters(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters of the adapters that `add_adapters` gives this model, by a closed formula.

    Raises:
        PreflightError: code FLAGS, when the model has none of the targets.
    """
    targets = resolve_adapter(config, adapter).targets
    return sum(
        adapter.rank * sum(shape)
        for block in list_linear_shapes(config)
        for name, shape in block.items()
        if name in targets
    )


def estimate_adapter_flops_per_token(
    config: ModelConfig, adapter: AdapterConfig, *, training: bool = True
) -> int:
    """As `estimate_flops_per_token`, of a model whose adapters alone are trained, by a formula.

    The backward pass goes through every layer, but has no gradient to compute of a frozen weight:
    one matmul for each of the forward pass, and two for those of attention and of the adapters.
    Before the first adapter there is nothing to compute.
    """
    C, total, reached = config.n_embeddings, 0, False
    head = C * config.vocab_size
    tail = [head, config.ffn_hid_dim * C] if config.model_family == "mlp" else [head]
    for block in list_linear_shapes(config):
        for name, (n_inputs, n_outputs) in block.items():
            backward = training and reached
            total += (1 + backward) * n_inputs * n_outputs
            if name in adapter.targets:
                total += (2 + backward if training else 1) * adapter.rank * n_inputs  # A
                total += (3 if training else 1) * adapter.rank * n_outputs  # B
                reached = True
            if name == "qkv_proj":  # queries times keys, probabilities times values
                total += (3 if training and reached else 1) * 2 * config.context_length * C
    return 2 * (total + (1 + training) * sum(tail))
