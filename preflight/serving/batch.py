"""The rows of a model that answer at the same time, in the slots of one cache.

A step reads a piece of the prompts that are not read yet, and then generates one token in each
row whose prompt is. In fp32 an answer is that of `generate.stream_ids` alone with the same seed,
whatever runs beside it: its random numbers are its own, and rounding alone differs. Not safe for
threads: `preflight.serving.engine` owns it.

A slot keeps what it held when its answer ends. A prompt that begins alike is read from there on,
so that of a chat only the newest turn is read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from preflight.core.log import log
from preflight.decoding.rows import Row
from preflight.decoding.stepping import Decoder, TokenChooser, find_place
from preflight.decoding.windows import window_start
from preflight.device.runtime import is_out_of_memory
from preflight.models.base import TokenModel
from preflight.serving.pieces import PieceBudget, count_common
from preflight.serving.protocol import EndEvent, Job, TokenEvent
from preflight.serving.slots import Slots, Task
from preflight.serving.token_events import build_event
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer

_MIN_PIECE = 16  # tokens of a row; less would cost a pass through the model for little


Event = tuple[Task, TokenEvent | EndEvent]


class RowBatch:
    """Answers of one model, at most `n_slots` at once.

    Args:
        model: from `generate.load_model`.
        tokenizer: its own.
        n_slots: rows of the cache.
        piece_tokens: of prompts in one step; unset: as many as take about a quarter of a second.
    """

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        n_slots: int,
        piece_tokens: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._context = model.config.context_length
        self._device, _ = find_place(model)
        self.slots = Slots(model, n_slots)
        self._n_joined = 0
        self._budget = PieceBudget(piece_tokens)
        self._decoders: dict[int, Decoder] = {}  # by the number of rows
        self._choosers: dict[frozenset[int], TokenChooser] = {}
        self.on_step: Callable[[int, float], None] = lambda n_rows, seconds: None

    # ---- joining and leaving ----------------------------------------------------------------

    @property
    def tasks(self) -> list[Task]:
        """The answers in the making."""
        return self.slots.tasks

    @property
    def n_free(self) -> int:
        """Slots without an answer."""
        return len(self.slots.all) - len(self.tasks)

    @torch.inference_mode()
    def join(self, job: Job, owner: Any) -> Task:
        """Give a free slot to an answer; there must be one."""
        ids = list(job.ids)[-self._context :]
        row = Row(job.index, ids, self._tokenizer, job.sampling, self._stop_ids(job))
        row.window_start = 0
        self._n_joined += 1
        task = Task(job, row, owner, order=self._n_joined)
        source, n_common = self.slots.find_common(ids[:-1])
        target = self.slots.choose(source, n_common)
        task.n_cached = n_common
        self.slots.take_over(source, target, n_common)
        slot = self.slots.all[target]
        slot.task, slot.last_used = task, self._n_joined
        self.slots.settle(task)
        return task

    @torch.inference_mode()
    def leave(self, task: Task) -> None:
        """Free the slot of an answer; what it holds is kept until another needs the slot."""
        self.slots.free(task)

    def _stop_ids(self, job: Job) -> frozenset[int]:
        return job.stop_ids | {self._tokenizer.end_of_text_id}

    # ---- a step -----------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a piece, then generate a token in each row that has been read.

        No error of a row gets out: it ends the answer.
        """
        return self._read_piece() + (self._generate() if self.slots.n_ready else [])

    def _read_piece(self) -> list[Event]:
        """Read at most a piece of the texts that are not read yet; they share it."""
        tasks = self._choose_readers()
        if not tasks:
            return []
        slots = self.slots
        share = max(1, self._budget.find(is_alone=not slots.n_ready) // len(tasks))
        places = [slots.index(task) for task in tasks]
        parts = [slots.unread(task)[:share] for task in tasks]
        began = time.perf_counter()
        try:
            longest = max(map(len, parts))
            self._ensure_capacity(max(len(slots.all[i].held) for i in places) + longest + 1)
            padded = [part + [0] * (longest - len(part)) for part in parts]
            tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
            self._model.extend(tokens, slots.cache, places, list(map(len, parts)))
        except Exception as error:
            return self._fail(tasks, error)
        for i, part in zip(places, parts, strict=True):
            slots.all[i].held += part
        self._budget.note(sum(map(len, parts)), time.perf_counter() - began)
        for task in tasks:  # settling one may move another
            slots.settle(task)
        return []

    def _choose_readers(self) -> list[Task]:
        """Those that read now, the earliest first, as many as can share a piece.

        Where another slot holds more of the beginning of a text, it is copied. A text that begins
        as that of an earlier one waits until it can copy what that one reads.
        """
        slots = self.slots
        waiting = [slot.task for slot in slots.all[slots.n_ready :] if slot.task is not None]
        readers: list[Task] = []
        for task in sorted(waiting, key=lambda each: each.order):
            i, ids = slots.index(task), task.window[:-1]
            n_before = len(slots.all[i].held)
            source, n_held = slots.find_common(ids)
            if n_held >= n_before + _MIN_PIECE:
                task.n_cached += n_held - n_before
                slots.take_over(source, i, n_held)
                slots.settle(task)
            n_held = len(slots.all[slots.index(task)].held)
            earlier = (count_common(reader.window, ids) for reader in readers)
            if n_held < len(ids) and max(earlier, default=0) < n_held + _MIN_PIECE:
                readers.append(task)
        n_tokens = self._budget.find(is_alone=not slots.n_ready)
        return readers[: max(1, n_tokens // _MIN_PIECE)]

    def _ensure_capacity(self, n_tokens: int) -> None:
        if self.slots.ensure_capacity(n_tokens):
            self._decoders.clear()

    def _generate(self) -> list[Event]:
        """One token in each row that has been read."""
        cache, n_ready = self.slots.cache, self.slots.n_ready
        slots = self.slots.all[:n_ready]
        tasks = [slot.task for slot in slots if slot.task is not None]
        began = time.perf_counter()
        try:
            self._ensure_capacity(max(len(slot.held) for slot in slots) + 1)
            decoder = self._find_decoder(n_ready)
            decoder.cache.lengths = cache.lengths[:n_ready]
            newest = [task.row.tokens[-1] for task in tasks]
            with decoder.threads():
                logits = decoder.decode(torch.tensor(newest, device=self._device))
                chosen = self._choose(logits, tasks)
            cache.lengths[:n_ready] = decoder.cache.lengths
        except Exception as error:
            return self._fail(tasks, error)
        for slot, token in zip(slots, newest, strict=True):
            slot.held.append(token)
        events = [event for task in tasks for event in self._accept(task, chosen[id(task)])]
        self.on_step(len(tasks), time.perf_counter() - began)
        return events

    def _find_decoder(self, n_rows: int) -> Decoder:
        if n_rows not in self._decoders:
            self._decoders[n_rows] = Decoder(self._model, self.slots.cache.view_rows(n_rows))
        return self._decoders[n_rows]

    def _choose(self, logits: Tensor, tasks: Sequence[Task]) -> dict[int, int | Exception]:
        """The id for each task, or what went wrong, by the task's `id`."""
        groups: dict[tuple[SamplingConfig, frozenset[int]], list[int]] = {}
        for i, task in enumerate(tasks):
            sampling = dataclasses.replace(task.job.sampling, seed=0, stop=(), max_new_tokens=1)
            groups.setdefault((sampling, self._stop_ids(task.job)), []).append(i)
        chosen: dict[int, int | Exception] = {}
        for (sampling, stop_ids), members in groups.items():
            rows = [tasks[i].row for i in members]
            try:
                if stop_ids not in self._choosers:
                    self._choosers[stop_ids] = TokenChooser(
                        self._model, self._tokenizer, stop_ids, self._device
                    )
                chooser = self._choosers[stop_ids]
                part = logits if len(groups) == 1 else logits[members]
                uniforms, seen = chooser.draw(rows, sampling), chooser.find_seen(rows, sampling)
                ids: Sequence[int | Exception]
                ids = chooser.choose(part, rows, sampling, uniforms, seen).tolist()
            except Exception as error:
                ids = [error] * len(members)
            chosen |= {id(tasks[i]): token for i, token in zip(members, ids, strict=True)}
        return chosen

    def _accept(self, task: Task, token: int | Exception) -> list[Event]:
        """Append a token to an answer; what there is to tell."""
        try:
            if isinstance(token, Exception):
                raise token
            task.row.accept(token)
            events: list[Event] = [(task, build_event(task.row, self._tokenizer))]
        except Exception as error:
            return self._fail([task], error)
        reason = task.row.finish_reason
        if reason:
            self.leave(task)
            events.append((task, task.build_end("length" if reason == "length" else "stop")))
        elif window_start(len(task.row.tokens), self._context) != task.row.window_start:
            self._move_window(task)
        return events

    def _move_window(self, task: Task) -> None:
        """Let a row forget what it holds: its window has moved, and is read again."""
        task.row.window_start = window_start(len(task.row.tokens), self._context)
        self.slots.forget(task)
        self.slots.suspend(self.slots.index(task))

    def _fail(self, tasks: Sequence[Task], error: Exception) -> list[Event]:
        """End answers because of an error; what their slots hold is not trusted any more."""
        message = "out of memory" if is_out_of_memory(error) else f"internal error: {error!r}"
        log.warning(f"{len(tasks)} answers ended: {message}")
        for task in tasks:
            self.slots.free(task, forget=True)
        return [(task, task.build_end("error", message)) for task in tasks]
