"""Asks transformers, where it is installed, for its ids, logits and greedy tokens of an export."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.damage import first_line
from preflight.core.errors import PreflightError
from preflight.formats.proof import (
    N_GREEDY,
    PROMPTS,
    build_from,
    build_texts,
    continue_greedily,
    draw_ids,
    proof_error,
)
from preflight.formats.protocol import OutgoingModel
from preflight.formats.tokenizer_export import list_special_tokens
from preflight.models.base import TokenModel
from preflight.tokenization.huggingface import HuggingFaceTokenizer

_N_TEXTS = 300
# Of the largest logit: what two orders of the same sums in fp32 leave of a model of 30 layers.
_BOUND = 1e-4
_CHAT = [{"role": "user", "content": "Hello"}]


def ask_transformers(meant: OutgoingModel, path: Path) -> list[str]:
    """Compare what transformers makes of a folder with the model that was meant.

    Returns:
        What was found, in lines; that it was not asked, where it is not installed.

    Raises:
        PreflightError: code CHECK_FAILED.
    """
    if importlib.util.find_spec("transformers") is None:
        return ["transformers is not installed here and was not asked"]
    transformers: Any = importlib.import_module("transformers")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        faults = [f"{k} {v}" for k, v in info.items() if v and k != "error_msgs"]
        if faults:
            raise proof_error(f"transformers finds {faults[0][:200]}")
        lines = [_compare_ids(meant, tokenizer)]
        if meant.chat_template is not None:
            lines.append(_compare_chat(tokenizer))
        ours = build_from(meant.config, meant.weights)
        return [*lines, *_compare_model(meant, ours, theirs.eval())]
    except (PreflightError, MemoryError):
        raise
    except Exception as error:  # whatever it raises, the export is not what it can use
        raise proof_error(f"transformers fails on it: {first_line(error)}") from None


def _compare_ids(meant: OutgoingModel, tokenizer: Any) -> str:
    """Ids as `tokenizer(text)` gives them, with whatever it puts before a text."""
    special = list_special_tokens(meant.tokenizer)
    keeps_file = isinstance(meant.tokenizer, HuggingFaceTokenizer)
    texts = [
        text
        for text in build_texts(meant.tokenizer, _N_TEXTS, seed=1)
        if not any(name in text for name in special)  # which it takes for special tokens
    ]
    before: list[int] = []
    for number, text in enumerate(texts):
        ours, found = meant.tokenizer.encode(text).tolist(), tokenizer(text).input_ids
        if number == 0 and keeps_file and found[1:] == ours and found[0] in special.values():
            before = found[:1]  # as the tokenizer that was imported does
        if found != before + ours:
            raise proof_error(
                f"transformers gives other ids for {text[:40]!r}",
                f"ours: {ours[:8]}, there: {found[:8]}",
            )
    told = f", each after the token {before[0]}" if before else ""
    return f"transformers: the ids of {len(texts)} texts are equal{told}"


def _compare_chat(tokenizer: Any) -> str:
    """The template is rendered, and no token that begins a text is doubled."""
    text = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    found = tokenizer.apply_chat_template(_CHAT, tokenize=True, add_generation_prompt=True)
    ids = found if isinstance(found, list) else found["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise proof_error(f"a chat begins with the token {ids[0]} twice")
    return f"transformers: a chat begins with the ids {ids[:8]}, {text[:40]!a}"


def _compare_model(meant: OutgoingModel, ours: TokenModel, theirs: Any) -> list[str]:
    rows = draw_ids(meant.config, seed=1)
    with torch.inference_mode():
        first, second = ours(rows), theirs(rows).logits
    gap, scale = float((first - second).abs().max()), max(1.0, float(first.abs().max()))
    if not gap <= _BOUND * scale:
        raise proof_error(f"the logits of transformers differ by {gap:.2g}")
    encoded = [meant.tokenizer.encode(text).tolist() for text in _choose_prompts(meant)]
    prompts = [ids for ids in encoded if ids][: len(PROMPTS)]
    n_equal = [_count_equal(ours, theirs, ids, _BOUND * scale) for ids in prompts]
    n_tokens = min(N_GREEDY, *(meant.config.context_length - len(ids) for ids in prompts))
    return [
        f"transformers: the logits of {rows.numel()} tokens differ by {gap:.2g} at most",
        f"transformers: {min(n_equal)} of {n_tokens} greedy tokens are equal at least, on "
        f"{len(prompts)} prompts",
    ]


def _choose_prompts(meant: OutgoingModel) -> list[str]:
    """Prompts that the tokenizer has ids for and that leave room for an answer."""
    known = getattr(meant.tokenizer, "characters", None)
    texts = [text for text in PROMPTS if known is None or set(text) <= set(known)]
    room = max(1, meant.config.context_length - N_GREEDY)
    fitting = [text for text in texts if len(meant.tokenizer.encode(text)) <= room]
    return fitting or [build_texts(meant.tokenizer, 1)[0][:1]]


def _count_equal(ours: TokenModel, theirs: Any, prompt: list[int], bound: float) -> int:
    """Greedy tokens that are equal; PreflightError where one differs that is no tie."""
    count = min(N_GREEDY, ours.config.context_length - len(prompt))
    chosen = continue_greedily(ours, prompt, count)
    with torch.inference_mode():
        logits: Tensor = theirs(torch.tensor([prompt + chosen[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.max(dim=-1).values
    for number, token in enumerate(chosen):
        if float(best[number] - logits[number, token]) > 2 * bound:
            raise proof_error(f"transformers continues otherwise after {number} greedy tokens")
    return sum(float(logits[i, token]) == float(best[i]) for i, token in enumerate(chosen))
