"""Text from a model: which token comes next, the window it sees, and where a completion ends.

A row of the batch is one completion. In fp32 its text depends on its prompt, the settings and its
index alone, never on the rows beside it. In bf16 and fp16 a matmul's rounding for another number of
rows can choose another token. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.decoding.assembling import TextAssembler
from preflight.decoding.beam import BeamSearcher
from preflight.decoding.choosing import choose_tokens, is_greedy
from preflight.decoding.completions import Generation, TokenLogprobs
from preflight.decoding.logprobs import measure_normalisers, read_logprobs
from preflight.decoding.vocabulary import AnyIds, Vocabulary, list_ids_without_text
from preflight.decoding.windows import PREFILL_TOKENS as PREFILL_TOKENS
from preflight.decoding.windows import fit_prompts, prefill_windows, window_start
from preflight.models.base import TokenModel
from preflight.models.building import build_on_meta
from preflight.models.graph_decoder import GraphDecoder
from preflight.models.kv_cache import KVCache
from preflight.models.protocol import LanguageModel
from preflight.models.single_row import SingleRowDecoder, one_torch_thread
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
    ids = [encode_prompt(tokenizer, prompt)]
    decoder = _Decoder(model, tokenizer, ids, config, batch_size=1, first_index=index)
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


def build_random(seed: int, index: int) -> random.Random:
    """The random numbers of the completion at `index`. No two pairs of seed and index share them.

    Python's generator gives the same numbers on every device. It hashes a text with SHA-512, into
    a larger number than any seed. The first completion has the numbers of the seed itself.
    """
    return random.Random(f"{seed} {index}" if index else seed)


class _Row:
    """One completion in the making: its tokens, its random numbers, its text."""

    def __init__(
        self, index: int, prompt_ids: list[int], tokenizer: Vocabulary, config: SamplingConfig
    ) -> None:
        self.index = index
        self.tokens = prompt_ids
        self.window_start: int | None = None  # of what the cache holds; None: nothing yet
        self.random = build_random(config.seed, index)
        self.pieces: list[str] = []  # one a token, often empty
        self.logprobs: list[TokenLogprobs] = []  # one a token, where they are asked for
        self.finish_reason = ""
        self._tokenizer = tokenizer
        self._max_new_tokens = config.max_new_tokens
        self._text = TextAssembler(config.stop)

    def accept(self, token: int) -> None:
        """Append the token that was chosen, and decide whether the completion ends with it."""
        self.tokens.append(token)
        ends = token == self._tokenizer.end_of_text_id
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
    ) -> None:
        self.model, self.config = model, config
        self._context = model.config.context_length
        fitted = fit_prompts(prompts, self._context, config.max_new_tokens)
        rows = [_Row(first_index + index, ids, tokenizer, config) for index, ids in fitted]
        self.rows, self._waiting = rows[:batch_size], rows[batch_size:][::-1]
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
                len(self.rows),
                self._device,
                dtype,
                capacity=len(rows[0].tokens) + config.max_new_tokens,
            )
        self._fast = _find_fast_decoder(model, self._cache)
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
        uniforms = None
        if not is_greedy(self.config):
            numbers = [row.random.random() for row in self.rows]
            uniforms = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        if self._seen is None and self.config.repetition_penalty != 1:
            shape = (len(self.rows), self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            for i, row in enumerate(self.rows):
                self._seen[i, torch.tensor(row.tokens, device=self._device)] = True
        self._prefill_windows()
        in_numpy = isinstance(self._fast, SingleRowDecoder)
        with one_torch_thread() if in_numpy else contextlib.nullcontext():
            if self._fast:
                logits = self._fast.decode(self._newest)
            else:
                logits = self.model.decode(self._newest, self._cache)
            asked = self.config.logprobs
            normalisers = None if asked is None else measure_normalisers(logits)
            logits = logits[:, : self._vocab_size]  # B V
            if len(self._banned):
                logits[:, self._banned] = -torch.inf
            ids = choose_tokens(logits, self.config, uniforms, self._seen)
        if asked is not None and normalisers is not None:
            details = read_logprobs(logits, normalisers, ids, asked)
            for row, detail in zip(self.rows, details, strict=True):
                row.logprobs.append(detail)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids

    def _prefill_windows(self) -> None:
        """Prefill all but the last token of each window that is new or has moved."""
        windows: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            start = window_start(len(row.tokens), self._context)
            if row.window_start != start:
                windows[i], row.window_start = row.tokens[start:-1], start
        prefill_windows(self.model, self._cache, windows, self._device)

    def _replace_ended(self) -> None:
        """Give the rows of completions that ended to waiting prompts, or drop the rows."""
        for i, row in enumerate(self.rows):
            if row.finish_reason and self._waiting:
                self.rows[i] = self._waiting.pop()
        kept = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if kept and len(kept) < len(self.rows):
            self._cache.keep_rows(kept)
            self._fast = _find_fast_decoder(self.model, self._cache)
        self.rows = [self.rows[i] for i in kept]
        self._newest = self._seen = None


def _find_fast_decoder(
    model: LanguageModel, cache: KVCache
) -> SingleRowDecoder | GraphDecoder | None:
    """What decodes faster than `model.decode`, if the model has such a thing."""
    build = getattr(model, "fast_decoder", None)
    return None if build is None else build(cache)
