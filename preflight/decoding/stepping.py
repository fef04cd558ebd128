"""A step of decoding: from the last token of each row to its next one.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from preflight.decoding.choosing import choose_tokens, is_greedy
from preflight.decoding.logprobs import measure_normalisers, read_logprobs
from preflight.decoding.rows import Row
from preflight.decoding.vocabulary import Vocabulary, list_ids_without_text
from preflight.models.graph_decoder import GraphDecoder
from preflight.models.kv_cache import KVCache
from preflight.models.protocol import LanguageModel
from preflight.models.single_row import SingleRowDecoder, one_torch_thread
from preflight.settings import SamplingConfig


def find_place(model: LanguageModel) -> tuple[torch.device, torch.dtype]:
    """Where the model is, and what its cache is to be in."""
    weight = next(iter(model.parameters()))
    if torch.is_autocast_enabled(weight.device.type):
        return weight.device, torch.get_autocast_dtype(weight.device.type)
    return weight.device, weight.dtype


class Decoder:
    """Decodes into the rows of a cache, by the fastest of the model's ways."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self._model, self.cache = model, cache
        self._fast = find_fast_decoder(model, cache)

    def decode(self, newest: Tensor) -> Tensor:
        """Append one token (B,) to every row; logits (B V), valid until the next call."""
        if self._fast:
            return self._fast.decode(newest)
        return self._model.decode(newest, self.cache)

    def threads(self) -> contextlib.AbstractContextManager[None]:
        """The threads that suit this way, for a step with all that belongs to it."""
        in_numpy = isinstance(self._fast, SingleRowDecoder) and self._fast.multiplies_in_numpy
        return one_torch_thread() if in_numpy else contextlib.nullcontext()

    @property
    def is_in_numpy(self) -> bool:
        """Whether numpy decodes, and not torch."""
        return isinstance(self._fast, SingleRowDecoder)


def find_fast_decoder(
    model: LanguageModel, cache: KVCache
) -> SingleRowDecoder | GraphDecoder | None:
    """What decodes faster than `model.decode`, if the model has such a thing."""
    build = getattr(model, "fast_decoder", None)
    return None if build is None else build(cache)


class TokenChooser:
    """Chooses the next token of rows that share their sampling settings.

    Args:
        model: whose logits they are.
        vocabulary: says which ids are never generated.
        stop_ids: may be generated, whether or not they have a text.
        device: where the logits are.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        stop_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self._vocab_size = min(vocabulary.vocab_size, model.config.vocab_size)
        banned = [i for i in list_ids_without_text(vocabulary) if i not in stop_ids]
        self._banned = torch.tensor(banned, dtype=torch.long, device=device)
        self._device = device

    def draw(self, rows: Sequence[Row], config: SamplingConfig) -> Tensor | None:
        """A random number (B,) for each row; None where none is needed."""
        if is_greedy(config):
            return None
        numbers = [row.random.random() for row in rows]
        return torch.tensor(numbers, dtype=torch.float32, device=self._device)

    def find_seen(self, rows: Sequence[Row], config: SamplingConfig) -> Tensor | None:
        """Which ids (B V) each row holds, for the penalty; None where there is none."""
        if config.repetition_penalty == 1:
            return None
        shape = (len(rows), self._vocab_size)
        seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        for i, row in enumerate(rows):
            seen[i, torch.tensor(row.tokens, device=self._device)] = True
        return seen

    def choose(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        config: SamplingConfig,
        uniforms: Tensor | None,
        seen: Tensor | None,
    ) -> Tensor:
        """One id (B,) for each row of logits (B V), which are changed. The rows get their
        log-probabilities where they are asked for, and `seen` gets the ids.
        """
        asked = config.logprobs
        normalisers = None if asked is None else measure_normalisers(logits)
        logits = logits[:, : self._vocab_size]
        if len(self._banned):
            logits[:, self._banned] = -torch.inf
        ids = choose_tokens(logits, config, uniforms, seen)
        if asked is not None and normalisers is not None:
            details = read_logprobs(logits, normalisers, ids, asked)
            for row, detail in zip(rows, details, strict=True):
                row.logprobs.append(detail)
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        return ids
