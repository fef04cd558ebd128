"""`DecoderOnlyTransformer`: GPT-2's architecture, its loss, its KV cache and its own arithmetic.

Shapes: B sequences, T tokens in each, C width, H heads, D = C / H width of a head, V vocabulary,
S capacity of the cache, N = B * T rows of the loss.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3:
learned positions, layer normalisation before each part, GELU, tied embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preflight.models.loss import linear_cross_entropy
from preflight.settings import ModelConfig

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class KVCache:
    """Keys and values of the tokens read so far, allocated once; a row per sequence.

    `lengths` counts the tokens of each row. It is kept on the host, where it is known anyway: a
    step then never waits for the device.

    Args:
        config: the model's architecture.
        batch_size: rows.
        device: where the model is.
        dtype: the model's.
        capacity: tokens that a row can hold, at most the context length (the default).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        self.capacity = min(capacity or config.context_length, config.context_length)
        head_width = config.n_embeddings // config.n_heads
        shape = (2, batch_size, config.n_heads, self.capacity, head_width)
        # Zeros, not garbage: a hidden value is multiplied by zero, and 0 * NaN is NaN.
        self.layers = [  # keys and values in one tensor: a step writes once
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)
        ]
        self.lengths = [0] * batch_size

    def check_capacity(self, n_tokens: int) -> None:
        """Raise `ValueError` where a row cannot hold so many."""
        if n_tokens > self.capacity:
            raise ValueError(f"{n_tokens} tokens are more than the cache's {self.capacity}")

    def keep_rows(self, rows: list[int]) -> None:
        """Drop every row but these, which move up in the order given."""
        self.layers = [keys_values[:, rows] for keys_values in self.layers]
        self.lengths = [self.lengths[row] for row in rows]


class _FillStep:
    """Whole windows are read into rows that start anew: causal, nothing earlier to look at."""

    mask = None
    is_causal = True

    def __init__(self, cache: KVCache, rows: list[int], n_tokens: int) -> None:
        self.layers = cache.layers
        self.n_tokens = n_tokens
        all_rows = list(range(len(cache.lengths)))
        self.rows: slice | list[int] = slice(None) if rows == all_rows else rows

    def append(self, layer: int, keys_values: Tensor) -> Tensor:
        """Write the new keys and values (2 B H T D); return those to look at."""
        self.layers[layer][:, self.rows, :, : self.n_tokens] = keys_values
        return keys_values


class _ReadStep:
    """One token more in every row; it looks at all of its row."""

    is_causal = False

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self.layers = cache.layers
        self.used = max(cache.lengths) + 1  # places in use after this step, in the longest row
        self.mask: Tensor | None = None
        if min(cache.lengths) == self.used - 1:  # rows of one length need no mask
            self.positions = torch.full((len(cache.lengths),), self.used - 1, device=device)
            return
        self.positions = torch.tensor(cache.lengths, device=device)  # B
        self.rows = torch.arange(len(cache.lengths), device=device)  # B
        places = torch.arange(self.used, device=device)
        self.mask = (places <= self.positions[:, None])[:, None, None]  # B 1 1 used

    def append(self, layer: int, keys_values: Tensor) -> Tensor:
        """Write the new keys and values (2 B H 1 D); return all of them (2 B H used D)."""
        cached = self.layers[layer]
        if self.mask is None:
            cached[:, :, :, self.used - 1 : self.used] = keys_values
        else:
            # Two index tensors around a slice put what they index first: B 2 H D.
            cached[:, self.rows, :, self.positions] = keys_values[:, :, :, 0].transpose(0, 1)
        return cached[:, :, :, : self.used]


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embeddings, 3 * config.n_embeddings)
        self.projection = nn.Linear(config.n_embeddings, config.n_embeddings)

    def forward(self, x: Tensor, layer: int, step: _FillStep | _ReadStep | None) -> Tensor:
        """(B T C) -> (B T C); with a cache step, over the cached tokens as well."""
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        if step is None:
            # Taken apart before it is turned: so its gradient is put together in one piece.
            q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))  # B H T D
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            heads = heads.permute(2, 0, 3, 1, 4)  # 3 B H T D
            k, v = step.append(layer, heads[1:])
            mixed = F.scaled_dot_product_attention(
                heads[0], k, v, attn_mask=step.mask, is_causal=step.is_causal
            )
        return self.projection(mixed.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, applied to each token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embeddings, config.ffn_hid_dim)
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.contract = nn.Linear(config.ffn_hid_dim, config.n_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        """(B T C) -> (B T C)."""
        return self.contract(self.activation(self.expand(x)))


class Block(nn.Module):
    """Attention, then the feed-forward part, each on a normalised input and added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embeddings)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embeddings)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, step: _FillStep | _ReadStep | None = None) -> Tensor:
        """(B T C) -> (B T C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layer, step))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderOnlyTransformer(nn.Module):
    """A GPT: tokens in, logits or the loss out.

    Args:
        config: the architecture.
        gradient_checkpointing: recompute each block in the backward pass (Chen et al. 2016,
            arXiv:1604.06174); a block then keeps its input alone.
    """

    def __init__(self, config: ModelConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embeddings)
        self.position_embedding = nn.Embedding(config.context_length, config.n_embeddings)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.n_embeddings)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), and the maps back into the residual stream scaled
        down by the square root of their number, so that the stream's variance stays near one.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
            else:
                back = name.endswith(("attention.projection.weight", "contract.weight"))
                nn.init.normal_(parameter, std=residual_std if back else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B T V), or the mean cross-entropy (scalar, fp32) when `targets` are given.

        Args:
            tokens: ids (B T), T at most the context length.
            targets: the ids that follow (B T).

        Raises:
            ValueError: T is longer than the context.
        """
        positions = torch.arange(self._checked_length(tokens), device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Without dropout there is no randomness to replay.
                x = checkpoint(
                    block, x, layer, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
                )
            else:
                x = block(x, layer)
        x = self.final_norm(x)
        weight = self.token_embedding.weight
        if targets is None:
            return F.linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())

    def fill(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Read tokens into rows of `cache`, in place of what they held.

        Args:
            tokens: ids (B T), row i padded on the right to T from its `lengths[i]` tokens. The
                padding's keys are overwritten by the tokens to come, and no token looks at them.
            cache: B of its rows are replaced.
            rows: which.
            lengths: tokens in each row of `tokens`.

        Raises:
            ValueError: T is more than the cache holds.
        """
        T = tokens.shape[1]
        cache.check_capacity(T)
        positions = torch.arange(T, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        step = _FillStep(cache, rows, T)
        for layer, block in enumerate(self.blocks if T else ()):
            x = block(x, layer, step)
        for row, length in zip(rows, lengths, strict=True):
            cache.lengths[row] = length

    def read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read one token more in every row of `cache`; logits (B V) of what follows it.

        Args:
            tokens: ids (B,).
            cache: read and extended by one token in each row. Rows may differ in length.

        Raises:
            ValueError: a row is full.
        """
        cache.check_capacity(max(cache.lengths) + 1)
        step = _ReadStep(cache, tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(step.positions)
        x = x[:, None]  # B 1 C
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, step)
        cache.lengths = [length + 1 for length in cache.lengths]
        return F.linear(self.final_norm(x[:, 0]), self.token_embedding.weight)

    def _checked_length(self, tokens: Tensor) -> int:
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"{length} tokens are longer than the context of {self.config.context_length}"
            )
        return length
