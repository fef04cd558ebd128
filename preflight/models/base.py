"""What every language model here has: a table of tokens, an output head, and their initialisation.

Shapes: B sequences, T tokens in each, C hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preflight.models.kv_cache import KVCache
from preflight.models.loss import Targets, cap_logits, choose_loss_of_compiled, compute_loss
from preflight.models.protocol import ParameterGroup
from preflight.settings import ModelConfig, SamplingConfig


class ResidualLinear(nn.Linear):
    """A linear layer whose result is added to the residual stream; initialised smaller."""


class TokenModel(nn.Module):
    """Base of the models: `embed_tokens`, `lm_head` where it is not tied, loss and logits.

    A subclass builds its parts, among them `layers` and `norm`, then calls `build_head` and
    initialises them. It is a `LanguageModel` with `forward`, `compute_hidden`, `extend`,
    `extend_hidden` and `decode` of its own.
    The memory estimate watches `layers`, which are alike, and `norm`, after which the loss begins.

    Attributes:
        decodes_in_numpy: a single row may be decoded in numpy, where the model has such a way.
    """

    layers: nn.ModuleList
    norm: nn.Module
    decodes_in_numpy = True
    _generate: Callable[..., list[list[int]]] | None = None
    _multiply_head: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embeddings)
        self._cap: Callable[[Tensor], Tensor] = _keep
        self._compute_loss: Callable[..., Tensor] = compute_loss
        if config.logit_softcap is not None:
            self._cap = functools.partial(cap_logits, softcap=config.logit_softcap)

    def build_head(self) -> None:
        """The output head: the table of tokens, or a matrix (V C) of its own."""
        if not self.config.tied:
            config = self.config
            self.lm_head = nn.Linear(config.n_embeddings, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The weight (V C) that turns a hidden vector into logits."""
        return (self.embed_tokens if self.config.tied else self.lm_head).weight

    def compute_output(self, x: Tensor, targets: Targets | None) -> Tensor:
        """Logits (B T V) of hidden vectors (B T C), or the summed loss against `targets`."""
        if targets is None:
            return self.compute_logits(x)
        return self._compute_loss(x, self.head_weight, targets, self.config.logit_softcap)

    def compile_for_training(self, **options: Any) -> Callable[..., Tensor]:
        """`forward` by torch.compile, with its `options`; on a CPU all but the loss."""
        self._compute_loss = choose_loss_of_compiled(self.head_weight.device.type)
        return torch.compile(self, **options)

    def compute_logits(self, x: Tensor) -> Tensor:
        """Logits (... V) of hidden vectors (... C)."""
        multiply = self._multiply_head
        return self._cap(F.linear(x, self.head_weight) if multiply is None else multiply(x))

    def build_cache(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> KVCache:
        """An empty cache of `batch_size` rows for `prefill` and `decode`."""
        return KVCache(self.config, batch_size, device, dtype, capacity)

    def prefill(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """As `extend`, in place of what the rows held.

        Raises:
            ValueError: a row cannot hold so many tokens.
        """
        cache.check_capacity(tokens.shape[1])
        for row in rows:
            cache.lengths[row] = 0
        self.extend(tokens, cache, rows, lengths)

    def compute_hidden(self, tokens: Tensor) -> Tensor:
        """The vectors (B T C) from which the logits after each token (B T) are computed."""
        raise NotImplementedError

    def extend(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Put tokens (B T) into rows of `cache` behind what they hold, of each its `lengths`."""
        raise NotImplementedError

    def extend_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As `extend` of the only row of `cache` by tokens (1 T); the vectors (1 T C) from which
        the logits after each are computed.
        """
        raise NotImplementedError

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As in `LanguageModel`."""
        raise NotImplementedError

    def bind_head(self, multiply: Callable[[Tensor], Tensor]) -> None:
        """Let `multiply` turn hidden vectors (... C) into logits (... V) in place of the product
        with `head_weight`, of which a quantised model holds no floating-point copy.
        """
        self._multiply_head = multiply

    def bind_generate(self, generate: Callable[[Any, Any, Any], list[list[int]]]) -> None:
        """Let `generate` be that of a decoding engine, which is built on models: called with the
        model, the token ids and the settings. `generate.load_model` does it.
        """
        self._generate = generate

    def generate(
        self, token_ids: Tensor | Sequence[Sequence[int]], config: SamplingConfig
    ) -> list[list[int]]:
        """The ids that follow each row of ids (B T, or rows of different lengths).

        Without the rows themselves; the id that ended a row is the last.

        Raises:
            RuntimeError: the model did not come from `generate.load_model`.
        """
        if self._generate is None:
            raise RuntimeError(
                "no tokenizer is bound to this model: call generate.generate_ids(model, "
                "token_ids, config, tokenizer)"
            )
        return self._generate(self, token_ids, config)

    def check_length(self, tokens: Tensor) -> None:
        """Raise `ValueError` where sequences (B T) are longer than the context."""
        n_tokens = tokens.shape[1]
        if self.config.context_length < n_tokens:
            raise ValueError(
                f"{n_tokens} tokens are longer than the context of {self.config.context_length}"
            )

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trainable parameters by kind, each in the order of the model."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        tables.add(id(self.head_weight))
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [
            ParameterGroup("matrix", [p for p in trainable if p.dim() > 1 and id(p) not in tables]),
            ParameterGroup("embedding", [p for p in trainable if id(p) in tables]),
            ParameterGroup("scalar", [p for p in trainable if p.dim() < 2]),
        ]


def _keep(logits: Tensor) -> Tensor:
    return logits


def initialise(module: nn.Module, std: float) -> None:
    """Weights of a linear layer or a table from N(0, std), and biases of zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
