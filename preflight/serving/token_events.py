"""What is told of a token that was generated."""

from __future__ import annotations

from preflight.decoding.completions import TokenLogprobs
from preflight.decoding.rows import Row
from preflight.serving.protocol import Alternative, TokenEvent
from preflight.tokenization import Tokenizer


def build_event(row: Row, tokenizer: Tokenizer) -> TokenEvent:
    """The event of a row's newest token. One that ends the text by itself is not told as chosen."""
    text = row.pieces[-1]
    if not row.logprobs or row.finish_reason == "end":
        return TokenEvent(text)
    details: TokenLogprobs = row.logprobs[-1]
    others = tuple(describe_token(token, at, tokenizer) for token, at in details.alternatives)
    return TokenEvent(text, describe_token(details.token, details.logprob, tokenizer), others)


def describe_token(token: int, logprob: float, tokenizer: Tokenizer) -> Alternative:
    """A token with its log-probability; special ones have no bytes."""
    data = tokenizer.token_bytes(token) or b""
    return Alternative(token, data.decode("utf-8", errors="replace"), data, logprob)
