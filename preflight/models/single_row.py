"""One sequence on the CPU: `DecoderOnlyTransformer.decode` for a single row in fp32, in numpy.

A token costs the product of every weight with one vector, which the memory's bandwidth limits.
numpy's BLAS comes near that limit, up to twice as fast as torch's on AMD; small operations on one
vector take numpy a third of torch's time (benchmarks/LOG.md). BLAS's buffers take 150 MB, which
the memory estimate of a training run does not count: while weights are trained, torch decodes.

Shapes as in transformer_model, without B and T: C hidden size, H heads, D size of a head,
V vocabulary, S capacity of the cache, N tokens in the cache with the new one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preflight.models.kv_cache import KVCache
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS

Array = NDArray[np.float32]
Weights = Mapping[str, Array]


class SingleRowDecoder:
    """Decodes into the one row of `cache` as the model does; holds no copy of its weights.

    Args:
        config: the architecture.
        weights: fp32 on the CPU, by the model's names.
        eps: of the layer norms.
        cache: of one row, in fp32 on the CPU.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], eps: float, cache: KVCache
    ) -> None:
        arrays = {name: weight.numpy() for name, weight in weights.items()}
        self._cache = cache
        self._keys_values = [layer.numpy()[:, 0] for layer in cache.layers]  # 2 H S D
        self._embed_tokens = arrays["embed_tokens.weight"]  # V C
        self._embed_positions = arrays["embed_positions.weight"]  # S C
        self._layers = [_Layer(config, arrays, f"layers.{i}", eps) for i in range(config.n_layers)]
        self._norm = _LayerNorm(arrays, "norm", eps)

    def decode(self, token: Tensor) -> Tensor:
        """Append one token (1,) to the row; logits (1 V) of what follows it.

        Raises:
            ValueError: the row is full.
        """
        [n_earlier] = self._cache.lengths
        self._cache.check_capacity(n_earlier + 1)
        x = self._embed_tokens[int(token)] + self._embed_positions[n_earlier]  # C
        for layer, keys_values in zip(self._layers, self._keys_values, strict=True):
            layer.add_to(x, keys_values, n_earlier)
        self._cache.lengths = [n_earlier + 1]
        return torch.from_numpy(self._norm(x) @ self._embed_tokens.T)[None]  # 1 V


class _LayerNorm:
    """`nn.LayerNorm` of one vector."""

    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        self.weight, self.bias, self.eps = weights[f"{name}.weight"], weights[f"{name}.bias"], eps
        self.shares = np.full_like(self.bias, 1 / len(self.bias))

    def __call__(self, x: Array) -> Array:
        centred = x - x.dot(self.shares)  # the mean in one call
        centred *= 1 / math.sqrt(centred.dot(centred) / len(x) + self.eps)
        centred *= self.weight
        centred += self.bias
        return centred


class _Linear:
    """`nn.Linear` of one vector."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.weight, self.bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]

    def __call__(self, x: Array) -> Array:
        product: Array = x @ self.weight
        product += self.bias
        return product


class _Layer:
    """`Block` of one vector."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str, eps: float) -> None:
        self.n_heads = config.n_heads
        self.input_layernorm = _LayerNorm(weights, f"{name}.input_layernorm", eps)
        self.qkv_proj = _Linear(weights, f"{name}.self_attn.qkv_proj")
        self.o_proj = _Linear(weights, f"{name}.self_attn.o_proj")
        norm = f"{name}.post_attention_layernorm"
        self.post_attention_layernorm = _LayerNorm(weights, norm, eps)
        self.up_proj = _Linear(weights, f"{name}.mlp.up_proj")
        self.activation = _load_activation(config.activation)
        self.down_proj = _Linear(weights, f"{name}.mlp.down_proj")

    def add_to(self, x: Array, keys_values: Array, n_earlier: int) -> None:
        """Add the block's result to `x` (C), and key and value to the cache (2 H S D)."""
        heads = self.qkv_proj(self.input_layernorm(x)).reshape(3, self.n_heads, -1)  # 3 H D
        keys_values[:, :, n_earlier] = heads[1:]
        keys, values = keys_values[:, :, : n_earlier + 1]  # H N D
        query = heads[0] * heads.shape[2] ** -0.5
        weights: Array = keys @ query[:, :, None]  # H N 1
        weights -= np.maximum.reduce(weights, axis=1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= np.add.reduce(weights, axis=1, keepdims=True)
        mixed = weights.transpose(0, 2, 1) @ values  # H 1 D
        x += self.o_proj(mixed.reshape(-1))
        x += self.down_proj(self.activation(self.up_proj(self.post_attention_layernorm(x))))


def _load_activation(name: str) -> Callable[[Array], Array]:
    if name == "gelu_tanh":  # the default: torch takes twice as long for one vector
        return _gelu_tanh
    in_torch = ACTIVATIONS.load(name)
    return lambda x: in_torch(torch.from_numpy(x)).numpy()


def _gelu_tanh(x: Array) -> Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): Hendrycks and Gimpel 2016
    (arXiv:1606.08415), section 2.
    """
    scale = math.sqrt(2 / math.pi)
    result = x * x
    result *= 0.044715 * scale
    result += scale
    result *= x
    np.tanh(result, out=result)
    result += 1
    result *= x
    result *= 0.5
    return result


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread. Its idle threads wait busily on the cores that numpy's threads
    need, which makes a token five times slower.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
