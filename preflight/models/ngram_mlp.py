"""A neural n-gram model: the next token from the embeddings of the last n, without attention.

Shapes: B sequences, T tokens in each, n context length, C hidden size, F d_ff, V vocabulary.
Source: Bengio et al. 2003, "A Neural Probabilistic Language Model", section 2, equation 1, without
its direct connections; a projection to C before the head lets this share the table of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preflight.models.base import TokenModel, initialise
from preflight.models.kv_cache import KVCache
from preflight.models.loss import Targets
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS


class TokenCache(KVCache):
    """The ids of the tokens so far: one tensor (1 B S), with a row for each sequence."""

    token_dim = 2

    def __init__(
        self, config: ModelConfig, batch_size: int, device: torch.device, capacity: int | None
    ) -> None:
        self.capacity = min(capacity or config.context_length, config.context_length)
        self.layers = [torch.zeros((1, batch_size, self.capacity), dtype=torch.long, device=device)]
        self.lengths = [0] * batch_size


class HiddenLayer(nn.Module):
    """A linear layer, its activation and dropout."""

    def __init__(self, config: ModelConfig, n_inputs: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(n_inputs, config.ffn_hid_dim, config.bias)
        self.activation = ACTIVATIONS.load(config.activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(... inputs) -> (... F)."""
        return self.dropout(self.activation(self.up_proj(x)))


class NgramMLP(TokenModel):
    """Tokens in, logits or the loss out. It is a `LanguageModel`.

    A token with fewer than n before it sees zeros in their place.

    Args:
        config: the architecture; `n_layers` hidden layers of `ffn_hid_dim`.
        gradient_checkpointing: recompute each hidden layer in the backward pass.
    """

    def __init__(self, config: ModelConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(config)
        self.gradient_checkpointing = gradient_checkpointing
        inputs = [config.context_length * config.n_embeddings]
        inputs += [config.ffn_hid_dim] * (config.n_layers - 1)
        self.layers = nn.ModuleList(HiddenLayer(config, n_inputs) for n_inputs in inputs)
        self.norm = nn.Identity()
        self.down_proj = nn.Linear(config.ffn_hid_dim, config.n_embeddings, config.bias)
        self.build_head()
        # Embeddings of a size that suits a tied head; scaled up on their way in, as in Vaswani et
        # al. 2017, section 3.4. Hidden layers keep the variance (LeCun et al. 1998, section 4.6).
        self.scale = math.sqrt(config.n_embeddings)
        hidden = {*self.layers.modules(), self.down_proj}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module in hidden:
                initialise(module, 1 / math.sqrt(module.in_features))
            else:
                initialise(module, 0.02)

    def forward(self, tokens: Tensor, targets: Targets | None = None) -> Tensor:
        """Logits (B T V), or the summed cross-entropy (scalar, fp32) when `targets` are given.

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
        return self._compute_hidden(tokens)

    def _compute_hidden(self, tokens: Tensor) -> Tensor:
        n = self.config.context_length
        padded = F.pad(self.embed_tokens(tokens) * self.scale, (0, 0, n - 1, 0))  # B T+n-1 C
        return self._transform(padded.unfold(1, n, 1).flatten(2))  # B T C n -> B T Cn -> B T C

    def _transform(self, x: Tensor) -> Tensor:
        """(... Cn) -> (... C)."""
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                keep_rng = self.config.dropout > 0
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=keep_rng)
            else:
                x = layer(x)
        return self.down_proj(self.norm(x))

    def build_cache(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> KVCache:
        """An empty cache of `batch_size` rows of ids, which have no use for `dtype`."""
        return TokenCache(self.config, batch_size, device, capacity)

    def extend(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Put tokens (B T) into rows of `cache`, behind what they hold: of each `lengths`.

        Raises:
            ValueError: a row cannot hold them.
        """
        ends = [cache.lengths[row] + length for row, length in zip(rows, lengths, strict=True)]
        cache.check_capacity(max(ends, default=0))
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            cache.layers[0][0, row, cache.lengths[row] : end] = tokens[i, : lengths[i]]
            cache.lengths[row] = end

    def extend_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As `extend` of the only row of `cache` by tokens (1 T); the vectors (1 T C) from which
        the logits after each are computed.
        """
        T = tokens.shape[1]
        self.extend(tokens, cache, [0], [T])
        [end] = cache.lengths
        first = max(0, end - T + 1 - self.config.context_length)  # that one of the tokens sees
        return self._compute_hidden(cache.layers[0][0, :, first:end])[:, -T:]

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token (B,) to every row of `cache`; logits (B V) of what follows it.

        Raises:
            ValueError: a row is full.
        """
        cache.check_capacity(max(cache.lengths) + 1)
        ids = cache.layers[0][0]  # B S
        newest = torch.tensor(cache.lengths, device=tokens.device)[:, None]  # B 1
        ids.scatter_(1, newest, tokens[:, None])
        cache.lengths = [length + 1 for length in cache.lengths]
        n = self.config.context_length
        places = newest - torch.arange(n - 1, -1, -1, device=tokens.device)  # B n
        x = self.embed_tokens(ids.gather(1, places.clamp(min=0))) * self.scale  # B n C
        x = x.masked_fill((places < 0)[:, :, None], 0.0)
        return self.compute_logits(self._transform(x.transpose(1, 2).flatten(1)))  # B V
