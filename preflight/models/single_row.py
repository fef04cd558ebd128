"""One sequence on the CPU: `DecoderOnlyTransformer.decode` for a single row in fp32, in numpy.

A token costs the product of every weight with one vector, which the memory's bandwidth limits.
numpy's BLAS comes near that limit, up to twice as fast as torch's on AMD; small operations on one
vector take numpy a third of torch's time (benchmarks/LOG.md). BLAS's buffers take 150 MB, which
the memory estimate of a training run does not count: while weights are trained, torch decodes.
Int8 weights are multiplied by torch, on the same memory.

Shapes as in transformer_model, without B and T: C hidden size, H heads, D size of a head,
V vocabulary, S capacity of the cache, N tokens in the cache with the new one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from preflight.models.int8_kernels import LARGEST, build_hadamard
from preflight.models.kv_cache import KVCache
from preflight.models.quantization import Int8Embedding, Int8Linear, Int8Matrix
from preflight.settings import ModelConfig
from preflight.settings.kinds import ACTIVATIONS

Array = NDArray[np.float32]
Modules = Mapping[str, nn.Module]


class SingleRowDecoder:
    """Decodes into the one row of `cache` as the model does; holds no copy of its weights.

    Args:
        config: the architecture.
        modules: the model's, by name; in fp32 on the CPU, or with int8 matrices.
        eps: of the layer norms.
        cache: of one row, in fp32 on the CPU.
    """

    def __init__(self, config: ModelConfig, modules: Modules, eps: float, cache: KVCache) -> None:
        self._cache = cache
        self._keys_values = [layer.numpy()[:, 0] for layer in cache.layers]  # 2 H S D
        table = modules["embed_tokens"]
        self.multiplies_in_numpy = not isinstance(table, Int8Embedding)
        self._look_up = _load_table(table)
        self._multiply_head = _load_product(table)
        self._embed_positions = _load_table(modules["embed_positions"])
        self._layers = [_Layer(config, modules, f"layers.{i}", eps) for i in range(config.n_layers)]
        self._norm = _LayerNorm(modules["norm"], eps)

    def decode(self, token: Tensor) -> Tensor:
        """Append one token (1,) to the row; logits (1 V) of what follows it.

        Raises:
            ValueError: the row is full.
        """
        [n_earlier] = self._cache.lengths
        self._cache.check_capacity(n_earlier + 1)
        x = self._look_up(int(token)) + self._embed_positions(n_earlier)  # C
        for layer, keys_values in zip(self._layers, self._keys_values, strict=True):
            layer.add_to(x, keys_values, n_earlier)
        self._cache.lengths = [n_earlier + 1]
        return torch.from_numpy(self._multiply_head(self._norm(x)))[None]  # 1 V


class _LayerNorm:
    """`nn.LayerNorm` of one vector."""

    def __init__(self, norm: nn.Module, eps: float) -> None:
        self.weight, self.bias, self.eps = _read(norm.weight), _read(norm.bias), eps
        self.shares = np.full_like(self.bias, 1 / len(self.bias))

    def __call__(self, x: Array) -> Array:
        centred = x - x.dot(self.shares)  # the mean in one call
        centred *= 1 / math.sqrt(centred.dot(centred) / len(x) + self.eps)
        centred *= self.weight
        centred += self.bias
        return centred


class _Linear:
    """`nn.Linear` of one vector."""

    def __init__(self, linear: nn.Module) -> None:
        self.multiply, self.bias = _load_product(linear), _read(linear.bias)

    def __call__(self, x: Array) -> Array:
        product = self.multiply(x)
        product += self.bias
        return product


class _Int8Product:
    """`Int8Matrix.multiply` of one vector, in integers."""

    def __init__(self, matrix: Int8Matrix) -> None:
        self.columns, self.scale = matrix.values.T, matrix.scale.numpy()
        self.hadamard = build_hadamard(matrix.block).numpy()

    def __call__(self, x: Array) -> Array:
        rotated = x.reshape(-1, len(self.hadamard)) @ self.hadamard
        step = max(float(np.abs(rotated).max()) / LARGEST, 1e-30)
        rotated *= 1 / step
        rounded = np.rint(rotated, out=rotated).astype(np.int8).reshape(1, -1)
        sums = torch._int_mm(torch.from_numpy(rounded), self.columns).numpy()[0]
        product = sums.astype(np.float32)
        product *= self.scale
        product *= step
        return product


class _Layer:
    """`Block` of one vector."""

    def __init__(self, config: ModelConfig, modules: Modules, name: str, eps: float) -> None:
        self.n_heads = config.n_heads
        self.input_layernorm = _LayerNorm(modules[f"{name}.input_layernorm"], eps)
        self.qkv_proj = _Linear(modules[f"{name}.self_attn.qkv_proj"])
        self.o_proj = _Linear(modules[f"{name}.self_attn.o_proj"])
        norm = modules[f"{name}.post_attention_layernorm"]
        self.post_attention_layernorm = _LayerNorm(norm, eps)
        self.up_proj = _Linear(modules[f"{name}.mlp.up_proj"])
        self.activation = _load_activation(config.activation)
        self.down_proj = _Linear(modules[f"{name}.mlp.down_proj"])

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


def _read(weight: Tensor | nn.Module) -> Array:
    array: Array = cast(Tensor, weight).numpy()
    return array


def _load_product(module: nn.Module) -> Callable[[Array], Array]:
    """The product of a vector (K) with the module's matrix (N K)."""
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return _Int8Product(module.matrix)
    columns = _read(module.weight).T
    return lambda x: x @ columns


def _load_table(module: nn.Module) -> Callable[[int], Array]:
    """A row of the module's table."""
    if isinstance(module, Int8Embedding):
        matrix = module.matrix
        return lambda i: _read(matrix.read_rows(torch.tensor(i), torch.float32))
    rows = _read(module.weight)
    return lambda i: rows[i]


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
