"""Text from a model: which token comes next, the window it sees, and where a completion ends.

A row of the batch is one completion. In fp32 its text depends on its prompt, the settings and its
index alone, never on the rows beside it. In bf16 and fp16 a matmul's rounding for another number of
rows can choose another token. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.decoding.beam import BeamSearcher
from preflight.decoding.completions import Generation
from preflight.decoding.rows import Row
from preflight.decoding.rows import build_random as build_random
from preflight.decoding.stepping import Decoder, TokenChooser, find_place
from preflight.decoding.vocabulary import AnyIds, Vocabulary
from preflight.decoding.windows import PREFILL_TOKENS as PREFILL_TOKENS
from preflight.decoding.windows import fit_prompts, prefill_windows, window_start
from preflight.models.base import TokenModel
from preflight.models.building import build_on_meta
from preflight.models.protocol import LanguageModel
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer, load_saved_tokenizer
from preflight.training.merging import load_merged_weights
from preflight.training.resume import check_model, check_tokenizer

SAMPLE_TOKENS = 48  # of the text that a run generates at each evaluation


# Called after each step with the completions that ended in it, by index, and the tokens chosen.
OnStep = Callable[[list[tuple[int, Generation]], int], None]


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[TokenModel, Tokenizer]:
    """The model of a checkpoint, ready to generate, and its tokenizer.

    Raises:
        PreflightError: code CHECKPOINT, when its parts are damaged or do not belong together.
    """
    try:
        tokenizer = load_saved_tokenizer(checkpoint.path, checkpoint.config["tokenizer"])
    except PreflightError as error:  # there it is a flag's fault, here the checkpoint asks for it
        raise PreflightError(ExitCode.CHECKPOINT, f"{checkpoint.path}:", *error.lines) from None
    check_tokenizer(checkpoint, tokenizer)
    model = build_empty_model(checkpoint)
    model.load_state_dict(load_merged_weights(checkpoint, model), assign=True)
    model.bind_generate(_Generate(tokenizer))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer


def build_empty_model(checkpoint: Checkpoint) -> TokenModel:
    """The checkpoint's model on the meta device: shapes alone, for weights that come from a file.

    Raises:
        PreflightError: code CHECKPOINT, when the file cannot hold them.
    """
    check_model(checkpoint)
    return build_on_meta(checkpoint.model_config)


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SamplingConfig
) -> str:
    """What `model` generates after `prompt`; after an empty one, it starts a new text."""
    return generate_batch(model, tokenizer, [prompt], config)[0].text


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    on_step: OnStep | None = None,
    index: int = 0,
) -> Iterator[str]:
    """`generate_text` in pieces, as they are generated.

    A piece ends between two characters. What may be the start of a stop text is held back until
    it is known not to be. It is the text that `generate_batch` gives to the prompt at `index`.
    The text of a beam search is known at its end only: it is one piece.
    """
    if config.beams > 1:
        [completion] = generate_batch(model, tokenizer, [prompt], config, 1)
        if on_step:
            on_step([(index, completion)], completion.n_tokens)
        yield completion.text
        return
    yield from stream_ids(
        model, tokenizer, encode_prompt(tokenizer, prompt), config, on_step, index
    )


def stream_ids(
    model: LanguageModel,
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    config: SamplingConfig,
    on_step: OnStep | None = None,
    index: int = 0,
    stop_ids: frozenset[int] | None = None,
) -> Iterator[str]:
    """What follows one or more ids, in pieces, as `stream_text`; not for a beam search.

    `stop_ids` end it, and are no part of its text; unset: the end of text alone.
    """
    decoder = _Decoder(
        model, tokenizer, [list(token_ids)], config, 1, first_index=index, stop_ids=stop_ids
    )
    row = decoder.rows[0]
    while not row.finish_reason:
        ended = decoder.step()
        if on_step:
            on_step(ended, 1)
        if row.pieces[-1]:
            yield row.pieces[-1]


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    batch_size: int = 8,
    on_step: OnStep | None = None,
    n_best: int = 1,
) -> list[Generation]:
    """One completion for each prompt, in the order of the prompts.

    Args:
        model: computes in its own dtype, on its own device.
        tokenizer: the one that the model was trained with.
        prompts: may differ in length and may repeat; each draws random numbers of its own.
        config: how tokens are chosen.
        batch_size: completions generated at once. When one ends, the next prompt takes its place.
        on_step: told of progress; what it raises ends the generation.
        n_best: completions of each prompt in a beam search, at most its beams, best first.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return _complete(model, tokenizer, ids, config, batch_size, on_step, n_best)


