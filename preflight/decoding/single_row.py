"""One text on the CPU: `DecoderOnlyTransformer.decode` for a single row in fp32, in numpy.

A token costs each weight's product with one vector, for which the memory's rate is the floor.
numpy's BLAS comes near it, twice as fast as torch's on AMD, and what is left, small operations on
one vector, takes numpy a third of torch's time (benchmarks/LOG.md). BLAS's buffers take 150 MB,
of which a training run is not told: there torch reads.

Shapes as in transformer_model, without B and T: C width, H heads, D width of a head, V vocabulary,
N tokens in the cache with the new one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from preflight.models.kv_cache import KVCache
from preflight.settings.kinds import ACTIVATIONS
from transformer_model import Block, DecoderOnlyTransformer

Array = NDArray[np.float32]


def choose_reader(
    model: DecoderOnlyTransformer, cache: KVCache
) -> DecoderOnlyTransformer | SingleRowReader:
    """What reads a token into `cache` fastest: `model`, or numpy for it where there is one row in
    fp32 on the CPU and the weights are not being trained.
    """
    weight = model.embed_tokens.weight
    fits = (
        len(cache.lengths) == 1
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and weight.dtype == cache.layers[0].dtype == torch.float32
    )
    return SingleRowReader(model, cache) if fits else model


class SingleRowReader:
    """Reads tokens into `cache` as `model` does; holds no copy of its weights."""

    def __init__(self, model: DecoderOnlyTransformer, cache: KVCache) -> None:
        self._cache = cache
        self._keys_values = [layer.numpy()[:, 0] for layer in cache.layers]  # 2 H S D
        self._embedding = model.embed_tokens.weight.numpy()  # V C
        self._positions = model.embed_positions.weight.numpy()
        activate = _choose_activation(model.config.activation)
        self._blocks = [_SingleRowBlock(cast(Block, block), activate) for block in model.layers]
        self._final_norm = _Norm(model.norm)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As `DecoderOnlyTransformer.decode`: an id (1,) to logits (1 V).

        Raises:
            ValueError: the row is full, or `cache` is not the reader's.
        """
        if cache is not self._cache:
            raise ValueError("the reader was made for another cache")
        [n_earlier] = cache.lengths
        cache.check_capacity(n_earlier + 1)
        x = self._embedding[int(tokens)] + self._positions[n_earlier]  # C
        for block, keys_values in zip(self._blocks, self._keys_values, strict=True):
            block.add_to(x, keys_values, n_earlier)
        cache.lengths = [n_earlier + 1]
        return torch.from_numpy(self._final_norm(x) @ self._embedding.T)[None]


class _Norm:
    """`nn.LayerNorm` of one vector."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias = norm.weight.numpy(), norm.bias.numpy()
        self.eps = norm.eps
        self.shares = np.full_like(self.bias, 1 / len(self.bias))

    def __call__(self, x: Array) -> Array:
        centred = x - x.dot(self.shares)  # the mean in one call
        centred *= 1 / math.sqrt(centred.dot(centred) / len(x) + self.eps)
        centred *= self.weight
        centred += self.bias
        return centred


class _Map:
    """`nn.Linear` of one vector."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight, self.bias = linear.weight.numpy().T, linear.bias.numpy()

    def __call__(self, x: Array) -> Array:
        product: Array = x @ self.weight
        product += self.bias
        return product


class _SingleRowBlock:
    """`Block` of one vector."""

    def __init__(self, block: Block, activate: Callable[[Array], Array]) -> None:
        self.n_heads = block.self_attn.n_heads
        self.input_layernorm = _Norm(block.input_layernorm)
        self.qkv_proj = _Map(block.self_attn.qkv_proj)
        self.o_proj = _Map(block.self_attn.o_proj)
        self.post_attention_layernorm = _Norm(block.post_attention_layernorm)
        self.up_proj = _Map(block.mlp.up_proj)
        self.activate = activate
        self.down_proj = _Map(block.mlp.down_proj)

    def add_to(self, x: Array, keys_values: Array, n_earlier: int) -> None:
        """Add to `x` (C) what the block makes of it, and key and value to the cache (2 H S D)."""
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
        x += self.down_proj(self.activate(self.up_proj(self.post_attention_layernorm(x))))


def _choose_activation(name: str) -> Callable[[Array], Array]:
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
    """Keep torch to one thread: its idle threads wait busily, on the cores that numpy's need, which
    makes a token five times slower.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
