"""Log-probabilities of chosen tokens, and of what else was probable.

Shapes: B rows, V vocabulary of the model, N alternatives.
"""

from __future__ import annotations

from torch import Tensor

from preflight.decoding.completions import TokenLogprobs


def measure_normalisers(logits: Tensor) -> Tensor:
    """What is taken from a row of logits (B V) to make log-probabilities of them: (B 1), fp32.

    It is measured before any id is left out, so that they are the model's own.
    """
    return logits.float().logsumexp(dim=-1, keepdim=True)


def read_logprobs(
    logits: Tensor, normalisers: Tensor, ids: Tensor, n_alternatives: int
) -> list[TokenLogprobs]:
    """The log-probability of one id (B,) of each row, and the most probable alternatives.

    Args:
        logits: scores (B V or fewer), minus infinity for ids that are never generated.
        normalisers: of all V logits, from `measure_normalisers`.
        ids: the chosen ones.
        n_alternatives: how many, at most the columns of `logits`.
    """
    chosen = logits.gather(1, ids[:, None]).float() - normalisers  # B 1
    values, others = logits.topk(n_alternatives, dim=-1)  # B N
    values = values.float() - normalisers
    rows = zip(ids.tolist(), chosen[:, 0].tolist(), others.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(near, at, strict=True)))
        for token, logprob, near, at in rows
    ]
