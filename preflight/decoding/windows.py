"""The window of a text that the model sees, and how windows enter the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preflight.core.log import log_once
from preflight.models.kv_cache import KVCache
from preflight.models.protocol import LanguageModel

# Tokens that go through the model at once in a prefill; bounds the memory of activations.
PREFILL_TOKENS = 8192


def window_start(n_tokens: int, context_length: int) -> int:
    """First token that the model sees of a text of `n_tokens`.

    GPT-2's positions are learned and absolute, so a cache cannot be shifted. When the window is
    full, it moves on by a quarter and is prefilled again, which costs three tokens for each one
    generated. Moving on by one token at a time would cost the whole window for each.
    """
    excess = n_tokens - context_length
    stride = max(1, context_length // 4)
    return -(-excess // stride) * stride if excess > 0 else 0


def fit_prompts(
    prompts: Sequence[list[int]], context_length: int, max_new_tokens: int
) -> list[tuple[int, list[int]]]:
    """The end of each prompt that fits into the context, with the prompt's index.

    Longest first: windows that are prefilled together then need little padding.
    """
    fitted = []
    for index, ids in enumerate(prompts):
        if len(ids) > context_length:
            log_once(
                f"a prompt is longer than the context: its last {context_length:,} tokens are used"
            )
        fitted.append((index, ids[-context_length:]))
    fitted.sort(key=lambda item: -len(item[1]))
    if len(fitted[0][1]) + max_new_tokens > context_length:
        log_once(
            f"past {context_length:,} tokens the window slides: the start of the text leaves the "
            "model's context"
        )
    return fitted


def prefill_windows(
    model: LanguageModel, cache: KVCache, windows: dict[int, list[int]], device: torch.device
) -> None:
    """Put token ids into rows of `cache`, `windows` by row, in place of what they held."""
    waiting = sorted(windows, key=lambda row: len(windows[row]))
    while waiting:
        longest = len(windows[waiting[-1]])
        n_rows = max(1, PREFILL_TOKENS // max(1, longest))
        part, waiting = sorted(waiting[-n_rows:]), waiting[:-n_rows]
        padded = [windows[row] + [0] * (longest - len(windows[row])) for row in part]
        tokens = torch.tensor(padded, dtype=torch.long, device=device)
        model.prefill(tokens, cache, part, [len(windows[row]) for row in part])
