"""Answers in OpenAI's forms: whole, and as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preflight.serving.protocol import Alternative, EndEvent, TokenEvent

# JSON has no infinity; OpenAI writes this for what is all but impossible.
LEAST_LOGPROB = -9999.0


@dataclass
class Choice:
    """One answer as it comes in.

    Attributes:
        text: what has come so far.
        tokens: those that carry log-probabilities.
        offsets: of each in `text`, in characters.
        n_scored: of them, tokens of the prompt, which `echo` puts first.
        has_begun: a token was generated.
    """

    index: int
    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    n_scored: int = 0
    has_begun: bool = False
    end: EndEvent | None = None

    def add(self, event: TokenEvent, text: str) -> None:
        """Append a token, and what of its text is shown."""
        if event.chosen is not None:
            self.tokens.append(event)
            self.offsets.append(len(self.text))
        self.text += text


class Form(Protocol):
    """How answers of one endpoint look."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk, if there is one without text."""

    def piece(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """The choice of a chunk."""

    def whole(self, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
        """The choice of a whole answer."""

    def logprobs(self, tokens: Sequence[TokenEvent], offsets: Sequence[int], first: int) -> Any:
        """Log-probabilities; `first`: the place of the first token in the whole text."""

    def envelope(self, stream: bool) -> dict[str, Any]:
        """What all chunks share."""


class ChatForm:
    """``/v1/chat/completions``."""

    def __init__(self, model: str) -> None:
        self._head = _head("chatcmpl", model)

    def envelope(self, stream: bool) -> dict[str, Any]:
        """See `Form`."""
        return self._head | {"object": "chat.completion" + (".chunk" if stream else "")}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Form`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """See `Form`."""
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
        """See `Form`."""
        assert choice.end is not None
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.logprobs(choice.tokens, (), 0) if with_logprobs else None,
            "finish_reason": choice.end.reason,
        }

    def logprobs(self, tokens: Sequence[TokenEvent], offsets: Sequence[int], first: int) -> Any:
        """See `Form`."""
        content = []
        for event in tokens:
            assert event.chosen is not None
            top = [_spell_out(alternative) for alternative in event.alternatives]
            content.append(_spell_out(event.chosen) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


class TextForm:
    """``/v1/completions``."""

    def __init__(self, model: str) -> None:
        self._head = _head("cmpl", model)

    def envelope(self, stream: bool) -> dict[str, Any]:
        """See `Form`."""
        return self._head | {"object": "text_completion"}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Form`."""
        return None

    def piece(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """See `Form`."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
        """See `Form`."""
        assert choice.end is not None
        logprobs = self.logprobs(choice.tokens, choice.offsets, 0 if choice.n_scored else 1)
        return self.piece(
            choice.index, choice.text, logprobs if with_logprobs else None, choice.end.reason
        )

    def logprobs(self, tokens: Sequence[TokenEvent], offsets: Sequence[int], first: int) -> Any:
        """See `Form`. What nothing comes before, the first token of all, has no probability."""
        names: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for place, event in enumerate(tokens, first):
            assert event.chosen is not None
            names.append(_name(event.chosen))
            values.append(_finite(event.chosen.logprob) if place else None)
            # Of two tokens with one name the more probable counts.
            tops.append(_rank([event.chosen, *event.alternatives]) if place else None)
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


def count_usage(prompt_lengths: Iterable[int], ends: Sequence[EndEvent]) -> dict[str, Any]:
    """Tokens of a request; a prompt with several answers counts once."""
    n_prompt, n_tokens = sum(prompt_lengths), sum(end.n_tokens for end in ends)
    n_cached = min(sum(end.n_cached_tokens for end in ends), n_prompt)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt + n_tokens,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB


def _spell_out(token: Alternative) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.data),
    }


def _name(token: Alternative) -> str:
    r"""A token's text; ``bytes:\xe2\x80`` where it is part of a character, as OpenAI writes it."""
    try:
        return token.data.decode() if token.data else token.text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _rank(tokens: Iterable[Alternative]) -> dict[str, float]:
    ranked: dict[str, float] = {}
    for token in tokens:
        value = _finite(token.logprob)
        ranked[_name(token)] = max(value, ranked.get(_name(token), value))
    return ranked
