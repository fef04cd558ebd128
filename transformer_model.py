"""`DecoderOnlyTransformer`: GPT-2's architecture, its loss and its decoding with a cache.

Shapes: B sequences, T tokens in each, C hidden size, H heads, D = C / H size of a head,
V vocabulary, N = B * T rows of the loss.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3:
learned positions, layer normalisation before each sublayer, GELU, tied embeddings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preflight.models.kv_cache import CacheStep, DecodeStep, KVCache, PrefillStep
from preflight.models.loss import linear_cross_entropy
from preflight.models.protocol import ParameterGroup
from preflight.models.single_row import SingleRowDecoder
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS


class ResidualLinear(nn.Linear):
    """A linear layer whose result is added to the residual stream; initialised smaller."""


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.n_embeddings, 3 * config.n_embeddings)
        self.o_proj = ResidualLinear(config.n_embeddings, config.n_embeddings)

    def forward(self, x: Tensor, layer: int, step: CacheStep | None) -> Tensor:
        """(B T C) -> (B T C); with a cache step, over the cached tokens as well."""
        B, T, C = x.shape
        heads = self.qkv_proj(x).view(B, T, 3, self.n_heads, C // self.n_heads)  # B T 3 H D
        if step is None:
            # Split before the transposition, so that the gradient is assembled in one piece.
            q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))  # B H T D
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            heads = heads.permute(2, 0, 3, 1, 4)  # 3 B H T D
            k, v = step.append(layer, heads[1:])
            mixed = F.scaled_dot_product_attention(
                heads[0], k, v, attn_mask=step.mask, is_causal=step.is_causal
            )
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, C))  # B H T D -> B T C


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embeddings, config.ffn_hid_dim)
        self.activation = ACTIVATIONS.load(config.activation)
        self.down_proj = ResidualLinear(config.ffn_hid_dim, config.n_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        """(B T C) -> (B T C)."""
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.n_embeddings)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.n_embeddings)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, step: CacheStep | None = None) -> Tensor:
        """(B T C) -> (B T C)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), layer, step))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DecoderOnlyTransformer(nn.Module):
    """A GPT: tokens in, logits or the loss out. It is a `LanguageModel`.

    Args:
        config: the architecture.
        gradient_checkpointing: recompute each block in the backward pass (Chen et al. 2016,
            arXiv:1604.06174); a block then keeps its input alone.
    """

    def __init__(self, config: ModelConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embeddings)
        self.embed_positions = nn.Embedding(config.context_length, config.n_embeddings)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.n_embeddings)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02); layers that add to the residual stream are scaled
        down by the square root of their number, so that the stream's variance stays near one.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for module in self.modules():  # layer norms are made with ones and zeros
            if isinstance(module, (nn.Linear, nn.Embedding)):
                is_residual = isinstance(module, ResidualLinear)
                nn.init.normal_(module.weight, std=residual_std if is_residual else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trainable parameters by kind, each in the order of the model."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [
            ParameterGroup("matrix", [p for p in trainable if p.dim() > 1 and id(p) not in tables]),
            ParameterGroup("embedding", [p for p in trainable if id(p) in tables]),
            ParameterGroup("scalar", [p for p in trainable if p.dim() < 2]),
        ]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B T V), or the summed cross-entropy (scalar, fp32) when `targets` are given.

        Args:
            tokens: ids (B T), T at most the context length.
            targets: the ids that follow (B T); -100 where nothing is to be predicted.

        Raises:
            ValueError: T is longer than the context.
        """
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise ValueError(
                f"{T} tokens are longer than the context of {self.config.context_length}"
            )
        positions = torch.arange(T, device=tokens.device)
        x = self.dropout(self.embed_tokens(tokens) + self.embed_positions(positions))  # B T C
        for layer, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Without dropout there is no randomness to replay.
                x = checkpoint(
                    block, x, layer, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
                )
            else:
                x = block(x, layer)
        x = self.norm(x)
        weight = self.embed_tokens.weight
        if targets is None:
            return F.linear(x, weight)  # B T V
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())

    def prefill(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Put the keys and values of tokens into rows of `cache`, in place of what they held.

        Args:
            tokens: ids (B T), row i padded on the right to T from its `lengths[i]` tokens. The
                padding's keys are overwritten by the tokens to come, and no token attends to them.
            cache: B of its rows are replaced.
            rows: which.
            lengths: tokens in each row of `tokens`.

        Raises:
            ValueError: T is more than the cache holds.
        """
        T = tokens.shape[1]
        cache.check_capacity(T)
        positions = torch.arange(T, device=tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)  # B T C
        step = PrefillStep(cache, rows, T)
        for layer, block in enumerate(self.layers if T else ()):
            x = block(x, layer, step)
        for row, length in zip(rows, lengths, strict=True):
            cache.lengths[row] = length

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row of `cache`; logits (B V) of what follows it.

        Args:
            tokens: ids (B,).
            cache: extended by one token in each row. Rows may differ in length.

        Raises:
            ValueError: a row is full.
        """
        cache.check_capacity(max(cache.lengths) + 1)
        step = DecodeStep(cache, tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(step.positions)  # B C
        x = x[:, None]  # B 1 C
        for layer, block in enumerate(self.layers):
            x = block(x, layer, step)
        cache.lengths = [length + 1 for length in cache.lengths]
        return F.linear(self.norm(x[:, 0]), self.embed_tokens.weight)  # B V

    def single_row_decoder(self, cache: KVCache) -> SingleRowDecoder | None:
        """What decodes the one row of `cache` faster than `decode`; ``None`` where nothing does.

        That is numpy, for weights in fp32 on the CPU that are not being trained, and for a model
        made of nothing but the modules that it knows.
        """
        weight = self.embed_tokens.weight
        is_supported = (
            len(cache.lengths) == 1
            and weight.device.type == cache.layers[0].device.type == "cpu"
            and weight.dtype == cache.layers[0].dtype == torch.float32
            and not any(p.requires_grad for p in self.parameters())
            and all(type(module) in _SINGLE_ROW_MODULES for module in self.modules())
        )
        if not is_supported:
            return None
        return SingleRowDecoder(self.config, dict(self.named_parameters()), self.norm.eps, cache)


# What `SingleRowDecoder` computes; nothing derived from these, which may compute something else.
_SINGLE_ROW_MODULES = {
    DecoderOnlyTransformer,
    Block,
    Attention,
    MLP,
    ResidualLinear,
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
    nn.Dropout,
    nn.ModuleList,
}
