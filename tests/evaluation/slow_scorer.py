"""The reference of the scoring tests: one continuation at a time, by a plain forward pass."""

from __future__ import annotations

import torch

from preflight.evaluation.items import Item, ItemScore, TaskKind
from preflight.models.protocol import LanguageModel
from preflight.settings import ModelConfig, ModelSettings
from preflight.tokenization import Tokenizer


def build_config(family: str, **changes: object) -> ModelConfig:
    settings = ModelSettings(
        model_size="custom",
        model_family=family,
        n_layers=2,
        n_heads=None if family == "mlp" else 4,
        n_embeddings=32,
        context_length=24,
        **changes,  # type: ignore[arg-type]
    )
    return settings.resolve(vocab_size=257)


def score_tokens(
    model: LanguageModel, context: list[int], tokens: list[int]
) -> tuple[float, bool, list[int]]:
    """Log-probability of `tokens` after `context`, whether greedy, and the rank of each."""
    total, greedy, ranks = 0.0, True, []
    for i, token in enumerate(tokens):
        seen = (context + tokens[:i])[-model.config.context_length :]
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0, -1].double()
        log_p = logits - torch.logsumexp(logits, 0)
        total += float(log_p[token])
        ranks.append(int((log_p > log_p[token]).sum()))
        greedy = greedy and ranks[-1] == 0
    return total, greedy, ranks


def score_slowly(
    model: LanguageModel, tokenizer: Tokenizer, kind: TaskKind, items: list[Item]
) -> list[ItemScore]:
    """The harness's rules, written down once more for tokenizers that never merge."""
    length = model.config.context_length
    scores = []
    for item in items:
        parts = []
        for continuation in item.continuations:
            tokens = tokenizer.encode(continuation).tolist()
            if kind == "pages":
                found, before = [], [tokenizer.end_of_text_id]
                for first in range(0, len(tokens), length):
                    window = tokens[first : first + length]
                    n_before = max(1, length + 1 - len(window))
                    found.append(score_tokens(model, before[-n_before:], window))
                    before += window
                parts.append((sum(f[0] for f in found), all(f[1] for f in found), len(tokens)))
                continue
            context = tokenizer.encode(item.context).tolist() or [tokenizer.end_of_text_id]
            context = context[-(length + 1 - len(tokens)) :]
            total, greedy, _ = score_tokens(model, context, tokens)
            parts.append((total, greedy, len(tokens)))
        scores.append(
            ItemScore(
                tuple(p[0] for p in parts),
                tuple(p[2] for p in parts),
                tuple(p[1] for p in parts),
            )
        )
    return scores
