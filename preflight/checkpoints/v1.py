"""Format v1, of Preflight 0.1: the names of its weights. All else in it is read as v2 is."""

from __future__ import annotations

import re

_NAMES = {
    "token_embedding": "embed_tokens",
    "position_embedding": "embed_positions",
    "final_norm": "norm",
}
_NAMES_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn.qkv_proj",
    "attention.projection": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.expand": "mlp.up_proj",
    "feed_forward.contract": "mlp.down_proj",
}
_WEIGHT = re.compile(r"(?:blocks\.([0-9]+)\.)?(.+)\.(weight|bias)")


def rename_weight(name: str) -> str:
    """The name since format v2 of a weight that format v1 calls `name`.

    Raises:
        ValueError: no weight of format v1 has that name. Two weights can therefore not get the
            same name.
    """
    match = _WEIGHT.fullmatch(name)
    layer, module, kind = match.groups() if match else (None, "", "")
    names = _NAMES if layer is None else _NAMES_IN_LAYER
    if module not in names:
        raise ValueError(f"format v1 has no weight {name[:80]!r}")
    prefix = "" if layer is None else f"layers.{layer}."
    return f"{prefix}{names[module]}.{kind}"
