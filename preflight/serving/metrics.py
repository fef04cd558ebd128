"""Counters for Prometheus, in its text format (version 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

PATHS = frozenset(
    ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
)
# Upper ends of the buckets, in seconds.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Durations in buckets."""

    def __init__(self) -> None:
        self._counts = [0] * len(_BUCKETS)
        self._n, self._total = 0, 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._n, self._total = self._n + 1, self._total + seconds
        for i, end in enumerate(_BUCKETS):
            self._counts[i] += seconds <= end

    def lines(self, name: str) -> Iterable[str]:
        """Its lines; the counts are cumulative."""
        yield f"# TYPE {name} histogram"
        for end, count in zip(_BUCKETS, self._counts, strict=True):
            yield f'{name}_bucket{{le="{end:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self._n}'
        yield f"{name}_sum {self._total:.6f}"
        yield f"{name}_count {self._n}"


class Metrics:
    """What has happened since the start."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self.first_token, self.duration = Histogram(), Histogram()

    def count_request(self, path: str, status: int) -> None:
        """One request was answered; status 0: the client left before."""
        self._requests[path if path in PATHS else "other", status] += 1

    def count_answer(self, reason: str, n_prompt: int, n_cached: int, n_tokens: int) -> None:
        """One answer has ended."""
        self._answers[reason] += 1
        self._tokens.update(prompt=n_prompt, cached=n_cached, generated=n_tokens)

    def text(self, models: Mapping[str, Any]) -> str:
        """Everything, with the figures of each model."""
        lines = ["# TYPE preflight_requests_total counter"]
        for (path, status), n in sorted(self._requests.items()):
            lines.append(f'preflight_requests_total{{path="{path}",status="{status}"}} {n}')
        lines.append("# TYPE preflight_answers_total counter")
        for reason, n in sorted(self._answers.items()):
            lines.append(f'preflight_answers_total{{finish_reason="{reason}"}} {n}')
        lines.append("# TYPE preflight_tokens_total counter")
        for kind in ("prompt", "cached", "generated"):
            lines.append(f'preflight_tokens_total{{kind="{kind}"}} {self._tokens[kind]}')
        lines += self.first_token.lines("preflight_first_token_seconds")
        lines += self.duration.lines("preflight_answer_seconds")
        return "\n".join([*lines, *_model_lines(models)]) + "\n"


def _model_lines(models: Mapping[str, Any]) -> Iterable[str]:
    """The numbers of `ModelStore.describe`, as gauges that have the model's name."""
    gauges: dict[str, list[str]] = {}
    for model, figures in models.items():
        label = str(model).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, value in figures.items() if isinstance(figures, Mapping) else ():
            if isinstance(value, int | float) and str(key).isidentifier():
                line = f'preflight_model_{key}{{model="{label}"}} {float(value):g}'
                gauges.setdefault(f"preflight_model_{key}", []).append(line)
    for name, lines in gauges.items():
        yield f"# TYPE {name} gauge"
        yield from lines
