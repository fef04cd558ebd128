"""Where each of our weights is in GPT2LMHeadModel and in LlamaForCausalLM, and in what shape.

Shapes: C hidden size, H heads of queries, K of keys and values, D size of a head, F d_ff, V rows of
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig

Shape = tuple[int, ...]
Take = Callable[[str], Tensor]


@dataclass(frozen=True)
class Part:
    """One of our weights, as it is kept elsewhere.

    Attributes:
        name: ours.
        sources: names there; several are joined along the rows.
        shapes: of the sources there.
        is_transposed: it is kept as (in, out), as GPT-2's Conv1D does.
        is_optional: a bias that is zero where the file has none.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    is_transposed: bool = False
    is_optional: bool = False

    def join(self, take: Take, has: Callable[[str], bool]) -> Tensor:
        """Our weight, from the tensors that `take` reads; a new tensor."""
        parts = [
            take(source) if has(source) else torch.zeros(shape)
            for source, shape in zip(self.sources, self.shapes, strict=True)
        ]
        if self.is_transposed:
            parts = [part.T for part in parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def split(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors there and their names, from our weight."""
        sizes = [shape[-1 if self.is_transposed else 0] for shape in self.shapes]
        for source, part in zip(self.sources, weight.split(sizes), strict=True):
            yield source, (part.T if self.is_transposed else part).contiguous()


_GPT2_NAMES = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_LLAMA_NAMES = {
    "embed_tokens": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
    "input_layernorm": ("input_layernorm",),
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def list_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our names and shapes of all weights of a model."""
    return {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}


def list_gpt2_parts(config: ModelConfig, *, is_conv: bool = True) -> list[Part]:
    """The weights of GPT2LMHeadModel.

    Args:
        config: with learned positions.
        is_conv: matrices in blocks are kept as (in, out); nanoGPT keeps them as (out, in).
    """
    parts = []
    for name, shape in list_shapes(config).items():
        layer, inner, ending = _take_apart(name)
        prefix = "" if layer is None else f"transformer.h.{layer}."
        is_transposed = is_conv and layer is not None and len(shape) == 2
        there = shape[::-1] if is_transposed else shape
        source = f"{prefix}{_GPT2_NAMES[inner]}.{ending}"
        parts.append(Part(name, (source,), (there,), is_transposed))
    return parts


def list_llama_parts(config: ModelConfig) -> list[Part]:
    """The weights of LlamaForCausalLM. Queries and keys are kept there as here: the first half of
    a head's channels turns with the second. GGUF has them interleaved.
    """
    width, kv_width = config.n_embeddings, config.kv_heads * config.head_dim
    rows = {
        "self_attn.qkv_proj": (width, kv_width, kv_width),
        "mlp.gate_up_proj": (config.ffn_hid_dim, config.ffn_hid_dim),
    }
    parts = []
    for name, shape in list_shapes(config).items():
        layer, inner, ending = _take_apart(name)
        prefix = "" if layer is None else f"model.layers.{layer}."
        sources = tuple(f"{prefix}{there}.{ending}" for there in _LLAMA_NAMES[inner])
        shapes = tuple((n, *shape[1:]) for n in rows.get(inner, (shape[0],)))
        parts.append(Part(name, sources, shapes, is_optional=ending == "bias"))
    return parts


def _take_apart(name: str) -> tuple[str | None, str, str]:
    """``layers.3.mlp.up_proj.bias`` is ("3", "mlp.up_proj", "bias"); outside of a block: None."""
    inner, _, ending = name.rpartition(".")
    if not inner.startswith("layers."):
        return None, inner, ending
    _, layer, inner = inner.split(".", 2)
    return layer, inner, ending
