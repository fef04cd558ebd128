"""The models of a server: loaded when they are asked for, unloaded when memory lacks."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from generate import encode_prompt, load_model
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import MANIFEST_NAME
from preflight.checkpoints.naming import name_checkpoints
from preflight.checkpoints.store import open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.device.host_memory import release_freed_memory
from preflight.device.runtime import Runtime, is_out_of_memory
from preflight.device.token_store import measure_model_room
from preflight.models.base import TokenModel
from preflight.models.packing import count_packed_bytes
from preflight.serving.batch import RowBatch
from preflight.serving.engine import Engine
from preflight.serving.foresight import (
    ServingMemory,
    Speed,
    estimate_memory,
    fit_rows,
    measure_speed,
)
from preflight.serving.pieces import PieceBudget
from preflight.serving.protocol import Answer, Job, ServedModel, TokenEvent
from preflight.serving.scoring import PromptScorer
from preflight.tokenization import Tokenizer
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from preflight.tokenization.chats import Message
from preflight.training.chat_templates import read_checkpoint_template


@dataclass(eq=False)
class Entry:
    """A checkpoint that can be served.

    Attributes:
        name: that clients use.
        served: the loaded model; None: it is not loaded.
        last_used: seconds, of a clock that only goes on.
    """

    name: str
    checkpoint: Checkpoint
    served: ServedCheckpoint | None = None
    last_used: float = 0.0

    @functools.cached_property
    def created(self) -> int:
        """When the checkpoint was written, in seconds since 1970."""
        return int(os.stat(self.checkpoint.path / MANIFEST_NAME).st_mtime)


def find_entries(paths: Sequence[str]) -> list[Entry]:
    """The checkpoints to serve, each once, verified, by the names of their runs' folders.

    Raises:
        PreflightError: code CHECKPOINT, for what is none.
    """
    found = [open_checkpoint(path) for path in paths]
    checkpoints = list({each.path.resolve(): each for each in found}.values())
    folders = [each.path.absolute().parent.parent for each in checkpoints]

    def spell(folder: str, checkpoint: Checkpoint) -> str:
        several = folders.count(checkpoint.path.absolute().parent.parent) > 1
        return f"{folder}@{checkpoint.step}" if several else folder

    names = name_checkpoints(checkpoints, spell)
    return [Entry(*pair) for pair in zip(names, checkpoints, strict=True)]


class ServedCheckpoint:
    """A loaded model with its engine. It is a `ServedModel`.

    Args:
        entry: what it was loaded from.
        model: in its dtype, on its device.
        tokenizer: its own.
        memory: what was predicted, with the rows.
        template: for chats; unset: the checkpoint's own, or the default one.
    """

    def __init__(
        self,
        entry: Entry,
        model: TokenModel,
        tokenizer: Tokenizer,
        memory: ServingMemory,
        template: ChatTemplate | None,
    ) -> None:
        self.name, self.created = entry.name, entry.created
        self.context_length = model.config.context_length
        self._model, self._tokenizer, self.memory = model, tokenizer, memory
        own = template or read_checkpoint_template(entry.checkpoint)
        if own is None:
            log.info(f"{self.name} has no chat template: the default one is used")
        self._template = own or DEFAULT_TEMPLATE
        self._scoring_budget = PieceBudget()
        self._batch = RowBatch(model, tokenizer, memory.rows)
        self.speeds = self._measure()
        self.engine = Engine(self._batch, self.name)

    def _measure(self) -> list[Speed]:
        """For one person and for all rows; the first steps of a process take longer."""
        config = self._model.config
        measure_speed(self._batch, config, 1)
        return [measure_speed(self._batch, config, n) for n in sorted({1, self.memory.rows})]

    @functools.cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self._tokenizer, self._template, self.context_length)

    def encode_chat(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """As in `ServedModel`: the earliest turns are left out where the chat is too long."""
        room = self._encoder.find_room(max_new_tokens)
        return self._encoder.encode_prompt(messages, max_tokens=room)

    def encode_text(self, text: str) -> list[int]:
        """As in `ServedModel`."""
        return encode_prompt(self._tokenizer, text)

    @property
    def chat_stop_ids(self) -> frozenset[int]:
        """As in `ServedModel`."""
        return self._encoder.stop_ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """As in `ServedModel`."""
        most = self._model.config.vocab_size - 1
        if not all(0 <= token <= most for token in ids):
            raise ValueError(f"ids must be from 0 to {most:,}")

    async def score(self, ids: Sequence[int], n_alternatives: int) -> list[TokenEvent]:
        """As in `ServedModel`."""
        scorer = PromptScorer(
            self._model, self._tokenizer, ids, n_alternatives, self._scoring_budget
        )
        while await asyncio.wrap_future(self.engine.call(scorer.read_piece)):
            pass  # a step of the answers lies between two pieces
        return scorer.events

    def submit(self, job: Job) -> Answer:
        """As in `ServedModel`."""
        return self.engine.submit(job)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Of the weights and the cache, as they are now."""
        weights = sum(each.numel() * each.element_size() for each in self._model.parameters())
        weights += count_packed_bytes(self._model)
        layers = self._batch.slots.cache.layers
        return {"weights": weights, "cache": sum(x.numel() * x.element_size() for x in layers)}

    def describe(self) -> Mapping[str, Any]:
        """Rows and speed, measured beside predicted."""
        held = self.held_bytes
        rates = self.engine.rates.describe()
        return {
            "rows": self.memory.rows,
            "rows_in_use": self.engine.n_running,
            "waiting": self.engine.n_waiting,
            "tokens_last_minute": rates["tokens_last_minute"],
            "memory_bytes": held["weights"] + held["cache"],
            "predicted": {
                "memory_bytes": self.memory.describe(),
                "speed": [speed.describe() for speed in self.speeds],
            },
            "measured": {"memory_bytes": held, **rates},
        }


