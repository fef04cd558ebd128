"""Log-probabilities of a prompt's own tokens, as if the model had chosen them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preflight.decoding.logprobs import measure_normalisers, read_logprobs
from preflight.models.base import TokenModel
from preflight.serving.protocol import TokenEvent
from preflight.serving.token_events import describe_token
from preflight.tokenization import Tokenizer

_ROWS = 64  # positions whose logits are held at once


@torch.inference_mode()
def score_ids(
    model: TokenModel, tokenizer: Tokenizer, ids: Sequence[int], n_alternatives: int
) -> list[TokenEvent]:
    """An event for each id; the first has nothing before it: log-probability 0, no alternatives."""
    device = next(iter(model.parameters())).device
    tokens = torch.tensor(ids, dtype=torch.long, device=device)
    first = describe_token(int(ids[0]), 0.0, tokenizer)
    events = [TokenEvent(first.text, first)]
    if len(ids) == 1:
        return events
    hidden = model.compute_hidden(tokens[None, :-1])[0]  # T-1 C
    for begin in range(0, len(hidden), _ROWS):
        logits = model.compute_logits(hidden[begin : begin + _ROWS])
        targets = tokens[begin + 1 : begin + 1 + len(logits)]
        for found in read_logprobs(logits, measure_normalisers(logits), targets, n_alternatives):
            chosen = describe_token(found.token, found.logprob, tokenizer)
            others = (describe_token(t, at, tokenizer) for t, at in found.alternatives)
            events.append(TokenEvent(chosen.text, chosen, tuple(others)))
    return events
