"""A short trial of the ways to decode: fp32 or bf16, packed weights or not, and numpy for one row.

One row reads every weight for one product, which hardware for bf16 need not make faster; several
rows share what is read. Which way wins depends on the processor, the model and the rows.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from preflight.core.schema import Schema
from preflight.decoding.stepping import Decoder, find_place
from preflight.models.base import TokenModel
from preflight.models.packing import can_pack, pack_model

NUMPY, FLOAT32, BFLOAT16 = "float32 in numpy", "float32", "bfloat16"
PACKED, PACKED_BFLOAT16 = "float32, packed", "bfloat16, packed"
BFLOAT16_WAYS = (BFLOAT16, PACKED_BFLOAT16)
TRIAL_SHARE = 0.02  # of the generation's time, at most, for the trial
# Of the time of the first way, which another must save: the text may change with the way.
LEAST_GAIN = 0.1
# A smaller model's token takes milliseconds in any way, and a few of them decide nothing.
LEAST_BYTES = 64 * 2**20
_ROUNDS, _STEPS = 3, 4  # of each way; and as many steps for a warm-up
_LONG_SECONDS = 5.0  # after which one round has to do
# Of one core and more (benchmarks/LOG.md): weights that are read for a token, and converted.
_READ_BYTES_PER_SECOND, _CONVERT_BYTES_PER_SECOND = 20e9, 2e9


class DecodingFigures(Schema):
    """Seconds of a step by way; the first way is the one that is taken unmeasured."""

    seconds: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]


def list_decoding_ways(model: TokenModel, rows: Sequence[int], *, has_bf16: bool) -> list[str]:
    """The ways that a model on the CPU may decode, the one taken unmeasured first.

    Args:
        model: as it was loaded, in fp32, or in bf16 and then in no other.
        rows: that are decoded at once; several numbers for a server, which has few or many.
        has_bf16: whether bf16 is among the ways of a model in fp32.
    """
    device, dtype = find_place(model)
    if dtype == torch.bfloat16:
        return [BFLOAT16, *([PACKED_BFLOAT16] if can_pack(dtype) else [])]
    cache = model.build_cache(min(rows), device, dtype, capacity=1)
    in_numpy = Decoder(model, cache).is_in_numpy
    narrow = PACKED_BFLOAT16 if can_pack(torch.bfloat16) else BFLOAT16
    return [
        *([NUMPY] if in_numpy else []),
        FLOAT32,
        *([PACKED] if can_pack(torch.float32) else []),
        *([narrow] if has_bf16 else []),
    ]


def choose_decoding_way(figures: DecodingFigures, ways: Sequence[str]) -> str:
    """The fastest of `ways`; the first of them, unless another saves a share of `LEAST_GAIN`."""
    best = min(ways, key=lambda way: figures.seconds[way])
    limit = (1 - LEAST_GAIN) * figures.seconds[ways[0]]
    return best if figures.seconds[best] < limit else ways[0]


def is_trial_affordable(n_bytes: int, n_ways: int, n_steps: int) -> bool:
    """Whether a trial takes at most its share of the time that so many steps of decoding take.

    Args:
        n_bytes: of the weights.
        n_ways: that would be tried.
        n_steps: of the generation to come.
    """
    step_seconds = n_bytes / _READ_BYTES_PER_SECOND
    cost = n_ways * (_ROUNDS + 1) * _STEPS * step_seconds + n_bytes / _CONVERT_BYTES_PER_SECOND
    return n_bytes >= LEAST_BYTES and cost <= TRIAL_SHARE * n_steps * step_seconds


def prepare_for(way: str, model: TokenModel) -> TokenModel:
    """The model, changed to decode that way; in place."""
    model.decodes_in_numpy = way == NUMPY
    if way in BFLOAT16_WAYS:
        model = model.to(torch.bfloat16)
    if way in (PACKED, PACKED_BFLOAT16):
        pack_model(model)
    return model


@torch.inference_mode()
def measure_decoding(
    model: TokenModel, ways: Sequence[str], rows: Sequence[int]
) -> DecodingFigures:
    """Seconds of a step in each way, from steps that take turns. The model stays as it is.

    For several numbers of rows it is one step of each.

    Copies of the weights are needed besides, see `count_copies`.
    """
    decoders = [_build_decoders(way, model, rows) for way in ways]
    rounds: list[list[float]] = []
    for _ in range(1 + _ROUNDS):  # the first warms up
        rounds.append([sum(map(_time_steps, each)) for each in decoders])
        if len(rounds) > 1 and _STEPS * sum(map(sum, rounds)) > _LONG_SECONDS:
            break
    medians = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
    return DecodingFigures(seconds=dict(zip(ways, medians, strict=True)))


def count_copies(ways: Sequence[str]) -> float:
    """The memory that a trial of these ways needs, in sizes of the model in fp32."""
    return sum({PACKED: 2.0, BFLOAT16: 1.0, PACKED_BFLOAT16: 1.5}.get(way, 0.0) for way in ways)


def _build_decoders(way: str, model: TokenModel, rows: Sequence[int]) -> list[Decoder]:
    if way in (NUMPY, FLOAT32):
        model = copy.copy(model)  # a flag of its own, the same weights
    else:
        model = copy.deepcopy(model)
    model = prepare_for(way, model)
    device, dtype = find_place(model)
    caches = [model.build_cache(n, device, dtype, capacity=_STEPS) for n in rows]
    return [Decoder(model, cache) for cache in caches]


def _time_steps(decoder: Decoder) -> float:
    """Seconds of a step, from some in a row."""
    cache = decoder.cache
    cache.lengths = [0] * len(cache.lengths)
    tokens = torch.zeros(len(cache.lengths), dtype=torch.long, device=cache.layers[0].device)
    with decoder.threads():
        began = time.perf_counter()
        for _ in range(_STEPS):
            decoder.decode(tokens)
        return (time.perf_counter() - began) / _STEPS
