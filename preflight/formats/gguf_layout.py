"""Where each of our weights and settings stands in a GGUF file, for its kinds `gpt2` and `llama`.

Rows of queries and keys differ: our pairs of channels that are rotated together are one of the
first and one of the second half of a head; in a file of kind `llama` they are neighbours. Files of
kind `qwen2`, which are read too, have our order. Shapes: H heads, D size of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from preflight.formats.gguf_header import KINDS
from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig

READ_ARCHITECTURES = ("llama", "gpt2", "qwen2")
_PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "feed_forward": "mlp",
        "activation": "gelu_tanh",
    },
    "llama": {"norm": "rms", "positions": "rope", "feed_forward": "swiglu"},
}
_NOWHERE: dict[str, Any] = {"qk_norm": False, "logit_softcap": None}  # in neither kind
_NAMES = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUR_NAME = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")


class Part(NamedTuple):
    """Rows of one of our weights that are a tensor of a file.

    Attributes:
        n_heads: of the rows, whose pairs of channels are neighbours in the file; 0: as they are.
    """

    tensor: str
    n_rows: int
    n_heads: int = 0

    def to_file(self, rows: Tensor) -> Tensor:
        """Our rows in the order of the file."""
        return self._swap(rows, 2, rows.shape[0] // max(2 * self.n_heads, 1))

    def from_file(self, rows: Tensor) -> Tensor:
        """The file's rows in our order."""
        return self._swap(rows, rows.shape[0] // max(2 * self.n_heads, 1), 2)

    def _swap(self, rows: Tensor, first: int, second: int) -> Tensor:
        if not self.n_heads:
            return rows
        pairs = rows.reshape(self.n_heads, first, second, *rows.shape[1:])  # H 2 D/2 or H D/2 2
        return pairs.transpose(1, 2).reshape(rows.shape)


def find_parts(name: str, config: ModelConfig, architecture: str) -> list[Part]:
    """The tensors that our weight called `name` consists of, from its first row to its last."""
    layer, module, suffix = _OUR_NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    prefix = f"blk.{layer}." if layer else ""
    rows = {"q": config.n_heads, "k": config.kv_heads, "v": config.kv_heads}
    if module == "self_attn.qkv_proj" and architecture != "gpt2":
        swapped = ("q", "k") if architecture == "llama" else ()
        return [
            Part(f"{prefix}attn_{x}.{suffix}", n * config.head_dim, n if x in swapped else 0)
            for x, n in rows.items()
        ]
    if module == "mlp.gate_up_proj":
        return [Part(f"{prefix}ffn_{x}.{suffix}", config.ffn_hid_dim) for x in ("gate", "up")]
    return [Part(f"{prefix}{_NAMES[module]}.{suffix}", -1)]


def list_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by their names."""
    return {name: tuple(w.shape) for name, w in build_on_meta(config).state_dict().items()}


def split_weights(
    weights: Mapping[str, Tensor], config: ModelConfig, architecture: str
) -> dict[str, Tensor]:
    """The tensors of a file, by their names there. `config` is that of `describe_in_file`."""
    tensors = {}
    for name, shape in list_shapes(config).items():
        weight = weights.get(name)
        if weight is None:  # a bias that the file needs and the model has not
            weight = torch.zeros(shape)
        begin = 0
        for part in find_parts(name, config, architecture):
            end = begin + part.n_rows if part.n_rows > 0 else shape[0]
            tensors[part.tensor] = part.to_file(weight[begin:end])
            begin = end
    return tensors


def choose_architecture(config: ModelConfig) -> tuple[str, list[str]]:
    """The kind of file for a model, and each part of the model that this kind lacks, by name."""
    architecture = "llama" if config.positions == "rope" else "gpt2"
    needed = _PARTS[architecture] | _NOWHERE
    faults = [
        f"{name} {getattr(config, name)}"
        for name, value in needed.items()
        if getattr(config, name) != value
    ]
    if config.model_family == "mlp":
        faults = ["model_family mlp"]
    return architecture, faults


def describe_in_file(config: ModelConfig, architecture: str) -> ModelConfig:
    """The model as a reader of the file finds it, which computes the same.

    Files of kind `gpt2` always have biases. A theta that is scaled is written as its product, and
    numbers are fp32. What only matters in training is not in a file.
    """
    theta = config.rope_theta
    changes: dict[str, Any] = {"dropout": 0.0, "model_family": architecture}
    if config.rope_scaling == "ntk":
        theta *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
        changes |= {"rope_scaling": "none", "rope_factor": 1.0}
    if architecture == "llama":
        changes["rope_theta"] = shorten(theta)
        if config.rope_scaling == "linear":
            changes["rope_factor"] = shorten(config.rope_factor)
    else:
        changes["bias"] = True
    heads = config.n_kv_heads if config.kv_heads != config.n_heads else None
    return replace(config, n_kv_heads=heads, norm_eps=shorten(config.norm_eps), **changes)


def shorten(value: float) -> float:
    """The number with the fewest digits that is `value` in fp32: 1e-05 of 9.99999974e-06."""
    return float(str(np.float32(value)))


def choose_kind(tensor: str, weight: Tensor, quantization: str, tied: bool) -> str:
    """The type of a tensor, as llama.cpp chooses it.

    Norms, biases and positions stay in fp32. Below eight bits the head has eight; llama.cpp would
    take Q6_K, which only it can write. A row that is no multiple of a block is not quantised.
    """
    if weight.dim() < 2 or tensor == "position_embd.weight":
        return "F32"
    is_head = tensor == ("token_embd.weight" if tied else "output.weight")
    kind = quantization.upper()
    if is_head and kind.startswith(("Q4", "Q5")):
        kind = "Q8_0"
    return "F16" if weight.shape[-1] % KINDS[kind].block_size else kind


def list_keys(config: ModelConfig, architecture: str) -> dict[str, tuple[str, Any]]:
    """The settings of a file, each with its type."""
    norm = "layer_norm" if architecture == "gpt2" else "layer_norm_rms"
    keys: dict[str, tuple[str, Any]] = {
        "context_length": ("UINT32", config.context_length),
        "embedding_length": ("UINT32", config.n_embeddings),
        "block_count": ("UINT32", config.n_layers),
        "feed_forward_length": ("UINT32", config.ffn_hid_dim),
        "attention.head_count": ("UINT32", config.n_heads),
        "attention.head_count_kv": ("UINT32", config.kv_heads),
        f"attention.{norm}_epsilon": ("FLOAT32", config.norm_eps),
        "vocab_size": ("UINT32", config.vocab_size),
    }
    if architecture == "llama":
        keys["rope.dimension_count"] = ("UINT32", config.head_dim)
        keys["rope.freq_base"] = ("FLOAT32", config.rope_theta)
        if config.rope_scaling == "linear":
            keys["rope.scaling.type"] = ("STRING", "linear")
            keys["rope.scaling.factor"] = ("FLOAT32", config.rope_factor)
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def read_config(
    keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> ModelConfig:
    """The model that a file describes.

    Args:
        keys: the file's.
        shapes: of its tensors, by name.
        tied: the head is the table of tokens.

    Raises:
        ValueError: naming what is missing, impossible, or a part that we lack.
    """
    architecture = keys.get("general.architecture")
    if architecture not in READ_ARCHITECTURES:
        known = ", ".join(READ_ARCHITECTURES)
        raise ValueError(f"its architecture is {str(architecture)[:40]!r}; read are {known}")
    values = {
        name.removeprefix(f"{architecture}."): value
        for name, value in keys.items()
        if name.startswith(f"{architecture}.")
    }
    take = _Settings(values, architecture)
    n_heads, n_layers = take.count("attention.head_count"), take.count("block_count")
    n_kv_heads = take.count("attention.head_count_kv", n_heads)
    width = take.count("embedding_length")
    if n_layers > len(shapes) or width > 2**16 or n_heads > 1024:
        raise ValueError(f"it claims {n_layers:,} blocks, size {width:,}, {n_heads:,} heads")
    vocab_size = shapes.get("token_embd.weight", (0,))[0]
    if not vocab_size:
        raise ValueError("tensor token_embd.weight is missing")
    is_gpt2 = architecture == "gpt2"
    parts: dict[str, Any] = dict(_PARTS["gpt2" if is_gpt2 else "llama"])
    norm = "layer_norm" if is_gpt2 else "layer_norm_rms"
    if not is_gpt2:
        parts["rope_theta"] = take.number("rope.freq_base", 10_000.0)
        parts |= take.scaling()
    parts["norm_eps"] = take.number(f"attention.{norm}_epsilon")
    context_length = take.count("context_length", limit=2**20)
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        n_embeddings=width,
        n_heads=n_heads,
        n_layers=n_layers,
        ffn_hid_dim=take.count("feed_forward_length"),
        model_family="gpt2" if is_gpt2 else "llama",
        n_kv_heads=n_kv_heads if n_kv_heads != n_heads else None,
        bias=is_gpt2 or any(name.endswith(".bias") for name in shapes),
        tied=tied,
        **parts,
    )
    take.refuse_others(config)
    return config


class _Settings:
    """A file's settings, each taken once; what is left over is a part that we lack."""

    def __init__(self, values: dict[str, Any], architecture: str) -> None:
        self._left = dict(values)
        self._prefix = architecture

    def count(self, name: str, default: int = 0, limit: int = 2**24) -> int:
        """A positive whole number."""
        value = self._left.pop(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise ValueError(f"{self._prefix}.{name} is {str(value)[:40]}, or missing")
        return value

    def number(self, name: str, default: float = 0.0) -> float:
        """A positive number."""
        value = self._left.pop(name, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise ValueError(f"{self._prefix}.{name} is {str(value)[:40]}, or missing")
        return shorten(value)

    def scaling(self) -> dict[str, Any]:
        """How rotary positions are stretched."""
        kind = self._left.pop("rope.scaling.type", "none")
        old = self._left.pop("rope.scale_linear", 1.0)  # before there were other kinds
        factor = self._left.pop("rope.scaling.factor", old)
        if kind == "none" or factor == 1:
            kind, factor = ("none", 1.0) if kind in ("none", "linear") else (kind, factor)
        if kind not in ("none", "linear"):
            raise ValueError(f"its rope scaling is {str(kind)[:40]!r}; read is linear")
        if not isinstance(factor, float) or not 1 <= factor < float("inf"):
            raise ValueError(f"{self._prefix}.rope.scaling.factor is {str(factor)[:40]}")
        for name in ("original_context_length", "finetuned"):  # how it came about
            self._left.pop(f"rope.scaling.{name}", None)
        return {"rope_scaling": kind, "rope_factor": shorten(factor)}

    def refuse_others(self, config: ModelConfig) -> None:
        """Raise `ValueError` for a setting that was not taken and says something else than ours."""
        ours: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "rope.dimension_count": config.head_dim,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
        for name, value in self._left.items():
            if name == "tensor_data_layout" or (isinstance(value, (int, float)) and not value):
                continue  # where it came from; nothing of that kind
            if name not in ours or value != ours[name]:
                raise ValueError(f"{self._prefix}.{name} is {str(value)[:40]}, which we lack")
