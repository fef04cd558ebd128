"""What decoding gives: a completion, and the log-probabilities of its tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """A token that was chosen, and what else was probable in its place.

    Log-probabilities are natural logarithms, of the model's own distribution over all of its ids:
    before ids without a text are left out, and before penalty, temperature and filters.

    Attributes:
        token: the id.
        logprob: its log-probability.
        alternatives: the most probable ids that can be generated with their log-probabilities,
            the most probable first, whether or not `token` is among them.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """A completion: what follows the prompt, and why it ends there."""

    text: str
    n_tokens: int  # chosen, the one that ended the completion included
    finish_reason: str  # "stop": a stop text; "end": an id that ends; "length": max_new_tokens
    tokens: tuple[int, ...] = ()  # the ids that were chosen
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where they were asked for
    score: float | None = None  # of a beam search: see `preflight.decoding.beam`