def generate_ids(
    model: LanguageModel,
    token_ids: Tensor | Sequence[Sequence[int]],
    config: SamplingConfig,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
) -> list[list[int]]:
    """The ids that follow each row of ids: those of `generate_batch` on the same prompts.

    Args:
        model: computes in its own dtype, on its own device.
        token_ids: a tensor (B T), or rows of different lengths; rows are not padded.
        config: how tokens are chosen. `stop` needs the tokenizer.
        tokenizer: says which id ends a text and which ids are never generated. Without it every
            row gets `max_new_tokens` of any ids.
        batch_size: rows generated at once.

    Returns:
        What was chosen for each row, without the row itself, with the id that ended it.

    Raises:
        ValueError: not rows of ids of the model's vocabulary, or a row is empty and no tokenizer
            says what starts a text.
    """
    end = [] if tokenizer is None else [tokenizer.end_of_text_id]
    rows = [list(map(int, row)) or end for row in token_ids]
    vocab_size = model.config.vocab_size
    if not all(row and 0 <= min(row) <= max(row) < vocab_size for row in rows):
        raise ValueError(f"token_ids must be rows of one or more ids from 0 to {vocab_size - 1}")
    if tokenizer is None and config.stop:
        raise ValueError("a stop text can be found only with the tokenizer")
    known = tokenizer or AnyIds(vocab_size)
    return [list(done.tokens) for done in _complete(model, known, rows, config, batch_size)]


@dataclass(frozen=True)
class _Generate:
    """`generate_ids` with a tokenizer, for `TokenModel.generate`."""

    tokenizer: Tokenizer

    def __call__(
        self,
        model: LanguageModel,
        token_ids: Tensor | Sequence[Sequence[int]],
        config: SamplingConfig,
    ) -> list[list[int]]:
        return generate_ids(model, token_ids, config, self.tokenizer)

    def __deepcopy__(self, memo: object) -> _Generate:
        return self  # copies of a model share their tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Its ids. An empty prompt starts as every document does: after an end of text."""
    return tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text_id]


def _complete(
    model: LanguageModel,
    tokenizer: Vocabulary,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    batch_size: int,
    on_step: OnStep | None = None,
    n_best: int = 1,
) -> list[Generation]:
    """The completions of token ids, in the order of the prompts."""
    if not prompts:
        return []
    decoder: _Decoder | BeamSearcher
    if config.beams > 1:
        decoder = BeamSearcher(model, tokenizer, prompts, config, batch_size, n_best)
    else:
        decoder = _Decoder(model, tokenizer, prompts, config, batch_size)
    done: dict[int, Generation] = {}
    while decoder.rows:
        n_tokens = len(decoder.rows)
        ended = decoder.step()
        done.update(ended)
        if on_step:
            on_step(ended, n_tokens)
    return [done[index] for index in sorted(done)]


class _Decoder:
    """Completes prompts, `batch_size` at a time, by one token in each per step."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Vocabulary,
        prompts: Sequence[list[int]],
        config: SamplingConfig,
        batch_size: int,
        first_index: int = 0,
        stop_ids: frozenset[int] | None = None,
    ) -> None:
        self.model, self.config = model, config
        stops = frozenset([tokenizer.end_of_text_id]) if stop_ids is None else stop_ids
        self._context = model.config.context_length
        fitted = fit_prompts(prompts, self._context, config.max_new_tokens)
        rows = [Row(first_index + i, ids, tokenizer, config, stops) for i, ids in fitted]
        self.rows, self._waiting = rows[:batch_size], rows[batch_size:][::-1]
        self._device, dtype = find_place(model)
        self._chooser = TokenChooser(model, tokenizer, stops, self._device)
        with torch.inference_mode():
            cache = model.build_cache(
                len(self.rows),
                self._device,
                dtype,
                capacity=len(rows[0].tokens) + config.max_new_tokens,
            )
        self._decoder = Decoder(model, cache)
        self._newest: Tensor | None = None  # the rows' last tokens, while they are on the device
        self._seen: Tensor | None = None  # which ids (B V) each row holds, for the penalty

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Generation]]:
        """Choose one token in each row; the completions that ended with it, by index."""
        was_training = self.model.training
        try:
            if was_training:
                self.model.eval()
            self._newest = self._choose()
        finally:
            if was_training:
                self.model.train()
        for row, token in zip(self.rows, self._newest.tolist(), strict=True):
            row.accept(token)
        ended = [(row.index, row.result()) for row in self.rows if row.finish_reason]
        if ended:
            self._replace_ended()
        return ended

    def _choose(self) -> Tensor:
        # Everything that comes from the host goes to the device before the long work starts.
        if self._newest is None:
            last = [row.tokens[-1] for row in self.rows]
            self._newest = torch.tensor(last, device=self._device)
        uniforms = self._chooser.draw(self.rows, self.config)
        if self._seen is None:
            self._seen = self._chooser.find_seen(self.rows, self.config)
        self._prefill_windows()
        with self._decoder.threads():
            logits = self._decoder.decode(self._newest)
            return self._chooser.choose(logits, self.rows, self.config, uniforms, self._seen)

    def _prefill_windows(self) -> None:
        """Prefill all but the last token of each window that is new or has moved."""
        windows: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            start = window_start(len(row.tokens), self._context)
            if row.window_start != start:
                windows[i], row.window_start = row.tokens[start:-1], start
        prefill_windows(self.model, self._decoder.cache, windows, self._device)

    def _replace_ended(self) -> None:
        """Give the rows of completions that ended to waiting prompts, or drop the rows."""
        for i, row in enumerate(self.rows):
            if row.finish_reason and self._waiting:
                self.rows[i] = self._waiting.pop()
        kept = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if kept and len(kept) < len(self.rows):
            self._decoder.cache.keep_rows(kept)
            self._decoder = Decoder(self.model, self._decoder.cache)
        self.rows = [self.rows[i] for i in kept]
        self._newest = self._seen = None
