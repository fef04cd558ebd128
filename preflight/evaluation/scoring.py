"""Log-likelihoods of continuations under a model, as lm-evaluation-harness defines them.

Log-softmax and sums are in fp32, as the harness takes them, over the vocabulary of the model. Only
positions that predict a token of a continuation get logits. Shapes: B rows, L tokens of the
longest, C hidden size, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from preflight.device.host_memory import available_host_bytes
from preflight.device.token_store import measure_free_bytes
from preflight.evaluation.encoding import Row
from preflight.evaluation.items import ItemScore
from preflight.evaluation.packing import (
    Batch,
    can_pack,
    compute_hidden,
    fit_rows,
    pack_rows,
    plan_batches,
)
from preflight.models.loss import loss_layout
from preflight.models.protocol import LanguageModel
from preflight.settings import ModelConfig
from transformer_model import DecoderOnlyTransformer

# Most tokens of a batch. On a CPU more of them fall out of its caches; on CUDA more gain nothing.
_MOST_TOKENS = {"cuda": 65_536}
_MOST_TOKENS_ELSEWHERE = 4_096
_LEAST_TOKENS = 256
# Share of the free memory that a batch may take.
_MEMORY_SHARE = 0.5
# Of logits that are computed at once: with fewer, MKL's sgemm rounds otherwise (measured).
_LEAST_ROWS = 16
# glibc's malloc keeps freed blocks of up to 32 MiB; larger ones are zeroed page by page, each time.
_CHUNK_BYTES = 30 * 2**20
TOP_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class BranchScore:
    """What a model gave the tokens of a branch.

    Attributes:
        log_likelihood: the sum of the natural logarithms of their probabilities.
        n_tokens: how many they are.
        is_greedy: each is the most probable one.
        n_top: how many are among the 1, 5 and 10 most probable; empty where nobody asked.
    """

    log_likelihood: float
    n_tokens: int
    is_greedy: bool
    n_top: tuple[int, ...] = ()


def choose_batch_tokens(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a batch that fit into the memory that is free, and are fast.

    A token's activations are those of one block: input, norm, queries, keys, values and output
    (8 C), two of the feed-forward part, and a row of the mask.
    """
    free = measure_free_bytes(device) if device.type == "cuda" else available_host_bytes()
    logits = 3 * _choose_chunk(device.type, config.vocab_size) * config.vocab_size * 4
    wide = 8 * config.n_embeddings + 2 * config.ffn_hid_dim
    per_token = wide * dtype.itemsize + 5 * config.context_length
    fitting = int((free * _MEMORY_SHARE - logits) / per_token)
    most = _MOST_TOKENS.get(device.type, _MOST_TOKENS_ELSEWHERE)
    return max(_LEAST_TOKENS, min(most, fitting))


