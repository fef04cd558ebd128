"""Rows to batches: a context and all continuations after it, side by side, in one forward pass.

Row of a batch: the context, then of each continuation all tokens but the last. A continuation's
positions go on from the context's, and it attends to the context and to itself alone. The context
is so computed once for all choices. Shapes: B rows, L tokens in the longest, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.evaluation.encoding import Branch, Row
from preflight.models.protocol import LanguageModel
from transformer_model import DecoderOnlyTransformer

_PADDING = -1  # the part of tokens that are there to fill a row


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, by their places in the list that was planned."""

    rows: tuple[int, ...]
    n_tokens: int  # of the longest row times the rows


def fit_rows(rows: Sequence[Row], batch_tokens: int) -> list[Row]:
    """The rows; those of several continuations that are longer than a batch, each continuation
    apart. With ``batch_tokens=1`` every forward pass is so that of one continuation.
    """
    found: list[Row] = []
    for row in rows:
        is_split = row.n_tokens > batch_tokens and len(row.branches) > 1
        parts: list[list[Branch]] = [[b] for b in row.branches] if is_split else [row.branches]
        found += [Row(row.item, row.context, branches) for branches in parts]
    return found


def plan_batches(rows: Sequence[Row], batch_tokens: int, *, may_pack: bool) -> list[Batch]:
    """All rows, longest first, so that rows of a batch need little padding.

    Args:
        rows: of any number of items.
        batch_tokens: at most so many in a batch, unless a single row has more.
        may_pack: False: rows of several branches stay alone, for a model that cannot pack them.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].n_tokens, i))
    batches: list[Batch] = []
    while order:
        longest = max(1, rows[order[0]].n_tokens)
        n_rows = max(1, batch_tokens // longest) if may_pack else 1
        batches.append(Batch(tuple(order[:n_rows]), longest * len(order[:n_rows])))
        order = order[n_rows:]
    return batches


def can_pack(model: LanguageModel) -> bool:
    """Whether the model has the parts that `compute_hidden` calls."""
    return type(model) is DecoderOnlyTransformer


@dataclass(frozen=True)
class PackedRows:
    """A batch as tensors.

    Attributes:
        tokens: ids (B L), padded on the right.
        positions: of the tokens (B L).
        mask: who attends to whom (B 1 L L); None where every row is one plain text.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None


def pack_rows(rows: Sequence[Row], device: torch.device) -> PackedRows:
    """The tensors of a batch."""
    longest = max(row.n_tokens for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    parts = torch.full((len(rows), longest), _PADDING)
    for i, row in enumerate(rows):
        ids, places, part = list(row.context), list(range(len(row.context))), [0] * len(row.context)
        for number, branch in enumerate(row.branches, 1):
            inner = branch.tokens[:-1]
            ids += inner
            places += range(len(row.context), len(row.context) + len(inner))
            part += [number] * len(inner)
        tokens[i, : len(ids)] = torch.tensor(ids)
        positions[i, : len(ids)] = torch.tensor(places)
        parts[i, : len(ids)] = torch.tensor(part)
    tokens, positions = tokens.to(device), positions.to(device)
    if all(len(row.branches) == 1 for row in rows):
        return PackedRows(tokens, positions, None)
    parts = parts.to(device)
    order = torch.arange(longest, device=device)
    is_earlier = order[:, None] >= order  # L L
    is_shared = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])  # B L L
    return PackedRows(tokens, positions, (is_earlier & is_shared)[:, None])


class _PackedStep:
    """What attention asks of a step: new keys and values are all there are."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask, self.is_causal = mask, mask is None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values as they are."""
        return k, v


def compute_hidden(model: DecoderOnlyTransformer, packed: PackedRows) -> Tensor:
    """Hidden vectors (B L C) before the output head, which only some of them will need."""
    angles = model.embed_positions.compute_angles(packed.positions)
    x = model.embed_positions.embed(model.embed_tokens(packed.tokens), packed.positions)
    step = _PackedStep(packed.mask)
    for layer, block in enumerate(model.layers):
        x = block(x, layer, step, angles)
    return model.norm(x)
