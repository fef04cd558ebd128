"""How fast an engine has been."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from preflight.serving.protocol import EndEvent

_N_KEPT = 256  # of the newest times
_WINDOW_SECONDS = 60.0  # over which tokens per second are told


class Rates:
    """Times and counts. The engine's thread writes them; another thread may read them."""

    def __init__(self) -> None:
        self.n_answers = self.n_tokens = self.n_prompt_tokens = self.n_cached_tokens = 0
        self.n_failed = 0
        self._steps: dict[int, deque[float]] = {}  # seconds of a step, by its rows
        self._first: deque[float] = deque(maxlen=_N_KEPT)  # seconds to the first token
        self._answers: deque[float] = deque(maxlen=_N_KEPT)
        self._recent: deque[tuple[float, int]] = deque(maxlen=4 * _N_KEPT)  # when, rows

    def note_step(self, n_rows: int, seconds: float) -> None:
        """A token in each of so many rows."""
        self._steps.setdefault(n_rows, deque(maxlen=_N_KEPT)).append(seconds)
        self._recent.append((time.perf_counter(), n_rows))
        self.n_tokens += n_rows

    def note_first(self, seconds: float) -> None:
        """The first token of an answer, so long after it was asked for."""
        self._first.append(seconds)

    def note_end(self, seconds: float, event: EndEvent) -> None:
        """The end of an answer, so long after it was asked for."""
        self.n_answers += 1
        self.n_failed += event.reason == "error"
        self.n_prompt_tokens += event.n_prompt_tokens
        self.n_cached_tokens += event.n_cached_tokens
        self._answers.append(seconds)

    @property
    def answer_seconds(self) -> float | None:
        """The median of what an answer takes; None before the first."""
        return statistics.median(list(self._answers)) if self._answers else None

    def describe(self) -> Mapping[str, Any]:
        """All of it, for ``/health`` and ``/metrics``; times are medians."""
        now = time.perf_counter()
        recent = [n for at, n in list(self._recent) if now - at < _WINDOW_SECONDS]
        steps = {n: statistics.median(list(times)) for n, times in sorted(self._steps.items())}
        return {
            "answers": self.n_answers,
            "failed": self.n_failed,
            "tokens": self.n_tokens,
            "prompt_tokens": self.n_prompt_tokens,
            "cached_prompt_tokens": self.n_cached_tokens,
            "tokens_last_minute": sum(recent),
            "first_token_seconds": statistics.median(list(self._first)) if self._first else None,
            "tokens_per_second": {str(n): n / max(at, 1e-9) for n, at in steps.items()},
        }
