"""Causal attention of a whole window, by what is fastest on the device.

Shapes: B sequences, H heads, K heads of keys and values, each for G = H / K queries' heads, T
tokens, D size of a head, N = B K matrices at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries whose scores are held at once. No score of a later block of keys is computed.
BLOCK_QUERIES = 256


def attend_causally(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each token and those before it (Vaswani et al. 2017,
    arXiv:1706.03762, equation 1).

    In bf16 on a CPU torch's own kernel takes up to four times as long as plain matmuls of all heads
    (benchmarks/LOG.md); those round the scores to bf16, where the kernel keeps them in fp32.

    Args:
        q: queries (B H T D).
        k: keys (B K T D), K a divisor of H.
        v: values, as `k`.
        dropout: probability with which a weight is left out.

    Returns:
        (B H T D), in the type of `q`.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        return _BlockedAttention.apply(q, k, v)
    is_grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=is_grouped
    )


class _BlockedAttention(torch.autograd.Function):
    """Block by block of the queries. The backward pass computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        heads = q.reshape(-1, H // k.shape[1], T, D)  # N G T D
        k, v = k.reshape(-1, T, D), v.reshape(-1, T, D)  # N T D
        out = torch.empty_like(heads)
        for rows in _split_queries(T):
            weights = _compute_weights(heads[:, :, rows], k[:, : rows.stop])
            mixed = weights @ v[:, : rows.stop]
            out[:, :, rows] = mixed.view(out[:, :, rows].shape)
        ctx.save_for_backward(heads, k, v)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        heads, k, v = ctx.saved_tensors
        N, G, T, D = heads.shape
        grad_out = grad_outputs[0]
        B, H = grad_out.shape[:2]
        grad_out = grad_out.reshape(N, G, T, D)
        grad_q = torch.empty_like(heads)
        blocks = _split_queries(T)
        # Each key's gradient is a sum over blocks, in fp32 where there are several.
        dtype = k.dtype if len(blocks) == 1 else torch.float32
        grad_k = grad_v = None
        for rows in reversed(blocks):  # the last one sees all keys
            queries, past = heads[:, :, rows], slice(rows.stop)
            weights = _compute_weights(queries, k[:, past])
            grad = grad_out[:, :, rows].reshape(N, -1, D)
            part_v = weights.transpose(1, 2) @ grad
            grad_weights = grad @ v[:, past].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(1 / math.sqrt(D))
            part_k = grad_scores.transpose(1, 2) @ queries.reshape(N, -1, D)
            grad_q[:, :, rows] = (grad_scores @ k[:, past]).view(queries.shape)
            if grad_k is None or grad_v is None:
                grad_k, grad_v = part_k.to(dtype), part_v.to(dtype)
            else:
                grad_k[:, past] += part_k
                grad_v[:, past] += part_v
        assert grad_k is not None
        assert grad_v is not None
        shape = (B, -1, T, D)
        return (
            grad_q.view(B, H, T, D),
            grad_k.to(k.dtype).view(shape),
            grad_v.to(v.dtype).view(shape),
        )


def _split_queries(n_tokens: int) -> list[slice]:
    """The queries, block by block."""
    starts = range(0, n_tokens, BLOCK_QUERIES)
    return [slice(start, min(start + BLOCK_QUERIES, n_tokens)) for start in starts]


def _compute_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Weights (N, G block, end) of a block of queries (N G block D) over all keys up to the
    block's end (N end D).
    """
    N, G, n_queries, D = queries.shape
    n_keys = keys.shape[1]
    mask = queries.new_full((n_queries, n_keys), -math.inf).triu_(n_keys - n_queries + 1)
    scores = torch.baddbmm(
        mask.repeat(G, 1),
        queries.reshape(N, -1, D),
        keys.transpose(1, 2),
        alpha=1 / math.sqrt(D),
    )
    return torch.softmax(scores, -1, out=scores)
