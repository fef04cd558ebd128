"""`DecoderOnlyTransformer`: GPT-2's architecture and its successors', from one `ModelConfig`.

Which norm, which positions, which feed-forward part and how many heads of keys and values a model
has is decided when it is built. Shapes: B sequences, T tokens in each, C hidden size, H heads,
K heads of keys and values, D = C / H size of a head, V vocabulary.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3:
learned positions, layer normalisation before each sublayer, GELU, tied embeddings. Touvron et al.
2023 (arXiv:2302.13971), section 2.2: rotary positions, RMSNorm, SwiGLU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preflight.models.base import ResidualLinear, TokenModel, initialise
from preflight.models.causal_attention import attend_causally
from preflight.models.graph_decoder import GraphDecoder, GraphStep
from preflight.models.kv_cache import (
    CacheStep,
    DecodeStep,
    ExtendStep,
    KVCache,
    PrefillStep,
)
from preflight.models.loss import Targets
from preflight.models.mlp import MLP
from preflight.models.norms import build_norm
from preflight.models.positions import LearnedPositions
from preflight.models.quantization import Int8Embedding, Int8Linear, Int8Matrix
from preflight.models.single_row import SingleRowDecoder
from preflight.settings import ModelConfig
from preflight.settings.kinds import FEED_FORWARDS, POSITIONS


class Attention(nn.Module):
    """Causal self-attention over all heads at once; a key's head may serve several queries' heads
    (Ainslie et al. 2023, arXiv:2305.13245).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = [config.n_heads, config.kv_heads, config.kv_heads]
        self.is_grouped = config.kv_heads < config.n_heads
        self.dropout = config.dropout
        width = sum(self.heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.n_embeddings, width, config.bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.rotate = POSITIONS.load(config.positions).rotate
        self.o_proj = ResidualLinear(config.n_embeddings, config.n_embeddings, config.bias)

    def forward(self, x: Tensor, layer: int, step: CacheStep | None, angles: Any) -> Tensor:
        """(B T C) -> (B T C); with a cache step, over the cached tokens as well."""
        B, T, C = x.shape
        heads = self.qkv_proj(x).view(B, T, sum(self.heads), -1)  # B T H+2K D
        # Split before the transposition, so that the gradient is assembled in one piece.
        q, k, v = heads.split(self.heads, dim=2)
        q, k, v = self.rotate(self.q_norm(q), self.k_norm(k), v, angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H T D, B K T D
        if step is None:
            mixed = attend_causally(q, k, v, self.dropout if self.training else 0.0)
        else:
            k, v = step.append(layer, k, v)
            mixed = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=step.mask,
                is_causal=step.is_causal,
                enable_gqa=self.is_grouped,
            )
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, C))  # B H T D -> B T C


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.n_embeddings)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = build_norm(config, config.n_embeddings)
        self.mlp = FEED_FORWARDS.load(config.feed_forward)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, layer: int, step: CacheStep | None = None, angles: Any = None
    ) -> Tensor:
        """(B T C) -> (B T C)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), layer, step, angles))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DecoderOnlyTransformer(TokenModel):
    """Tokens in, logits or the loss out. It is a `LanguageModel`.

    Args:
        config: the architecture.
        gradient_checkpointing: recompute each block in the backward pass (Chen et al. 2016,
            arXiv:1604.06174); a block then keeps its input alone.
    """

    def __init__(self, config: ModelConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(config)
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_positions = POSITIONS.load(config.positions)(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = build_norm(config, config.n_embeddings)
        self.build_head()
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02); layers that add to the residual stream are scaled
        down by the square root of their number, so that the stream's variance stays near one.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for module in self.modules():  # norms are made with ones and zeros
            initialise(module, residual_std if isinstance(module, ResidualLinear) else 0.02)

    def forward(self, tokens: Tensor, targets: Targets | None = None) -> Tensor:
        """Logits (B T V), or the summed cross-entropy (scalar, fp32) when `targets` are given.

        Args:
            tokens: ids (B T), T at most the context length.
            targets: the ids that follow (B T), -100 where nothing is to be predicted; or the rows
                of those that are to be.

        Raises:
            ValueError: T is longer than the context.
        """
        return self.compute_output(self.compute_hidden(tokens), targets)

    def compute_hidden(self, tokens: Tensor) -> Tensor:
        """The vectors (B T C) from which the logits after each token are computed.

        Raises:
            ValueError: T is longer than the context.
        """
        self.check_length(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = self.embed_positions.compute_angles(positions)
        x = self.dropout(self.embed_positions.embed(self.embed_tokens(tokens), positions))  # B T C
        for layer, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Without dropout there is no randomness to replay.
                keep_rng = self.config.dropout > 0
                x = checkpoint(
                    *(block, x, layer, None, angles),
                    use_reentrant=False,
                    preserve_rng_state=keep_rng,
                )
            else:
                x = block(x, layer, None, angles)
        return self.norm(x)

    def extend(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Put the keys and values of tokens into rows of `cache`, behind what they hold.

        Args:
            tokens: ids (B T), row i padded on the right to T from its `lengths[i]` tokens. No token
                attends to the padding.
            cache: B of its rows are extended.
            rows: which.
            lengths: tokens for each, the most is T.

        Raises:
            ValueError: a row cannot hold them.
        """
        self._extend(tokens, cache, rows, lengths)

    def extend_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As `extend` of the only row of `cache` by tokens (1 T); the vectors (1 T C) from which
        the logits after each are computed.
        """
        return self.norm(self._extend(tokens, cache, [0], [tokens.shape[1]]))

    def _extend(
        self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]
    ) -> Tensor:
        """As `extend`; what the last block gives (B T C)."""
        T = tokens.shape[1]
        ends = [cache.lengths[row] + length for row, length in zip(rows, lengths, strict=True)]
        cache.check_capacity(max(ends, default=0))
        step: PrefillStep | ExtendStep
        if any(cache.lengths[row] for row in rows):
            step = ExtendStep(cache, rows, lengths, T, tokens.device)
            positions = step.positions  # B T
        else:
            step = PrefillStep(cache, rows, T)
            positions = torch.arange(T, device=tokens.device)
        angles = self.embed_positions.compute_angles(positions)
        x = self.embed_positions.embed(self.embed_tokens(tokens), positions)  # B T C
        for layer, block in enumerate(self.layers if T else ()):
            x = block(x, layer, step, angles)
        for row, end in zip(rows, ends, strict=True):
            cache.lengths[row] = end
        return x

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row of `cache`; logits (B V) of what follows it.

        Args:
            tokens: ids (B,).
            cache: extended by one token in each row. Rows may differ in length.

        Raises:
            ValueError: a row is full.
        """
        cache.check_capacity(max(cache.lengths) + 1)
        logits = self.decode_step(tokens, DecodeStep(cache, tokens.device))
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits

    def decode_step(self, tokens: Tensor, step: DecodeStep | GraphStep) -> Tensor:
        """What `decode` computes on the device: keys and values into the cache, logits (B V)."""
        positions = step.positions[:, None]  # B 1
        angles = self.embed_positions.compute_angles(positions)
        x = self.embed_positions.embed(self.embed_tokens(tokens[:, None]), positions)  # B 1 C
        for layer, block in enumerate(self.layers):
            x = block(x, layer, step, angles)
        return self.compute_logits(self.norm(x[:, 0]))  # B V

    def fast_decoder(self, cache: KVCache) -> SingleRowDecoder | GraphDecoder | None:
        """What decodes into `cache` faster than `decode`; ``None`` where nothing does.

        On CUDA that is a graph of the step's kernels. On the CPU it is numpy, for one row in fp32
        and a model made of nothing but the modules that it knows, which are GPT-2's, or those in
        int8 that are multiplied in integers. Weights that are being trained have neither.
        """
        weight = next(iter(self.norm.parameters()))  # matrices may be quantised
        if weight.dtype != cache.layers[0].dtype or any(p.requires_grad for p in self.parameters()):
            return None
        if weight.device.type == "cuda":
            return GraphDecoder(self, cache)
        is_supported = (
            self.decodes_in_numpy
            and len(cache.lengths) == 1
            and weight.device.type == cache.layers[0].device.type == "cpu"
            and weight.dtype == torch.float32
            and self._has_parts_of_gpt2()
        )
        if not is_supported:
            return None
        modules = dict(self.named_modules())
        return SingleRowDecoder(self.config, modules, self.config.norm_eps, cache)

    def _has_parts_of_gpt2(self) -> bool:
        """Whether nothing is changed that `SingleRowDecoder` would have to compute otherwise."""
        changed = set(self.config.list_changed_parts()) - {"model_family", "norm_eps"}
        return not changed and all(
            module.is_integer if type(module) is Int8Matrix else type(module) in _SINGLE_ROW_MODULES
            for module in self.modules()
        )


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
    Int8Linear,
    Int8Embedding,
    LearnedPositions,
    nn.Identity,
    nn.Dropout,
    nn.ModuleList,
}
