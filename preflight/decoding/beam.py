"""Beam search: the most probable texts of N that are followed at once.

At each step every beam is continued by every token, and the N best of all continuations are kept.
A continuation that ends (with the end of text, a stop text or the last token) is finished if it is
among the N best. The search of a prompt ends when N are finished, as with `early_stopping=True` in
Hugging Face's `generate`. The score of a finished one is its log-probability over its length to the
power of the penalty; the length is that of the generated tokens alone, the last one included
(Wu et al. 2016, arXiv:1609.08144, section 7, with another length penalty).

Shapes: P prompts that are searched at once, N beams of each, R = P N rows, V vocabulary, K
candidates of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preflight.decoding.assembling import TextAssembler
from preflight.decoding.choosing import penalise_repetition
from preflight.decoding.completions import Generation, TokenLogprobs
from preflight.decoding.vocabulary import Vocabulary, list_ids_without_text
from preflight.decoding.windows import fit_prompts, prefill_windows, window_start
from preflight.models.protocol import LanguageModel
from preflight.settings import SamplingConfig


@dataclass(frozen=True)
class _Beam:
    """A text in the making. `total` is its log-probability; minus infinity: it holds a place."""

    tokens: tuple[int, ...] = ()  # generated
    total: float = 0.0
    parent: int = 0  # the beam that it continues
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A continuation of a beam by one token, with the log-probability of the whole."""

    total: float
    parent: int
    token: int
    logprobs: tuple[TokenLogprobs, ...]  # of the token, where asked for


