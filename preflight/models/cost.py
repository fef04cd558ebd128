"""Parameters and floating-point operations of a model, by closed formulas."""

from __future__ import annotations

from preflight.settings import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, the tied embedding counted once."""
    C, hidden = config.n_embeddings, config.ffn_hid_dim
    norms = 4 * C
    attention = 3 * C * C + 3 * C + C * C + C
    feed_forward = 2 * C * hidden + hidden + C
    embeddings = (config.vocab_size + config.context_length) * C
    return embeddings + config.n_layers * (norms + attention + feed_forward) + 2 * C


def estimate_flops_per_token(config: ModelConfig, *, training: bool = True) -> int:
    """Floating-point operations per token at full context; 6N + 12 L C T in training.

    N counts the weights that take part in products (the tied embedding once, as the head;
    positions, norms and biases not). Source: Chowdhery et al. 2022 (PaLM), appendix B. The
    attention term counts the whole square, as that paper does; a causal kernel does half of it.
    """
    C = config.n_embeddings
    weights = config.vocab_size * C + config.n_layers * (4 * C * C + 2 * C * config.ffn_hid_dim)
    attention = 2 * config.n_layers * C * config.context_length
    return (6 if training else 2) * (weights + attention)
