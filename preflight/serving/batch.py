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
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preflight.core.log import log
from preflight.decoding.rows import Row
from preflight.decoding.stepping import Decoder, TokenChooser, find_place
from preflight.decoding.windows import window_start
from preflight.device.runtime import is_out_of_memory
from preflight.models.protocol import LanguageModel
from preflight.serving.pieces import PieceBudget, count_common
from preflight.serving.protocol import EndEvent, Job, TokenEvent
from preflight.serving.token_events import build_event
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer

FIRST_CAPACITY = 256  # tokens of a slot at first; it doubles when a text needs more
_MIN_PIECE = 16  # tokens of a row; less would cost a pass through the model for little


@dataclass(eq=False)
class Task:
    """An answer in a slot.

    Attributes:
        job: what was asked for.
        row: its tokens and text.
        owner: whoever gets its events.
        n_cached: tokens of the prompt that needed no reading.
        order: of arrival.
    """

    job: Job
    row: Row
    owner: Any
    n_cached: int = 0
    order: int = 0

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt that the model sees."""
        return len(self.row.tokens) - len(self.row.pieces)

    def build_end(self, reason: str, message: str = "") -> EndEvent:
        """What tells that it has ended."""
        n_tokens = len(self.row.pieces)
        return EndEvent(reason, self.n_prompt, n_tokens, self.n_cached, message)


Event = tuple[Task, TokenEvent | EndEvent]


@dataclass(eq=False)
class _Slot:
    """A row of the cache.

    Attributes:
        held: the ids whose keys and values it holds, from its first position on.
        task: the answer that uses it; None: it is free.
        last_used: the higher, the later.
    """

    held: list[int] = field(default_factory=list)
    task: Task | None = None
    last_used: int = 0


class RowBatch:
    """Answers of one model, at most `n_slots` at once.

    Slots 0 to `n_ready` - 1 are those whose prompts have been read: they generate. The others are
    being read, or are free.

    Args:
        model: from `generate.load_model`.
        tokenizer: its own.
        n_slots: rows of the cache.
        piece_tokens: of prompts in one step; unset: as many as take about a quarter of a second.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        n_slots: int,
        piece_tokens: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._context = model.config.context_length
        self._device, dtype = find_place(model)
        capacity = min(FIRST_CAPACITY, self._context)
        with torch.inference_mode():
            self.cache = model.build_cache(n_slots, self._device, dtype, capacity)
        self._slots = [_Slot() for _ in range(n_slots)]
        self.n_ready = 0
        self._n_joined = 0
        self._budget = PieceBudget(piece_tokens)
        self._decoders: dict[int, Decoder] = {}  # by the number of rows
        self._choosers: dict[frozenset[int], TokenChooser] = {}
        self.on_step: Callable[[int, float], None] = lambda n_rows, seconds: None

    # ---- joining and leaving ----------------------------------------------------------------

    @property
    def tasks(self) -> list[Task]:
        """The answers in the making."""
        return [slot.task for slot in self._slots if slot.task is not None]

    @property
    def n_free(self) -> int:
        """Slots without an answer."""
        return len(self._slots) - len(self.tasks)

    @torch.inference_mode()
    def join(self, job: Job, owner: Any) -> Task:
        """Give a free slot to an answer; there must be one."""
        ids = list(job.ids)[-self._context :]
        row = Row(job.index, ids, self._tokenizer, job.sampling, self._stop_ids(job))
        row.window_start = 0
        self._n_joined += 1
        task = Task(job, row, owner, order=self._n_joined)
        source, n_common = self._find_common(ids[:-1])
        target = self._choose_slot(source, n_common)
        task.n_cached = n_common
        self._take_over(source, target, n_common)
        slot = self._slots[target]
        slot.task, slot.last_used = task, self._n_joined
        self._settle(target)
        return task

    @torch.inference_mode()
    def leave(self, task: Task) -> None:
        """Free the slot of an answer; what it holds is kept until another needs the slot."""
        index = self._index(task)
        self._slots[index].task = None
        if index < self.n_ready:
            self._swap(index, self.n_ready - 1)
            self.n_ready -= 1

    def _stop_ids(self, job: Job) -> frozenset[int]:
        return job.stop_ids | {self._tokenizer.end_of_text_id}

    def _find_common(self, ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of the beginning of `ids`, and how much."""
        common = [count_common(slot.held, ids) for slot in self._slots]
        most = max(common)
        # Of several, a free one: it need not be copied.
        best = [i for i, n in enumerate(common) if n == most]
        return next((i for i in best if self._slots[i].task is None), best[0]), most

    def _choose_slot(self, source: int, n_common: int) -> int:
        """A free slot: the source itself if little else is in it, else the least recently used."""
        free = [i for i, slot in enumerate(self._slots) if slot.task is None]
        if source in free and n_common and 2 * n_common >= len(self._slots[source].held):
            return source
        others = [i for i in free if i != source] or free
        return min(others, key=lambda i: (bool(self._slots[i].held), self._slots[i].last_used))

    def _take_over(self, source: int, target: int, n_tokens: int) -> None:
        """Let a slot hold the first tokens of another, or of what it holds itself."""
        if n_tokens and source != target:
            order = list(range(len(self._slots)))
            order[target] = source
            self.cache.copy_rows(order)
        self.cache.lengths[target] = n_tokens
        self._slots[target].held = self._slots[source].held[:n_tokens]

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        order = list(range(len(self._slots)))
        order[a], order[b] = b, a
        self.cache.copy_rows(order)
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]

    def _settle(self, index: int) -> None:
        """Count a slot among those that generate, if its text has been read."""
        if index >= self.n_ready and not self._unread(self._slots[index]):
            self._swap(index, self.n_ready)
            self.n_ready += 1

    def _index(self, task: Task) -> int:
        return next(i for i, slot in enumerate(self._slots) if slot.task is task)

    @staticmethod
    def _read_ids(task: Task) -> list[int]:
        """The ids of the window that the model sees."""
        return task.row.tokens[task.row.window_start or 0 :]

    def _unread(self, slot: _Slot) -> list[int]:
        """What the model has to read before it can generate: all but the last token."""
        return self._read_ids(slot.task)[len(slot.held) : -1] if slot.task else []

    # ---- a step -----------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a piece, then generate a token in each row that has been read.

        No error of a row gets out: it ends the answer.
        """
        return self._read_piece() + (self._generate() if self.n_ready else [])

    def _read_piece(self) -> list[Event]:
        """Read at most a piece of the texts that are not read yet; they share it."""
        tasks = self._choose_readers()
        if not tasks:
            return []
        share = max(1, self._budget.find(is_alone=not self.n_ready) // len(tasks))
        slots = [self._index(task) for task in tasks]
        parts = [self._unread(self._slots[i])[:share] for i in slots]
        began = time.perf_counter()
        try:
            longest = max(map(len, parts))
            self._ensure_capacity(max(len(self._slots[i].held) for i in slots) + longest + 1)
            padded = [part + [0] * (longest - len(part)) for part in parts]
            tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
            self._model.extend(tokens, self.cache, slots, list(map(len, parts)))
        except Exception as error:
            return self._fail(tasks, error)
        for i, part in zip(slots, parts, strict=True):
            self._slots[i].held += part
        self._budget.note(sum(map(len, parts)), time.perf_counter() - began)
        for task in tasks:  # settling one may move another
            self._settle(self._index(task))
        return []

    def _choose_readers(self) -> list[Task]:
        """Those that read now, the earliest first, as many as can share a piece.

        Where another slot holds more of the beginning of a text, it is copied. A text that begins
        as that of an earlier one waits until it can copy what that one reads.
        """
        waiting = [slot.task for slot in self._slots[self.n_ready :] if slot.task is not None]
        readers: list[Task] = []
        for task in sorted(waiting, key=lambda each: each.order):
            i = self._index(task)
            held, ids = self._slots[i].held, self._read_ids(task)
            source, n_held = self._find_common(ids[:-1])
            if n_held >= len(held) + _MIN_PIECE:
                task.n_cached += n_held - len(held)
                self._take_over(source, i, n_held)
                self._settle(i)
            n_held = len(self._slots[self._index(task)].held)
            earlier = (count_common(self._read_ids(reader), ids[:-1]) for reader in readers)
            if n_held < len(ids) - 1 and max(earlier, default=0) < n_held + _MIN_PIECE:
                readers.append(task)
        n_tokens = self._budget.find(is_alone=not self.n_ready)
        return readers[: max(1, n_tokens // _MIN_PIECE)]

    def _ensure_capacity(self, n_tokens: int) -> None:
        """Let the slots hold so many tokens, or a whole context."""
        wanted = min(n_tokens, self._context)
        if wanted > self.cache.capacity:
            self._decoders.clear()
            self.cache.grow(min(self._context, 2 ** math.ceil(math.log2(wanted))))

    def _generate(self) -> list[Event]:
        """One token in each row that has been read."""
        slots = self._slots[: self.n_ready]
        tasks = [slot.task for slot in slots if slot.task is not None]
        began = time.perf_counter()
        try:
            self._ensure_capacity(max(len(slot.held) for slot in slots) + 1)
            decoder = self._find_decoder(self.n_ready)
            decoder.cache.lengths = self.cache.lengths[: self.n_ready]
            newest = [task.row.tokens[-1] for task in tasks]
            with decoder.threads():
                logits = decoder.decode(torch.tensor(newest, device=self._device))
                chosen = self._choose(logits, tasks)
            self.cache.lengths[: self.n_ready] = decoder.cache.lengths
        except Exception as error:
            return self._fail(tasks, error)
        for slot, token in zip(slots, newest, strict=True):
            slot.held.append(token)
        events = [event for task in tasks for event in self._accept(task, chosen[id(task)])]
        self.on_step(len(tasks), time.perf_counter() - began)
        return events

    def _find_decoder(self, n_rows: int) -> Decoder:
        if n_rows not in self._decoders:
            self._decoders[n_rows] = Decoder(self._model, self.cache.view_rows(n_rows))
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
        index = self._index(task)
        task.row.window_start = window_start(len(task.row.tokens), self._context)
        self._slots[index].held, self.cache.lengths[index] = [], 0
        self._swap(index, self.n_ready - 1)
        self.n_ready -= 1

    def _fail(self, tasks: Sequence[Task], error: Exception) -> list[Event]:
        """End answers because of an error; what their slots hold is not trusted any more."""
        message = "out of memory" if is_out_of_memory(error) else f"internal error: {error!r}"
        log.warning(f"{len(tasks)} answers ended: {message}")
        for task in tasks:
            index = self._index(task)
            self._slots[index].held, self.cache.lengths[index] = [], 0
            self.leave(task)
        return [(task, task.build_end("error", message)) for task in tasks]
