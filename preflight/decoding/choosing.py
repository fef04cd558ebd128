"""Choosing the next token from logits.

Shapes: B rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preflight.settings import SamplingConfig

# Below this temperature every other token's probability underflows in fp32.
COLDEST_TEMPERATURE = 1e-6


def choose_tokens(
    logits: Tensor, config: SamplingConfig, uniforms: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """One id (B,) for each row, drawn by inverting the cumulative distribution.

    Args:
        logits: scores (B V).
        config: filters, in this order: repetition penalty, temperature, top-k, top-p,
            min-p.
        uniforms: random numbers (B,) in [0, 1]; unused, and may be None, when greedy.
        seen: which ids (B V) the penalty falls on.
    """
    scores = logits.float()
    if seen is not None:
        scores = penalise_repetition(scores, seen, config.repetition_penalty)
    if is_greedy(config):
        if scores.device.type == "cpu":  # numpy compares several at once, torch one
            return torch.from_numpy(scores.numpy().argmax(axis=-1))
        return scores.argmax(dim=-1)
    assert uniforms is not None
    probabilities, ids = filter_probabilities(scores, config)
    cumulative = probabilities.cumsum(dim=-1)  # B K
    # Slightly below the total, whatever the rounding: an id of probability 0 is never drawn.
    threshold = uniforms[:, None] * cumulative[:, -1:] * (1 - 2**-22)
    index = (cumulative <= threshold).sum(dim=-1, keepdim=True)  # B 1
    return (index if ids is None else ids.gather(1, index)).squeeze(1)


def is_greedy(config: SamplingConfig) -> bool:
    """Whether the most probable token is always taken."""
    return not config.do_sample or config.temperature < COLDEST_TEMPERATURE


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores (B V) with those of `seen` ids made less likely (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1; negative ones are multiplied, as Hugging Face does).
    """
    penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, penalised.clamp(-1e30, 1e30), scores)


def filter_probabilities(scores: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Temperature, top-k, top-p and min-p applied to scores (B V).

    Returns:
        Weights of the candidates (B K), which add up to the share that is left, and their ids
        (B K); None for ids 0 to V - 1 in order. Equal scores at the k-th place: k ids are kept.
    """
    ids = None
    if config.top_k and config.top_k < scores.shape[1]:
        scores, ids = scores.topk(config.top_k, dim=-1)
    elif config.top_p < 1:
        scores, ids = scores.sort(dim=-1, descending=True)
    # The maximum goes first: a low temperature must not push it to infinity.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / config.temperature
    probabilities = torch.softmax(scores, dim=-1)
    if config.top_p < 1:
        # Kept while those before it do not reach p; the first always is (Holtzman et al. 2019).
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    if config.min_p > 0:  # Nguyen et al. 2024, arXiv:2407.01082
        least = config.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities, ids
