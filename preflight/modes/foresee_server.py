"""`--serve RUN --check`: what serving needs and gives, before anybody asks for it."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from typing import Any

import torch

from generate import load_model
from preflight.core.errors import ExitCode
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.device.runtime import (
    Runtime,
    build_exact_runtime,
    describe_device,
    has_fast_bf16,
    is_out_of_memory,
)
from preflight.device.token_store import measure_model_room
from preflight.modes.decoding_way import choose_serving, packs_when_served
from preflight.serving.batch import RowBatch
from preflight.serving.foresight import ServingMemory, Speed, estimate_memory, measure_speed
from preflight.serving.store import Entry, find_entries
from preflight.settings import RunConfig

_PEOPLE = (1, 8)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model in a precision.

    Attributes:
        name: of the model.
        dtype: of its weights and its cache.
        memory: it may need.
        fits: into what is free.
        speeds: measured here, for each number of people; none where it does not fit.
    """

    name: str
    dtype: str
    memory: ServingMemory
    fits: bool
    speeds: tuple[Speed, ...]

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.name,
            "precision": self.dtype,
            "rows": self.memory.rows,
            "memory_bytes": self.memory.describe(),
            "fits": self.fits,
            "speed": [speed.describe() for speed in self.speeds],
        }


def foresee_server(config: RunConfig) -> int:
    """Print the predictions, as text or JSON.

    Returns:
        0, or 1 where a model does not fit.

    Raises:
        PreflightError: code CHECKPOINT or FLAGS.
    """
    runtime = build_exact_runtime(config.system)
    free = measure_model_room(runtime.device)
    found = [
        prediction
        for entry in find_entries(config.serving.serve)
        for prediction in _foresee(entry, runtime, config, free)
    ]
    if config.check.json:
        told = {"free_bytes": free, "models": [each.describe() for each in found]}
        sys.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write("\n".join(_format(found, runtime, free)) + "\n")
    own = str(runtime.dtype).removeprefix("torch.")
    all_fit = all(each.fits for each in found if each.dtype == own)
    return int(ExitCode.DONE if all_fit else ExitCode.CHECK_FAILED)


def _foresee(entry: Entry, runtime: Runtime, config: RunConfig, free: int) -> list[Prediction]:
    """In the precision to be used; in bf16 too where the hardware has it and none is set."""
    dtypes = [runtime.dtype]
    if config.system.mixed_precision is None and has_fast_bf16(runtime.device):
        dtypes.append(torch.bfloat16)
    found = []
    for dtype in dtypes:
        memory = estimate_memory(
            entry.checkpoint.model_config,
            dtype,
            config.serving.serve_rows,
            packs=packs_when_served(runtime.device, dtype),
        )
        fits = memory.total <= free
        log.info(f"{entry.name}: measuring in {str(dtype).removeprefix('torch.')}")
        speeds = _measure(entry, runtime.device, dtype, memory.rows) if fits else ()
        name = str(dtype).removeprefix("torch.")
        found.append(Prediction(entry.name, name, memory, fits, speeds))
    return found


def _measure(
    entry: Entry, device: torch.device, dtype: torch.dtype, rows: int
) -> tuple[Speed, ...]:
    """The speed for each number of people that the rows allow; nothing where memory lacks."""
    try:
        model, tokenizer = load_model(entry.checkpoint, device, dtype)
        model = choose_serving(model, rows)
        people = sorted({min(n, rows) for n in _PEOPLE})
        batch = RowBatch(model, tokenizer, max(people))
        measure_speed(batch, model.config, 1)  # the first steps of a process take longer
        return tuple(measure_speed(batch, model.config, n) for n in people)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        log.warning(f"{entry.name}: out of memory during the measurement")
        return ()
    finally:
        gc.collect()


def _format(found: list[Prediction], runtime: Runtime, free: int) -> list[str]:
    lines = [f"device: {describe_device(runtime.device)}, {format_bytes(free)} free"]
    for each in found:
        memory = each.memory
        lines += [
            "",
            f"{each.name} in {each.dtype}: {'fits' if each.fits else 'does not fit'}",
            f"  memory   {format_bytes(memory.total)} at most: weights "
            f"{format_bytes(memory.weights)}, {memory.rows} rows of "
            f"{format_bytes(memory.cache_row)}, work {format_bytes(memory.working)}",
        ]
        for speed in each.speeds:
            people = "1 person" if speed.rows == 1 else f"{speed.rows} people"
            lines.append(
                f"  {people:<9}first token after {speed.first_token_seconds:.2f} s "
                f"({speed.n_prompt} tokens of prompt), {speed.tokens_per_second:,.1f} tokens/s"
            )
    return [*lines, "", *_advise(found)]


def _advise(found: list[Prediction]) -> list[str]:
    """What to change, where a figure says so."""
    advice = []
    for name in dict.fromkeys(each.name for each in found):
        own, *others = [each for each in found if each.name == name]
        for other in others:
            if own.speeds and other.speeds:
                gain = other.speeds[-1].tokens_per_second / own.speeds[-1].tokens_per_second
                if gain > 1.1:
                    advice.append(
                        f"{name}: --mixed-precision is {gain:.1f} times as fast; an answer may "
                        "then depend on those beside it"
                    )
        if not own.fits:
            advice.append(f"{name}: lower --serve-rows, or end other programs")
    return advice or ["the same flags without --check begin to serve"]
