"""In which precision a loaded model decodes, and whether in numpy: measured, or remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from preflight.core.log import log
from preflight.decoding.stepping import find_place
from preflight.decoding.trial import (
    BFLOAT16_WAYS,
    DecodingFigures,
    choose_decoding_way,
    count_copies,
    is_trial_affordable,
    list_decoding_ways,
    measure_decoding,
    prepare_for,
)
from preflight.device.host_memory import available_host_bytes
from preflight.device.remembered import describe_hardware, recall, remember
from preflight.device.runtime import has_fast_bf16
from preflight.models.base import TokenModel
from preflight.models.packing import can_pack

_SERVED_ROWS = 8  # at once, beside one, for which a server chooses how to decode
_SERVED_STEPS = 10**6  # a server decodes for long enough to measure how


def choose_decoding(
    model: TokenModel, mixed_precision: bool | None, rows: Sequence[int], n_steps: int
) -> TokenModel:
    """The model, made to decode in its fastest way, told in one line where that was measured.

    Args:
        model: loaded, on its device. On a CPU there is something to choose.
        mixed_precision: the flag; unset: bf16 where it is faster. A model in bf16 stays so.
        rows: that are decoded at once; several numbers for a server, which has few or many.
        n_steps: of decoding to come, which decide whether a trial pays.
    """
    device, dtype = find_place(model)
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return model
    has_bf16 = mixed_precision is None and has_fast_bf16(device)
    ways = list_decoding_ways(model, rows, has_bf16=has_bf16)
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    if len(ways) == 1:
        return model
    key = {
        "of": "decoding step",
        "machine": describe_hardware(device),
        "model": dataclasses.asdict(model.config),
        "rows": list(rows),
        "dtype": str(dtype),
    }
    how, figures = "remembered", recall(key, DecodingFigures)
    if figures is None or not set(ways) <= set(figures.seconds):
        fits = count_copies(ways) * n_bytes < available_host_bytes()
        if not fits or not is_trial_affordable(n_bytes, len(ways) * len(rows), n_steps):
            return model
        how, figures = "measured", measure_decoding(model, ways, rows)
        remember(key, figures)
    way = choose_decoding_way(figures, ways)
    rates = {each: f"{sum(rows) / figures.seconds[each]:,.1f}" for each in ways}
    others = "; ".join(f"{other} {rates[other]}" for other in ways if other != way)
    at_once = " and ".join(map(str, rows))
    log.info(f"decoding in {way}: {rates[way]} tokens/s; {others} ({how}, rows at once: {at_once})")
    if way in BFLOAT16_WAYS and mixed_precision is None:
        log.info("in bf16 a text depends on the rows beside it: --no-mixed-precision if not")
    return prepare_for(way, model)


def choose_serving(model: TokenModel, n_rows: int) -> TokenModel:
    """As `choose_decoding`, in the model's precision, for a server of so many rows.

    In fp32 an answer does not depend on those beside it.
    """
    rows = sorted({1, min(n_rows, _SERVED_ROWS)})
    return choose_decoding(model, False, rows, _SERVED_STEPS)


def packs_when_served(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `choose_serving` may pack weights."""
    return device.type == "cpu" and can_pack(dtype)
