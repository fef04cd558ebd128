"""A completion in the making: its tokens, its random numbers, its text."""

from __future__ import annotations

import random

from preflight.decoding.assembling import TextAssembler
from preflight.decoding.completions import Generation, TokenLogprobs
from preflight.decoding.vocabulary import Vocabulary
from preflight.settings import SamplingConfig


def build_random(seed: int, index: int) -> random.Random:
    """The random numbers of the completion at `index`. No two pairs of seed and index share them.

    Python's generator gives the same numbers on every device. It hashes a text with SHA-512, into
    a larger number than any seed. The first completion has the numbers of the seed itself.
    """
    return random.Random(f"{seed} {index}" if index else seed)


class Row:
    """One completion in the making: its tokens, its random numbers, its text."""

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        tokenizer: Vocabulary,
        config: SamplingConfig,
        stop_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.tokens = prompt_ids
        self.window_start: int | None = None  # of what the cache holds; None: nothing yet
        self.random = build_random(config.seed, index)
        self.pieces: list[str] = []  # one a token, often empty
        self.logprobs: list[TokenLogprobs] = []  # one a token, where they are asked for
        self.finish_reason = ""
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._max_new_tokens = config.max_new_tokens
        self._text = TextAssembler(config.stop)

    def accept(self, token: int) -> None:
        """Append the token that was chosen, and decide whether the completion ends with it."""
        self.tokens.append(token)
        ends = token in self._stop_ids
        last = ends or len(self.pieces) + 1 >= self._max_new_tokens
        data = b"" if ends else self._tokenizer.decode_bytes([token])
        self.pieces.append(self._text.push(data, final=last, cut=not ends))
        if self._text.stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "end" if ends else "length"

    def result(self) -> Generation:
        """The completion so far."""
        n_tokens = len(self.pieces)
        tokens, logprobs = tuple(self.tokens[len(self.tokens) - n_tokens :]), tuple(self.logprobs)
        return Generation("".join(self.pieces), n_tokens, self.finish_reason, tokens, logprobs)
