"""Text from a model: which token comes next, the window it sees, and where a completion ends.

A row of the batch is one completion. In fp32 its text depends on its prompt, the settings and its
index alone, never on the rows beside it. In bf16 and fp16 a matmul's rounding for another number of
rows can choose another token. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.checkpoints.format import Checkpoint, load_weights
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log_once
from preflight.decoding.assembling import TextAssembler
from preflight.decoding.choosing import choose_tokens, is_greedy
from preflight.models.base import TokenModel
from preflight.models.building import build_on_meta
from preflight.models.graph_decoder import GraphDecoder
from preflight.models.kv_cache import KVCache
from preflight.models.protocol import LanguageModel
from preflight.models.single_row import SingleRowDecoder, one_torch_thread
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer, load_saved_tokenizer
from preflight.training.resume import check_model, check_tokenizer

SAMPLE_TOKENS = 48  # of the text that a run generates at each evaluation
# Tokens that go through the model at once in a prefill; bounds the memory of activations.
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Generation:
    """A completion: what follows the prompt, and why it ends there."""

    text: str
    n_tokens: int  # chosen, the one that ended the completion included
    finish_reason: str  # "stop": a stop text came; "end": of text; "length": max_new_tokens


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
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(load_weights(checkpoint, shapes), assign=True)
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
    """
    decoder = _Decoder(model, tokenizer, [prompt], config, batch_size=1, first_index=index)
    row = decoder.rows[0]
    while not row.finish_reason:
        ended = decoder.step()
        if on_step:
            on_step([(row.index, row.result()) for row in ended], 1)
        if row.pieces[-1]:
            yield row.pieces[-1]


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """One completion for each prompt, in the order of the prompts.

    Args:
        model: computes in its own dtype, on its own device.
        tokenizer: the one that the model was trained with.
        prompts: may differ in length and may repeat; each draws random numbers of its own.
        config: how tokens are chosen.
        batch_size: completions generated at once. When one ends, the next prompt takes its place.
        on_step: told of progress; what it raises ends the generation.
    """
    if not prompts:
        return []
    decoder = _Decoder(model, tokenizer, prompts, config, batch_size)
    done: dict[int, Generation] = {}
    while decoder.rows:
        n_tokens = len(decoder.rows)
        ended = [(row.index, row.result()) for row in decoder.step()]
        done.update(ended)
        if on_step:
            on_step(ended, n_tokens)
    return [done[index] for index in range(len(prompts))]


def build_random(seed: int, index: int) -> random.Random:
    """The random numbers of the completion at `index`. No two pairs of seed and index share them.

    Python's generator gives the same numbers on every device. It hashes a text with SHA-512, into
    a larger number than any seed. The first completion has the numbers of the seed itself.
    """
    return random.Random(f"{seed} {index}" if index else seed)


def window_start(n_tokens: int, context_length: int) -> int:
    """First token that the model sees of a text of `n_tokens`.

    GPT-2's positions are learned and absolute, so a cache cannot be shifted. When the window is
    full, it moves on by a quarter and is prefilled again, which costs three tokens for each one
    generated. Moving on by one token at a time would cost the whole window for each.
    """
    excess = n_tokens - context_length
    stride = max(1, context_length // 4)
    return -(-excess // stride) * stride if excess > 0 else 0


class _Row:
    """One completion in the making: its tokens, its random numbers, its text."""

    def __init__(
        self, index: int, prompt_ids: list[int], tokenizer: Tokenizer, config: SamplingConfig
    ) -> None:
        self.index = index
        self.tokens = prompt_ids
        self.window_start: int | None = None  # of what the cache holds; None: nothing yet
        self.random = build_random(config.seed, index)
        self.pieces: list[str] = []  # one a token, often empty
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
        return Generation("".join(self.pieces), len(self.pieces), self.finish_reason)


class _Decoder:
    """Completes prompts, `batch_size` at a time, by one token in each per step."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        config: SamplingConfig,
        batch_size: int,
        first_index: int = 0,
    ) -> None:
        self.model, self.config = model, config
        self._context = model.config.context_length
        rows = self._build_rows(prompts, tokenizer, first_index)
        self.rows, self._waiting = rows[:batch_size], rows[batch_size:][::-1]
        weight = next(iter(model.parameters()))
        self._device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(self._device.type):
            dtype = torch.get_autocast_dtype(self._device.type)
        self._vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self._banned = torch.tensor(
            _list_ids_without_text(tokenizer), dtype=torch.long, device=self._device
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

    def _build_rows(
        self, prompts: Sequence[str], tokenizer: Tokenizer, first_index: int
    ) -> list[_Row]:
        rows = []
        for index, prompt in enumerate(prompts, first_index):
            # An empty prompt starts as every document does: after an end of text.
            ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text_id]
            if len(ids) > self._context:
                log_once(
                    f"a prompt is longer than the context: its last {self._context:,} "
                    "tokens are used"
                )
            rows.append(_Row(index, ids[-self._context :], tokenizer, self.config))
        # Longest first: windows that are prefilled together then need little padding.
        rows.sort(key=lambda row: -len(row.tokens))
        if len(rows[0].tokens) + self.config.max_new_tokens > self._context:
            log_once(
                f"past {self._context:,} tokens the window slides: the start of the text "
                "leaves the model's context"
            )
        return rows

    @torch.inference_mode()
    def step(self) -> list[_Row]:
        """Choose one token in each row; returns the rows that ended with it."""
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
        ended = [row for row in self.rows if row.finish_reason]
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
            logits = logits[:, : self._vocab_size]  # B V
            if len(self._banned):
                logits[:, self._banned] = -torch.inf
            ids = choose_tokens(logits, self.config, uniforms, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids

    def _prefill_windows(self) -> None:
        """Prefill all but the last token of each window that is new or has moved."""
        starts = [window_start(len(row.tokens), self._context) for row in self.rows]
        moved = [i for i, row in enumerate(self.rows) if row.window_start != starts[i]]
        moved.sort(key=lambda i: len(self.rows[i].tokens) - starts[i])
        while moved:
            longest = len(self.rows[moved[-1]].tokens) - starts[moved[-1]] - 1
            n_rows = max(1, PREFILL_TOKENS // max(1, longest))
            part, moved = sorted(moved[-n_rows:]), moved[:-n_rows]
            windows = [self.rows[i].tokens[starts[i] : -1] for i in part]
            padded = [window + [0] * (longest - len(window)) for window in windows]
            tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
            self.model.prefill(tokens, self._cache, part, [len(window) for window in windows])
            for i in part:
                self.rows[i].window_start = starts[i]

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


@functools.cache
def _list_ids_without_text(tokenizer: Tokenizer) -> list[int]:
    """Ids never generated: gaps in the vocabulary, special tokens other than the end of text."""
    ids = range(tokenizer.vocab_size)
    return [i for i in ids if tokenizer.token_bytes(i) is None and i != tokenizer.end_of_text_id]