class Store:
    """A `ModelStore` of checkpoints.

    Args:
        entries: the first is the default.
        runtime: device and precision.
        rows: answers of a model at once, fewer where memory is short.
        template: for the chats of all of them; unset: each one's own.
        prepare: what is done to a model once it is loaded, such as quantising it.
        packs: whether `prepare` may pack weights.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        runtime: Runtime,
        rows: int,
        template: ChatTemplate | None = None,
        prepare: Callable[[TokenModel, Tokenizer], TokenModel] | None = None,
        *,
        packs: bool = False,
    ) -> None:
        self._prepare, self._packs = prepare, packs
        self._entries = {entry.name: entry for entry in entries}
        self._runtime, self._rows, self._template = runtime, rows, template
        self._loading = asyncio.Lock()

    def names(self) -> list[str]:
        """As in `ModelStore`."""
        return list(self._entries)

    async def open(self, name: str) -> ServedModel:
        """As in `ModelStore`."""
        entry = self._entries[name]
        entry.last_used = time.monotonic()
        if entry.served is None:
            async with self._loading:
                if entry.served is None:
                    entry.served = await asyncio.to_thread(self._load, entry)
        return entry.served

    def describe(self) -> Mapping[str, Any]:
        """As in `ModelStore`."""
        return {
            entry.name: {
                "loaded": entry.served is not None,
                "created": entry.created,
                "step": entry.checkpoint.step,
                "context_length": entry.checkpoint.model_config.context_length,
                "device": str(self._runtime.device),
                "precision": str(self._runtime.dtype).removeprefix("torch."),
                **(entry.served.describe() if entry.served else {}),
            }
            for entry in self._entries.values()
        }

    async def close(self, seconds: float) -> None:
        """As in `ModelStore`."""
        loaded = [entry.served for entry in self._entries.values() if entry.served]
        await asyncio.gather(
            *(asyncio.to_thread(served.engine.close, seconds) for served in loaded)
        )

    def _load(self, entry: Entry) -> ServedCheckpoint:
        """Load a model; others that are idle make room for it.

        Raises:
            PreflightError: code OUT_OF_MEMORY or CHECKPOINT.
        """
        memory = self._make_room(entry)
        began = time.perf_counter()
        try:
            model, tokenizer = load_model(
                entry.checkpoint, self._runtime.device, self._runtime.dtype
            )
            if self._prepare is not None:
                model = self._prepare(model, tokenizer)
            served = ServedCheckpoint(entry, model, tokenizer, memory, self._template)
        except Exception as error:
            if isinstance(error, PreflightError) or not is_out_of_memory(error):
                raise
            raise PreflightError(
                ExitCode.OUT_OF_MEMORY,
                f"{entry.name}: out of memory while it was loaded",
                "use a smaller --serve-rows, or serve fewer models",
            ) from None
        speeds = ", ".join(
            f"{s.tokens_per_second:,.0f} tokens/s for {s.rows}" for s in served.speeds
        )
        log.info(f"{entry.name}: loaded in {time.perf_counter() - began:.1f} s; {speeds}")
        return served

    def _make_room(self, entry: Entry) -> ServingMemory:
        """Unload idle models, the least recently used first, until it fits; tell the memory."""
        config, dtype = entry.checkpoint.model_config, self._runtime.dtype
        while True:
            free = self._measure_room()
            idle = [e for e in self._entries.values() if e.served and e.served.engine.is_idle]
            rows = fit_rows(config, dtype, self._rows, free, packs=self._packs)
            if rows == self._rows or not idle:
                break
            self._unload(min(idle, key=lambda each: each.last_used))
        memory = estimate_memory(config, dtype, max(rows, 1), packs=self._packs)
        told = (
            f"{entry.name}: {format_bytes(memory.weights)} of weights and {memory.rows} rows of "
            f"{format_bytes(memory.cache_row)}, {format_bytes(free)} are free"
        )
        if not rows:
            raise PreflightError(
                ExitCode.OUT_OF_MEMORY,
                told,
                "end other programs, or choose another --device",
            )
        log.info(told + (f" (fewer than --serve-rows {self._rows})" if rows < self._rows else ""))
        return memory

    def _measure_room(self) -> int:
        """Free memory, without what the caches of loaded models may still grow by."""
        promised = 0
        for entry in self._entries.values():
            if entry.served:
                promised += entry.served.memory.cache - entry.served.held_bytes["cache"]
        return max(0, measure_model_room(self._runtime.device) - promised)

    def _unload(self, entry: Entry) -> None:
        served, entry.served = entry.served, None
        if served is not None:
            served.engine.close(0)
        del served
        gc.collect()
        release_freed_memory()
        log.info(f"{entry.name}: unloaded to make room")
