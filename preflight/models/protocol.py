"""What the trainer and the decoding engine need of a language model.

Shapes: B sequences, T tokens in each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from preflight.models.kv_cache import KVCache
from preflight.models.loss import Targets
from preflight.settings import ModelConfig

ParameterKind = Literal["matrix", "embedding", "scalar"]


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters of one kind, which an optimizer treats alike.

    Attributes:
        kind: ``matrix`` is the weight of a linear layer, ``embedding`` a table of vectors, and
            ``scalar`` a gain or bias, one number for each channel.
        parameters: in the order of the model.
    """

    kind: ParameterKind
    parameters: list[nn.Parameter]


@runtime_checkable
class LanguageModel(Protocol):
    """An `nn.Module` that maps tokens to logits, or to a loss, and decodes with a cache."""

    config: ModelConfig
    training: bool

    def forward(self, tokens: Tensor, targets: Targets | None = None) -> Tensor:
        """Logits (B T V), or the sum of the losses over the targets."""
        ...

    def compile_for_training(self) -> Callable[..., Tensor]:
        """`forward`, compiled where that makes it faster."""
        ...

    def build_cache(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> KVCache:
        """An empty cache; a row holds `capacity` tokens, at most (and by default) the context."""
        ...

    def prefill(self, tokens: Tensor, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        """Put the keys and values of prompts (B T) into rows of `cache`."""
        ...

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token (B,) to every row of `cache`; logits (B V) of what follows it."""
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trainable parameters by kind: matrices first, then embeddings, then scalars."""
        ...

    # Of nn.Module:
    def __call__(self, tokens: Tensor, targets: Targets | None = None) -> Tensor: ...  # noqa: D102
    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...  # noqa: D102
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...  # noqa: D102
    def zero_grad(self, set_to_none: bool = True) -> None: ...  # noqa: D102
    def train(self, mode: bool = True) -> Any: ...  # noqa: D102
    def eval(self) -> Any: ...  # noqa: D102
