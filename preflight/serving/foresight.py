"""What serving a model needs and gives: memory by formulas, speed by a short measurement."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from preflight.models.cost import count_parameters
from preflight.serving.batch import RowBatch
from preflight.serving.pieces import MAX_TOKENS
from preflight.serving.protocol import Job, TokenEvent
from preflight.settings import ModelConfig, SamplingConfig

_PROMPT_TOKENS, _N_GENERATED = 64, 8  # of a measurement


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that a served model may need.

    Attributes:
        weights: of the model.
        cache_row: of a row's keys and values at the whole context.
        working: activations of a piece, and the logits of all rows.
        rows: answers at once.
    """

    weights: int
    cache_row: int
    working: int
    rows: int

    @property
    def cache(self) -> int:
        """Of all rows at the whole context."""
        return self.rows * self.cache_row

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working

    def describe(self) -> dict[str, int]:
        """For ``/health`` and the report."""
        return {"weights": self.weights, "cache": self.cache, "total": self.total}


def estimate_memory(
    config: ModelConfig, dtype: torch.dtype, rows: int, *, packs: bool = False
) -> ServingMemory:
    """By closed formulas: nothing is built.

    Args:
        config: the architecture.
        dtype: of weights and cache.
        rows: answers at once.
        packs: whether weights may be packed, which takes a tied table of tokens twice.
    """
    size = dtype.itemsize
    if config.model_family == "mlp":  # its cache holds ids
        cache_row = config.context_length * torch.long.itemsize
    else:
        per_token = 2 * config.n_layers * config.kv_heads * config.head_dim * size
        cache_row = config.context_length * per_token
    piece = min(MAX_TOKENS, config.context_length)
    activations = piece * (8 * config.n_embeddings + 3 * config.ffn_hid_dim) * size
    logits = 4 * rows * config.vocab_size * torch.float32.itemsize
    weights = count_parameters(config) * size
    if packs and config.tied:
        weights += config.vocab_size * config.n_embeddings * size
    return ServingMemory(weights, cache_row, activations + logits, rows)


def fit_rows(
    config: ModelConfig, dtype: torch.dtype, wanted: int, free: int, *, packs: bool = False
) -> int:
    """Rows that fit into so many free bytes, at most `wanted`; 0: not even one does."""
    for n_rows in range(wanted, 0, -1):
        if estimate_memory(config, dtype, n_rows, packs=packs).total <= free:
            return n_rows
    return 0


@dataclass(frozen=True)
class Speed:
    """What so many people get who ask at the same time.

    Attributes:
        rows: people.
        first_token_seconds: until the last of them sees a token, after a prompt of `n_prompt`.
        tokens_per_second: of all of them together, while they read.
        n_prompt: tokens.
    """

    rows: int
    first_token_seconds: float
    tokens_per_second: float
    n_prompt: int

    def describe(self) -> Mapping[str, Any]:
        """For ``/health`` and the report."""
        return {
            "people": self.rows,
            "first_token_seconds": round(self.first_token_seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "prompt_tokens": self.n_prompt,
        }


def measure_speed(batch: RowBatch, config: ModelConfig, rows: int) -> Speed:
    """Let `rows` answers run for some tokens; the batch must be empty, and is so afterwards."""
    n_prompt = max(1, min(_PROMPT_TOKENS, config.context_length // 2))
    rng = random.Random()  # no prompt begins as an earlier one
    sampling = SamplingConfig(max_new_tokens=_N_GENERATED, temperature=1.0)
    began = time.perf_counter()
    for index in range(rows):
        ids = [rng.randrange(config.vocab_size) for _ in range(n_prompt)]
        batch.join(Job(ids, sampling, index=index), index)
    begun: set[int] = set()
    n_tokens, first = 0, began
    while batch.tasks:
        events = batch.step()
        tokens = [task.owner for task, event in events if isinstance(event, TokenEvent)]
        if len(begun) == rows:
            n_tokens += len(tokens)
        elif len(begun.union(tokens)) == rows:
            first = time.perf_counter()
        begun.update(tokens)
    seconds = max(time.perf_counter() - first, 1e-9)
    return Speed(rows, first - began, n_tokens / seconds, n_prompt)
