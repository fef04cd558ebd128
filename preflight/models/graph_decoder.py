"""Decoding on CUDA by graphs: the kernels of a step are recorded once and launched together.

A step of a small model is hundreds of kernels of some microseconds, which Python launches more
slowly than the card runs them. Shapes as in kv_cache.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from preflight.models.kv_cache import KVCache

# Steps that go through `decode` before the first recording, which takes as long as some of them.
EAGER_STEPS = 4
# A graph attends to this many slots of the cache at least, and each next one to twice as many.
FIRST_SLOTS = 128


class GraphStep:
    """One more token in every row, at positions that are kept on the device.

    Attributes:
        positions: of the new tokens (B).
    """

    is_causal = False

    def __init__(self, cache: KVCache, positions: Tensor, n_slots: int) -> None:
        self.layers, self.positions, self.n_slots = cache.layers, positions, n_slots
        self.rows = torch.arange(len(positions), device=positions.device)  # B
        slots = torch.arange(n_slots, device=positions.device)
        self.mask = (slots <= positions[:, None])[:, None, None]  # B 1 1 n_slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B K 1 D); return those of all slots (B K n_slots D)."""
        cached = self.layers[layer]
        for index, new in enumerate((k, v)):
            cached[index][self.rows, :, self.positions] = new[:, :, 0]
        return cached[0, :, :, : self.n_slots], cached[1, :, :, : self.n_slots]


class _Model(Protocol):
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor: ...

    def decode_step(self, tokens: Tensor, step: GraphStep) -> Tensor: ...


class GraphDecoder:
    """Decodes into the rows of `cache` as `model.decode` does.

    Args:
        model: on CUDA, in the dtype of the cache, and not trained meanwhile.
        cache: its tensors must stay the same ones; rows may start anew in place.
    """

    def __init__(self, model: _Model, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        device = cache.layers[0].device
        self._tokens = torch.zeros(len(cache.lengths), dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._lengths: list[int] | None = None  # what `_positions` holds
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by slots
        self._n_eager = 0

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to every row; logits (B V), valid until the next call.

        Raises:
            ValueError: a row is full.
        """
        if self._n_eager < EAGER_STEPS:
            self._n_eager += 1
            return self._model.decode(tokens, self._cache)
        lengths = self._cache.lengths
        self._cache.check_capacity(max(lengths) + 1)
        self._tokens.copy_(tokens)
        if lengths != self._lengths:
            self._positions.copy_(torch.tensor(lengths))
        n_slots = FIRST_SLOTS
        while n_slots < max(lengths) + 1:
            n_slots *= 2
        graph, logits = self._find_graph(min(n_slots, self._cache.capacity))
        graph.replay()
        self._cache.lengths = [length + 1 for length in lengths]
        self._lengths = list(self._cache.lengths)
        return logits

    def _find_graph(self, n_slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step over that many slots, and where it leaves its logits."""
        if n_slots not in self._graphs:
            stream = torch.cuda.Stream(self._tokens.device)
            stream.wait_stream(torch.cuda.current_stream(self._tokens.device))
            with torch.cuda.stream(stream):  # libraries set themselves up outside of a recording
                self._run(n_slots)
            torch.cuda.current_stream(self._tokens.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._run(n_slots)
                self._positions += 1
            self._graphs[n_slots] = graph, logits
        return self._graphs[n_slots]

    def _run(self, n_slots: int) -> Tensor:
        step = GraphStep(self._cache, self._positions, n_slots)
        return self._model.decode_step(self._tokens, step)