class RowScorer:
    """Scores rows in batches that depend on the rows and `batch_tokens` alone.

    A batch gives the same figures in every call on the same machine, so that an evaluation can be
    continued between two batches.

    Args:
        model: on its device, in its dtype, in eval mode.
        rows: of `encode_task`; the attribute holds them as `fit_rows` gives them.
        batch_tokens: tokens that go through the model at once.
        wants_ranks: count the tokens among the most probable.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Row],
        batch_tokens: int,
        *,
        wants_ranks: bool = False,
    ) -> None:
        self.model, self.wants_ranks = model, wants_ranks
        self.rows = fit_rows(rows, batch_tokens)
        self.device = next(iter(model.parameters())).device
        self._can_pack = can_pack(model)
        self.batches = plan_batches(self.rows, batch_tokens, may_pack=self._can_pack)

    @torch.inference_mode()
    def score(self, batch: Batch) -> list[list[BranchScore]]:
        """The scores of a batch: of each row in its order, one for each branch."""
        rows = [self.rows[i] for i in batch.rows]
        if self._can_pack:
            return self._score_packed(rows)
        return [[self._score_alone(row, i) for i in range(len(row.branches))] for row in rows]

    def _score_packed(self, rows: Sequence[Row]) -> list[list[BranchScore]]:
        model = cast(DecoderOnlyTransformer, self.model)
        packed = pack_rows(rows, self.device)
        hidden = compute_hidden(model, packed).flatten(0, 1)  # B L C -> N C
        places, targets = _list_predictions(rows, packed.tokens.shape[1])
        place, target = (torch.tensor(x, device=self.device) for x in (places, targets))
        # The first token of every choice is predicted at the same place.
        place, chosen = torch.unique(place, return_inverse=True)
        parts = []
        n_rows = _choose_chunk(self.device.type, model.config.vocab_size)
        for first in range(0, len(place), n_rows):
            last = min(first + n_rows, len(place))
            logits = _compute_logits(model, hidden, place[first:last])
            [here] = torch.nonzero((first <= chosen) & (chosen < last), as_tuple=True)
            parts.append((here, self._judge(logits, chosen[here] - first, target[here])))
        merged = [_scatter(parts, i, len(targets)) for i in range(3 if self.wants_ranks else 2)]
        return _sum_branches(rows, *merged)

    def _score_alone(self, row: Row, index: int) -> BranchScore:
        """A branch by a plain forward pass, for a model that cannot be packed."""
        branch = row.branches[index]
        ids = torch.tensor([row.context + branch.tokens[:-1]], device=self.device)
        logits = self.model(ids)[0, len(row.context) - 1 :]  # R V
        target = torch.tensor(branch.tokens, device=self.device)
        found = self._judge(logits, torch.arange(len(target), device=self.device), target)
        alone = Row(0, row.context, [branch])
        return _sum_branches([alone], *(x.cpu() for x in found))[0][0]

    def _judge(self, logits: Tensor, place: Tensor, target: Tensor) -> list[Tensor]:
        """Of predictions, at rows `place` of logits (R V): log-probability, whether the target is
        the most probable token, and with `wants_ranks` how many are more probable.
        """
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        chosen = log_p[place, target]
        is_best = chosen == log_p.amax(dim=-1)[place]
        # Of equal ones the first is what greedy decoding gives; argmax is slow, and rarely needed.
        [ties] = torch.nonzero(is_best, as_tuple=True)
        is_best[ties] = log_p[place[ties]].argmax(dim=-1) == target[ties]
        found = [chosen, is_best]
        if self.wants_ranks:
            found.append((log_p[place] > found[0][:, None]).sum(dim=1))
        return found


def _choose_chunk(device_type: str, vocab_size: int) -> int:
    """Positions whose logits are held at once: on the CPU as many as malloc keeps for the next."""
    most = loss_layout(device_type).rows
    if device_type != "cpu":
        return most
    return max(_LEAST_ROWS, min(most, _CHUNK_BYTES // (4 * vocab_size) // 8 * 8))


def _compute_logits(model: DecoderOnlyTransformer, hidden: Tensor, place: Tensor) -> Tensor:
    """Logits (R V) of the rows `place` of vectors (N C), rounded as if all N had been computed.

    BLAS has other kernels for a matrix of a few rows, which add in another order, and of such a
    matrix the last rows may be rounded unlike the first.
    """
    if len(hidden) <= _LEAST_ROWS:
        return model.compute_logits(hidden)[place]
    n_missing = max(0, _LEAST_ROWS - len(place))
    logits = model.compute_logits(F.pad(hidden[place], (0, 0, 0, n_missing)))
    return logits[: len(place)]


def _list_predictions(rows: Sequence[Row], length: int) -> tuple[list[int], list[int]]:
    """Of each token of each branch: the place in (B L) that predicts it, and its id."""
    places, targets = [], []
    for i, row in enumerate(rows):
        at = i * length + len(row.context)
        for branch in row.branches:
            n_inner = len(branch.tokens) - 1
            places += [i * length + len(row.context) - 1, *range(at, at + n_inner)]
            targets += branch.tokens
            at += n_inner
    return places, targets


def _scatter(parts: Iterable[tuple[Tensor, list[Tensor]]], index: int, size: int) -> Tensor:
    """The results of all chunks in the order of the predictions, on the host."""
    parts = list(parts)
    whole = parts[0][1][index].new_empty(size)
    for here, found in parts:
        whole[here] = found[index]
    return whole.cpu()


def _sum_branches(
    rows: Sequence[Row], log_p: Tensor, is_best: Tensor, ranks: Tensor | None = None
) -> list[list[BranchScore]]:
    """Predictions in their order to scores of branches."""
    scores, at = [], 0
    for row in rows:
        of_row = []
        for branch in row.branches:
            part = slice(at, at + len(branch.tokens))
            at = part.stop
            tops = () if ranks is None else tuple(int((ranks[part] < n).sum()) for n in TOP_RANKS)
            of_row.append(
                BranchScore(
                    float(log_p[part].sum()), len(branch.tokens), bool(is_best[part].all()), tops
                )
            )
        scores.append(of_row)
    return scores


OnBatch = Callable[[Batch, list[list[BranchScore]]], Any]


def score_rows(
    scorer: RowScorer,
    on_batch: OnBatch | None = None,
    done: dict[int, list[BranchScore]] | None = None,
) -> dict[int, list[BranchScore]]:
    """The scores of all rows by their index.

    Args:
        scorer: of the rows.
        on_batch: told of each batch; what it raises ends the scoring.
        done: what is known already; a batch of which a row is missing is scored as a whole.
    """
    found = dict(done or {})
    for batch in scorer.batches:
        if all(row in found for row in batch.rows):
            continue
        scores = scorer.score(batch)
        found.update(zip(batch.rows, scores, strict=True))
        if on_batch:
            on_batch(batch, scores)
    return found


def collect_items(
    rows: Sequence[Row], scores: dict[int, list[BranchScore]], n_items: int
) -> list[ItemScore]:
    """The scores of items from those of their rows; windows of a page are added in order."""
    found: list[dict[int, list[BranchScore]]] = [{} for _ in range(n_items)]
    for number, row in enumerate(rows):
        for branch, score in zip(row.branches, scores[number], strict=True):
            found[row.item].setdefault(branch.index, []).append(score)
    return [_join(item) for item in found]


def _join(branches: dict[int, list[BranchScore]]) -> ItemScore:
    ordered = [branches[index] for index in sorted(branches)]
    return ItemScore(
        tuple(sum(part.log_likelihood for part in parts) for parts in ordered),
        tuple(sum(part.n_tokens for part in parts) for parts in ordered),
        tuple(all(part.is_greedy for part in parts) for parts in ordered),
    )
