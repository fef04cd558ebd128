"""What passes between the HTTP application and the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preflight.settings import SamplingConfig
from preflight.tokenization.chats import Message


@dataclass(frozen=True)
class Alternative:
    """A token and its log-probability.

    Attributes:
        text: of the token by itself; what is no UTF-8 becomes U+FFFD.
        data: its bytes.
    """

    token: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True)
class TokenEvent:
    """One token was generated.

    Attributes:
        text: that can be shown now: whole characters, perhaps none; stop texts are held back.
        chosen: the token; ``None`` where no log-probabilities were asked for.
        alternatives: the most probable ones, as many as were asked for.
    """

    text: str
    chosen: Alternative | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class EndEvent:
    """The answer has ended.

    Attributes:
        reason: ``stop`` (a stop text or token) or ``length``; ``cancelled``, ``error``.
        n_prompt_tokens: of the prompt.
        n_cached_tokens: of them, those that were in a cache already.
        n_tokens: generated.
        message: what went wrong, for ``error``.
    """

    reason: str
    n_prompt_tokens: int
    n_tokens: int
    n_cached_tokens: int = 0
    message: str = ""


@dataclass(frozen=True)
class Job:
    """One answer to generate.

    Attributes:
        ids: the prompt, at least one id, which fits the context with one more token.
        sampling: as for `generate_text`; `max_new_tokens`, `stop`, `seed`, `logprobs` included.
        stop_ids: ids that end it, beside the end of text.
        index: of several answers to one prompt: each draws random numbers of its own.
    """

    ids: Sequence[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    index: int = 0


class Answer(Protocol):
    """An answer in the making. Iterating gives its events; the last is an `EndEvent`."""

    def __aiter__(self) -> AsyncIterator[TokenEvent | EndEvent]: ...

    def cancel(self) -> None:
        """Free its row before the next step, from any thread; no event comes after that."""


class ServedModel(Protocol):
    """A checkpoint that is served, under the name that clients use."""

    name: str
    context_length: int
    created: int  # seconds since 1970

    def encode_chat(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """The prompt of a chat in the model's template; PreflightError (TEXT) if it cannot fit."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a plain prompt."""

    @property
    def chat_stop_ids(self) -> frozenset[int]:
        """Ids that end an answer in a chat."""

    def check_ids(self, ids: Sequence[int]) -> None:
        """ValueError for ids that the model does not have."""

    async def score(self, ids: Sequence[int], n_alternatives: int) -> list[TokenEvent]:
        """Each id of a prompt as if the model had chosen it, for ``echo``.

        The first has nothing before it: its log-probability is 0 and it has no alternatives.
        """

    def submit(self, job: Job) -> Answer:
        """Queue an answer, from the event loop; `QueueFullError` when too many are waiting."""


class QueueFullError(Exception):
    """Too many answers are waiting.

    Attributes:
        retry_after_seconds: when it is worth a new try.
    """

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after_seconds = retry_after_seconds


class ModelStore(Protocol):
    """The models of a server; each is loaded when it is first asked for."""

    def names(self) -> list[str]:
        """The names of all, the first is the default."""

    async def open(self, name: str) -> ServedModel:
        """The model of that name; KeyError for an unknown one, PreflightError if it cannot load."""

    def describe(self) -> Mapping[str, Any]:
        """For ``/health``: of each model whether it is loaded, rows in use and waiting, tokens/s,
        memory, measured beside predicted."""

    async def close(self, seconds: float) -> None:
        """Let running answers end for so long, then cancel them."""
