"""Log-probabilities of a prompt's own tokens, as if the model had chosen them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from preflight.decoding.completions import TokenLogprobs
from preflight.decoding.logprobs import measure_normalisers, read_logprobs
from preflight.decoding.stepping import find_place
from preflight.models.base import TokenModel
from preflight.models.kv_cache import KVCache
from preflight.serving.pieces import PieceBudget
from preflight.serving.protocol import TokenEvent
from preflight.serving.token_events import describe_token
from preflight.tokenization import Tokenizer

_ROWS = 64  # positions whose logits are held at once


class PromptScorer:
    """The log-probability of each id of a prompt, a piece after the other.

    Attributes:
        events: one for each id so far; the first has nothing before it: log-probability 0, no
            alternatives.

    Args:
        budget: says how long a piece is.
    """

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        n_alternatives: int,
        budget: PieceBudget,
    ) -> None:
        self._model, self._tokenizer, self._budget = model, tokenizer, budget
        self._ids, self._n_alternatives = ids, n_alternatives
        self._cache: KVCache | None = None
        first = describe_token(int(ids[0]), 0.0, tokenizer)
        self.events = [TokenEvent(first.text, first)]

    @torch.inference_mode()
    def read_piece(self) -> bool:
        """Read a piece; whether there is more."""
        n_before, n_last = len(self.events) - 1, len(self._ids) - 1
        if n_before == n_last:
            return False
        device, dtype = find_place(self._model)
        if self._cache is None:
            self._cache = self._model.build_cache(1, device, dtype, n_last)
        began = time.perf_counter()
        n_tokens = min(self._budget.find(is_alone=False), n_last - n_before)
        ids = self._ids[n_before : n_before + n_tokens + 1]
        tokens = torch.tensor(ids, dtype=torch.long, device=device)
        hidden = self._model.extend_hidden(tokens[None, :-1], self._cache)[0]  # T C
        for begin in range(0, n_tokens, _ROWS):
            logits = self._model.compute_logits(hidden[begin : begin + _ROWS])
            targets = tokens[begin + 1 : begin + 1 + len(logits)]
            normalisers = measure_normalisers(logits)
            for found in read_logprobs(logits, normalisers, targets, self._n_alternatives):
                self.events.append(self._tell(found))
        self._budget.note(n_tokens, time.perf_counter() - began)
        return n_before + n_tokens < n_last

    def _tell(self, found: TokenLogprobs) -> TokenEvent:
        chosen = describe_token(found.token, found.logprob, self._tokenizer)
        others = (describe_token(t, at, self._tokenizer) for t, at in found.alternatives)
        return TokenEvent(chosen.text, chosen, tuple(others))
