"""The slots of a cache: which answer each has, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preflight.decoding.rows import Row
from preflight.decoding.stepping import find_place
from preflight.models.base import TokenModel
from preflight.serving.pieces import count_common
from preflight.serving.protocol import EndEvent, Job

FIRST_CAPACITY = 256  # tokens of a slot at first; it doubles when a text needs more


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

    @property
    def window(self) -> list[int]:
        """The ids that the model sees."""
        return self.row.tokens[self.row.window_start or 0 :]

    def build_end(self, reason: str, message: str = "") -> EndEvent:
        """What tells that it has ended."""
        n_tokens = len(self.row.pieces)
        return EndEvent(reason, self.n_prompt, n_tokens, self.n_cached, message)


@dataclass(eq=False)
class Slot:
    """A row of the cache.

    Attributes:
        held: the ids whose keys and values it holds, from its first position on.
        task: the answer that uses it; None: it is free.
        last_used: the higher, the later.
    """

    held: list[int] = field(default_factory=list)
    task: Task | None = None
    last_used: int = 0


class Slots:
    """Slots 0 to `n_ready` - 1 are those whose prompts have been read: they generate. The others
    are being read, or are free.

    Attributes:
        cache: a row for each slot, in this order.
    """

    def __init__(self, model: TokenModel, n_slots: int) -> None:
        self._context = model.config.context_length
        device, dtype = find_place(model)
        capacity = min(FIRST_CAPACITY, self._context)
        with torch.inference_mode():
            self.cache = model.build_cache(n_slots, device, dtype, capacity)
        self.all = [Slot() for _ in range(n_slots)]
        self.n_ready = 0

    @property
    def tasks(self) -> list[Task]:
        """The answers in the making."""
        return [slot.task for slot in self.all if slot.task is not None]

    def index(self, task: Task) -> int:
        """The slot of an answer."""
        return next(i for i, slot in enumerate(self.all) if slot.task is task)

    def find_common(self, ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of the beginning of `ids`, and how much."""
        common = [count_common(slot.held, ids) for slot in self.all]
        most = max(common)
        # Of several, a free one: it need not be copied.
        best = [i for i, n in enumerate(common) if n == most]
        return next((i for i in best if self.all[i].task is None), best[0]), most

    def choose(self, source: int, n_common: int) -> int:
        """A free slot: the source itself if little else is in it, else the least recently used."""
        free = [i for i, slot in enumerate(self.all) if slot.task is None]
        if source in free and n_common and 2 * n_common >= len(self.all[source].held):
            return source
        others = [i for i in free if i != source] or free
        return min(others, key=lambda i: (bool(self.all[i].held), self.all[i].last_used))

    def take_over(self, source: int, target: int, n_tokens: int) -> None:
        """Let a slot hold the first tokens of another, or of what it holds itself."""
        if n_tokens and source != target:
            order = list(range(len(self.all)))
            order[target] = source
            self.cache.copy_rows(order)
        self.cache.lengths[target] = n_tokens
        self.all[target].held = self.all[source].held[:n_tokens]

    def _swap(self, a: int, b: int) -> None:
        """Exchange two slots with all that they hold."""
        if a == b:
            return
        order = list(range(len(self.all)))
        order[a], order[b] = b, a
        self.cache.copy_rows(order)
        self.all[a], self.all[b] = self.all[b], self.all[a]

    def free(self, task: Task, *, forget: bool = False) -> None:
        """End the use of a slot; what it holds is kept, unless it is to be forgotten."""
        index = self.index(task)
        if forget:
            self.forget(task)
        self.all[index].task = None
        if index < self.n_ready:
            self.suspend(index)

    def forget(self, task: Task) -> None:
        """Let the slot of an answer hold nothing."""
        index = self.index(task)
        self.all[index].held, self.cache.lengths[index] = [], 0

    def suspend(self, index: int) -> None:
        """Take a slot out of those that generate."""
        self._swap(index, self.n_ready - 1)
        self.n_ready -= 1

    def settle(self, task: Task) -> None:
        """Count the slot of an answer among those that generate, if its text has been read."""
        index = self.index(task)
        if index >= self.n_ready and not self.unread(task):
            self._swap(index, self.n_ready)
            self.n_ready += 1

    def unread(self, task: Task) -> list[int]:
        """What the model has to read before it can generate: all but the last token."""
        return task.window[len(self.all[self.index(task)].held) : -1]

    def ensure_capacity(self, n_tokens: int) -> bool:
        """Let the slots hold so many tokens, or a whole context; whether the cache changed."""
        wanted = min(n_tokens, self._context)
        if wanted <= self.cache.capacity:
            return False
        self.cache.grow(min(self._context, 2 ** math.ceil(math.log2(wanted))))
        return True
