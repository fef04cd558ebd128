"""The cache of keys and values, and how each kind of generation step uses it.

Shapes: B sequences, T tokens in each, K heads of keys and values, D size of a head, S capacity of
the cache.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from preflight.settings import ModelConfig


class KVCache:
    """Keys and values of the tokens so far, allocated once, with a row for each sequence.

    `lengths` counts the tokens of each row. It is kept on the host, so that a step never waits
    for the device. `token_dim` is the dimension of a layer's tensor that counts tokens.

    Args:
        config: the model's architecture.
        batch_size: rows.
        device: where the model is.
        dtype: the model's.
        capacity: tokens that a row can hold, at most the context length (the default).
    """

    token_dim = 3

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        self.capacity = min(capacity or config.context_length, config.context_length)
        shape = (2, batch_size, config.kv_heads, self.capacity, config.head_dim)
        # Zeros, not uninitialised memory: a masked value is multiplied by zero, and 0 * NaN is NaN.
        self.layers = [  # 2 B K S D each: keys and values in one tensor
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)
        ]
        self.lengths = [0] * batch_size

    def check_capacity(self, n_tokens: int) -> None:
        """Raise `ValueError` where a row cannot hold so many."""
        if n_tokens > self.capacity:
            raise ValueError(f"{n_tokens} tokens are more than the cache's {self.capacity}")

    def grow(self, capacity: int) -> None:
        """Let a row hold so many tokens; what the rows hold stays. It takes layer after layer, so
        that no second cache is needed.
        """
        more = capacity - self.capacity
        for i, keys_values in enumerate(self.layers):
            shape = list(keys_values.shape)
            shape[self.token_dim] = more
            self.layers[i] = torch.cat((keys_values, keys_values.new_zeros(shape)), self.token_dim)
        self.capacity = capacity

    def view_rows(self, n_rows: int) -> KVCache:
        """The first rows alone, in the same memory; its `lengths` are a copy."""
        view = copy.copy(self)
        view.layers = [keys_values[:, :n_rows] for keys_values in self.layers]
        view.lengths = self.lengths[:n_rows]
        return view

    def keep_rows(self, rows: list[int]) -> None:
        """Drop every row but these, which move up in the order given; a row may repeat."""
        self.layers = [keys_values[:, rows] for keys_values in self.layers]
        self.lengths = [self.lengths[row] for row in rows]

    def copy_rows(self, sources: list[int]) -> None:
        """Make row i what row ``sources[i]`` is. Only tokens that are there are copied, in place,
        so that no second cache is needed.
        """
        changed = [row for row, source in enumerate(sources) if source != row]
        if not changed:
            return
        used = max(self.lengths[sources[row]] for row in changed)
        device = self.layers[0].device
        to = torch.tensor(changed, device=device)
        origin = torch.tensor([sources[row] for row in changed], device=device)
        for keys_values in self.layers if used else ():
            tokens = keys_values.narrow(self.token_dim, 0, used)
            tokens[:, to] = tokens[:, origin]
        self.lengths = [self.lengths[source] for source in sources]


class CacheStep(Protocol):
    """What attention needs to know of a step that uses the cache."""

    mask: Tensor | None
    is_causal: bool

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B K T D); return all that the new tokens attend to."""
        ...


class PrefillStep:
    """Whole prompts enter rows that start anew: causal attention among the new tokens."""

    mask = None
    is_causal = True

    def __init__(self, cache: KVCache, rows: list[int], n_tokens: int) -> None:
        self.layers = cache.layers
        self.n_tokens = n_tokens
        all_rows = list(range(len(cache.lengths)))
        self.rows: slice | list[int] = slice(None) if rows == all_rows else rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B K T D); return them."""
        for index, new in enumerate((k, v)):
            self.layers[layer][index, self.rows, :, : self.n_tokens] = new
        return k, v


class ExtendStep:
    """More tokens for rows that hold some already; each attends to all before it in its row.

    Args:
        cache: not changed yet.
        rows: of the cache, which get tokens.
        lengths: new tokens in each; the longest has `n_tokens`, the others are padded on the right.
        n_tokens: T.
        device: where the model is.
    """

    is_causal = False

    def __init__(
        self,
        cache: KVCache,
        rows: list[int],
        lengths: list[int],
        n_tokens: int,
        device: torch.device,
    ) -> None:
        self.layers = cache.layers
        starts = [cache.lengths[row] for row in rows]
        self.used = max(start + length for start, length in zip(starts, lengths, strict=True))
        begins = torch.tensor(starts)[:, None]  # B 1; on the host, which need not wait then
        ends = begins + torch.tensor(lengths)[:, None]
        positions = begins + torch.arange(n_tokens)  # B T
        batch, column = (positions < ends).nonzero(as_tuple=True)
        self.new = batch.to(device), column.to(device)
        self.places = (
            torch.tensor(rows)[batch].to(device),
            positions[batch, column].to(device),
        )
        # Padding is not written; it has the position of a token, so that it attends to something.
        self.positions = positions.minimum(ends - 1).clamp(min=0).to(device)
        is_range = rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if is_range else rows
        slots = torch.arange(self.used, device=device)
        self.mask = (slots <= self.positions[:, :, None])[:, None]  # B 1 T used

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B K T D); return all of the rows (B K used D)."""
        cached = self.layers[layer]
        rows, positions = self.places
        for index, new in enumerate((k, v)):
            # Two index tensors around a slice put what they index first: new tokens, K, D.
            cached[index][rows, :, positions] = new[self.new[0], :, self.new[1]]
        return cached[0, self.rows, :, : self.used], cached[1, self.rows, :, : self.used]


class DecodeStep:
    """One more token in every row; it attends to all of its row."""

    is_causal = False

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self.layers = cache.layers
        self.used = max(cache.lengths) + 1  # tokens after this step, in the longest row
        self.mask: Tensor | None = None
        if min(cache.lengths) == self.used - 1:  # rows of one length need no mask
            self.positions = torch.full((len(cache.lengths),), self.used - 1, device=device)
            return
        self.positions = torch.tensor(cache.lengths, device=device)  # B
        self.rows = torch.arange(len(cache.lengths), device=device)  # B
        slots = torch.arange(self.used, device=device)
        self.mask = (slots <= self.positions[:, None])[:, None, None]  # B 1 1 used

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B K 1 D); return all of them (B K used D)."""
        cached = self.layers[layer]
        for index, new in enumerate((k, v)):
            if self.mask is None:
                cached[index, :, :, self.used - 1 : self.used] = new
            else:
                # Two index tensors around a slice put what they index first: B K D.
                cached[index][self.rows, :, self.positions] = new[:, :, 0]
        return cached[0, :, :, : self.used], cached[1, :, :, : self.used]