@dataclass
class _Search:
    """The beams of one prompt, all of the same length, and what is finished, best first."""

    index: int
    prompt: list[int]
    beams: list[_Beam]
    finished: list[tuple[float, str, _Beam]] = field(default_factory=list)  # score, reason
    window_start: int | None = None  # of what the cache holds; None: nothing yet
    is_done: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens of prompt and beam."""
        return len(self.prompt) + len(self.beams[0].tokens)

    def read_text(self, beam: _Beam) -> list[int]:
        """The ids of prompt and beam."""
        return [*self.prompt, *beam.tokens]


@dataclass(frozen=True)
class _Endings:
    """When a beam ends, and what it is then."""

    tokenizer: Vocabulary
    config: SamplingConfig

    def find_reason(self, beam: _Beam) -> str:
        """Why the beam ends with its last token; empty when it goes on."""
        if beam.tokens[-1] == self.tokenizer.end_of_text_id:
            return "end"
        if self.config.stop:
            text = TextAssembler(self.config.stop)
            text.push(self.tokenizer.decode_bytes(beam.tokens))
            if text.stopped:
                return "stop"
        return "length" if len(beam.tokens) >= self.config.max_new_tokens else ""

    def measure_score(self, beam: _Beam) -> float:
        """What finished beams are compared by."""
        return float(beam.total / len(beam.tokens) ** self.config.length_penalty)

    def build_generation(self, score: float, reason: str, beam: _Beam) -> Generation:
        """The completion that a finished beam is."""
        ends = reason == "end"
        data = self.tokenizer.decode_bytes(beam.tokens[:-1] if ends else beam.tokens)
        text = TextAssembler(self.config.stop).push(data, final=True, cut=not ends)
        return Generation(text, len(beam.tokens), reason, beam.tokens, beam.logprobs, score)


class BeamSearcher:
    """Searches for the completions of prompts, `batch_size` prompts at a time.

    Args:
        model: computes in its own dtype, on its own device.
        tokenizer: says which ids end a text and which are never generated.
        prompts: token ids, at least one each.
        config: `beams`, `length_penalty`, `max_new_tokens`, `stop`, `repetition_penalty` (on the
            log-probabilities, as Hugging Face does) and `logprobs`; nothing is drawn.
        batch_size: prompts searched at once. The cache has `beams` rows for each.
        n_best: completions of each prompt, at most `beams`. That at place k of the prompt i has
            the index ``i * n_best + k``.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Vocabulary,
        prompts: Sequence[list[int]],
        config: SamplingConfig,
        batch_size: int,
        n_best: int = 1,
    ) -> None:
        self.model, self.config, self.n_best = model, config, n_best
        self._context = model.config.context_length
        self._endings = _Endings(tokenizer, config)
        # All but one beam hold a place at first, or each would have the same continuations.
        places = [_Beam(), *[_Beam(total=-math.inf)] * (config.beams - 1)]
        fitted = fit_prompts(prompts, self._context, config.max_new_tokens)
        searches = [_Search(index, ids, list(places)) for index, ids in fitted]
        self.rows, self._waiting = searches[:batch_size], searches[batch_size:][::-1]
        weight = next(iter(model.parameters()))
        self._device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(self._device.type):
            dtype = torch.get_autocast_dtype(self._device.type)
        self._vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self._banned = torch.tensor(
            list_ids_without_text(tokenizer), dtype=torch.long, device=self._device
        )
        with torch.inference_mode():
            self._cache = model.build_cache(
                len(self.rows) * config.beams,
                self._device,
                dtype,
                capacity=len(searches[0].prompt) + config.max_new_tokens,
            )

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Generation]]:
        """Continue every beam by one token; completions that are found with it, by index."""
        was_training = self.model.training
        try:
            if was_training:
                self.model.eval()
            candidates = self._find_candidates()
        finally:
            if was_training:
                self.model.train()
        for search, found in zip(self.rows, candidates, strict=True):
            self._advance(search, found)
        self._move_rows()
        ended = [search for search in self.rows if search.is_done]
        self._replace_ended()
        return [
            (search.index * self.n_best + place, self._endings.build_generation(*finished))
            for search in ended
            for place, finished in enumerate(search.finished[: self.n_best])
        ]

    def _find_candidates(self) -> list[list[_Candidate]]:
        """The 2 N best continuations of each prompt's beams, best first.

        Each beam ends in at most one of them with the end of text, so N of them go on.
        """
        N = self.config.beams
        beams = [beam for search in self.rows for beam in search.beams]
        totals = torch.tensor([[b.total] for b in beams], dtype=torch.float32)  # R 1
        totals = totals.to(self._device)
        self._prefill()
        last = [search.read_text(beam)[-1] for search in self.rows for beam in search.beams]
        logits = self.model.decode(torch.tensor(last, device=self._device), self._cache)
        logprobs = torch.log_softmax(logits.float(), dim=-1)[:, : self._vocab_size]  # R V
        if len(self._banned):
            logprobs[:, self._banned] = -torch.inf
        # The 2 N best of a prompt are among the 2 N best of each of its rows.
        scores = self._penalise(logprobs)
        values, ids = scores.topk(min(2 * N, self._vocab_size), dim=-1)  # R K
        K = ids.shape[1]
        best, places = (values + totals).view(-1, N * K).topk(min(2 * N, N * K), dim=-1)  # P 2N
        tokens = ids.view(-1, N * K).gather(1, places)  # P 2N
        details = self._read_logprobs(logprobs, tokens, places // K)
        columns = (best.tolist(), (places // K).tolist(), tokens.tolist(), details)
        return [
            [_Candidate(*each) for each in zip(*found, strict=True)]
            for found in zip(*columns, strict=True)
        ]

    def _penalise(self, logprobs: Tensor) -> Tensor:
        """The log-probabilities (R V) with the repetition penalty."""
        if self.config.repetition_penalty == 1:
            return logprobs
        seen = torch.zeros_like(logprobs, dtype=torch.bool)
        texts = [s.read_text(beam) for s in self.rows for beam in s.beams]
        for row, text in enumerate(texts):
            seen[row, torch.tensor(text, device=self._device)] = True
        penalised = penalise_repetition(logprobs, seen, self.config.repetition_penalty)
        return penalised.masked_fill_(logprobs == -torch.inf, -torch.inf)

    def _read_logprobs(
        self, logprobs: Tensor, tokens: Tensor, parents: Tensor
    ) -> list[list[tuple[TokenLogprobs, ...]]]:
        """The details of each candidate (P 2N) where they are asked for; else of none."""
        if self.config.logprobs is None:
            return [[()] * tokens.shape[1]] * tokens.shape[0]
        values, ids = logprobs.topk(self.config.logprobs, dim=-1)  # R alternatives
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        others = [tuple(zip(*row, strict=True)) for row in pairs]
        starts = torch.arange(len(tokens), device=self._device)[:, None] * self.config.beams
        rows = starts + parents  # P 2N
        chosen = logprobs[rows, tokens].tolist()
        return [
            [(TokenLogprobs(token, at, others[row]),) for token, at, row in zip(*each, strict=True)]
            for each in zip(tokens.tolist(), chosen, rows.tolist(), strict=True)
        ]

    def _advance(self, search: _Search, candidates: list[_Candidate]) -> None:
        """Choose the beams that go on, and note those that are finished."""
        N = self.config.beams
        running: list[_Beam] = []
        for rank, candidate in enumerate(candidates):
            if candidate.total == -math.inf or len(running) == N:
                break
            parent = search.beams[candidate.parent]
            beam = _Beam(
                (*parent.tokens, candidate.token),
                candidate.total,
                candidate.parent,
                parent.logprobs + candidate.logprobs,
            )
            reason = self._endings.find_reason(beam)
            if not reason:
                running.append(beam)
            elif rank < N:
                search.finished.append((self._endings.measure_score(beam), reason, beam))
        search.finished.sort(key=lambda item: -item[0])
        del search.finished[N:]
        search.is_done = len(search.finished) == N or not running
        if not search.is_done:
            place = dataclasses.replace(running[0], total=-math.inf)
            search.beams = running + [place] * (N - len(running))

    def _prefill(self) -> None:
        """Prefill all but the last token of each window that is new or has moved."""
        N = self.config.beams
        windows: dict[int, list[int]] = {}
        sources = list(range(N * len(self.rows)))
        for first, search in zip(sources[::N], self.rows, strict=True):
            start = window_start(search.n_tokens, self._context)
            if start == search.window_start:
                continue
            is_new = search.window_start is None  # its beams are alike: one is computed
            for row, beam in enumerate(search.beams[: 1 if is_new else N], first):
                windows[row] = search.read_text(beam)[start:-1]
            if is_new:
                sources[first : first + N] = [first] * N
            search.window_start = start
        prefill_windows(self.model, self._cache, windows, self._device)
        self._cache.copy_rows(sources)

    def _move_rows(self) -> None:
        """Put the cached tokens of each beam into its row: those of the beam that it continues."""
        N = self.config.beams
        sources = list(range(N * len(self.rows)))
        for first, search in zip(sources[::N], self.rows, strict=True):
            if not search.is_done:
                sources[first : first + N] = [first + beam.parent for beam in search.beams]
        self._cache.copy_rows(sources)

    def _replace_ended(self) -> None:
        """Give the rows of searches that ended to waiting prompts, or drop the rows."""
        N = self.config.beams
        for i, search in enumerate(self.rows):
            if search.is_done and self._waiting:
                self.rows[i] = self._waiting.pop()
        kept = [i for i, search in enumerate(self.rows) if not search.is_done]
        if kept and len(kept) < len(self.rows):
            self._cache.keep_rows([i * N + n for i in kept for n in range(N)])
        self.rows = [self.rows[i] for i in kept]
