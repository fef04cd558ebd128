"""``config.json`` of Hugging Face to our configuration and back.

The architectures that can be read are those that we compute. Of each, every field that the class in
transformers computes with is looked at; what we lack is refused by name. Fields of other classes
are ignored there, and here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ModelConfig, build_config

GPT2 = "GPT2LMHeadModel"
_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
ARCHITECTURES = (GPT2, *_LLAMA_LIKE)
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "relu": "reglu"}
# What the classes of transformers take where the file does not name a field.
_DEFAULTS: dict[str, dict[str, Any]] = {
    GPT2: {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "LlamaForCausalLM": {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "use_sliding_window": False},
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "head_dim": None,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "layer_types": None,
}


class _Fields:
    """The fields of a ``config.json``, read with their types; ValueError names a wrong one."""

    def __init__(self, architecture: str, values: Mapping[str, Any]) -> None:
        defaults: dict[str, Any] = {} if architecture == GPT2 else _LLAMA_DEFAULTS
        self.values = {**defaults, **_DEFAULTS[architecture], **values}

    def get(self, name: str, *kinds: type) -> Any:
        """The value, which must be of one of the `kinds`."""
        if name not in self.values:
            raise ValueError(f"{name} is missing")
        value = self.values[name]
        if type(value) not in kinds:
            raise ValueError(f"{name} is {str(value)[:60]!r}")
        return value

    def count(self, name: str) -> int:
        return int(self.get(name, int))

    def number(self, name: str) -> float:
        return float(self.get(name, int, float))

    def flag(self, name: str) -> bool:
        return bool(self.get(name, bool))

    def choose(self, name: str, names: Mapping[str, str]) -> str:
        """What a name stands for here."""
        value = self.get(name, str)
        if value not in names:
            raise ValueError(f"{name} {value[:60]!r} is not supported: one of {', '.join(names)}")
        return names[value]

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse another value than those that we compute."""
        if self.values[name] not in allowed:
            raise ValueError(f"{name} {str(self.values[name])[:60]!r} is not supported")


def find_architecture(values: Mapping[str, Any]) -> str:
    """The class that the model is of; ValueError for one that is not supported."""
    names = values.get("architectures")
    found = names[0] if isinstance(names, list) and len(names) == 1 else names
    if found is None:  # files that only name the family
        found = {"gpt2": GPT2, "llama": _LLAMA_LIKE[0], "mistral": _LLAMA_LIKE[1]}.get(
            str(values.get("model_type"))
        )
    elif found == "GPT2Model":  # without the head, which is the table of tokens
        found = GPT2
    if found not in ARCHITECTURES:
        raise ValueError(
            f"architecture {str(names)[:60]} is not supported: one of {', '.join(ARCHITECTURES)}"
        )
    for name in ("quantization_config", "auto_map"):
        if values.get(name):
            raise ValueError(f"{name} is not supported: floating-point weights and no code of its")
    return str(found)


def read_config(values: Any, *, is_tied: bool | None = None) -> ModelConfig:
    """Our configuration of a model.

    Args:
        values: the content of ``config.json``, which a stranger may have written.
        is_tied: whether the head is the table of tokens; unset: what the file says.

    Raises:
        ValueError: a field is missing, wrong, or asks for what we lack; it is named.
    """
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    architecture = find_architecture(values)
    fields = _Fields(architecture, values)
    ours = _read_gpt2(fields) if architecture == GPT2 else _read_llama(architecture, fields)
    ours["tied"] = fields.flag("tie_word_embeddings") if is_tied is None else is_tied
    return check_limits(ours)


def check_limits(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration of these values, within the limits of the flags of their names.

    Raises:
        ValueError: naming each that is impossible.
    """
    config = ModelConfig(**values)
    known = {name: value for name, value in values.items() if value is not None}
    try:
        build_config(known | {"model_size": "custom"}, {})
    except PreflightError as error:
        raise ValueError(error.lines[0].removeprefix("--")) from None
    return config


def _read_gpt2(fields: _Fields) -> dict[str, Any]:
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("add_cross_attention", False)
    inner = fields.get("n_inner", int, type(None))
    return {
        "vocab_size": fields.count("vocab_size"),
        "context_length": fields.count("n_positions"),
        "n_embeddings": fields.count("n_embd"),
        "n_heads": fields.count("n_head"),
        "n_layers": fields.count("n_layer"),
        "ffn_hid_dim": 4 * fields.count("n_embd") if inner is None else inner,
        "activation": fields.choose("activation_function", _ACTIVATIONS),
        "norm_eps": fields.number("layer_norm_epsilon"),
    }


def _read_llama(architecture: str, fields: _Fields) -> dict[str, Any]:
    n_heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    context = fields.count("max_position_embeddings")
    n_kv_heads = fields.get("num_key_value_heads", int, type(None))
    _check_sliding(architecture, fields, context)
    head_dim = fields.get("head_dim", int, type(None))
    if head_dim is not None and head_dim * n_heads != width:
        raise ValueError(f"head_dim {head_dim} is not hidden_size / num_attention_heads")
    fields.require("partial_rotary_factor", 1)
    if fields.get("layer_types", list, type(None)) is not None:
        odd = [kind for kind in fields.values["layer_types"] if kind != "full_attention"]
        if odd:
            raise ValueError(f"layer_types {str(odd[0])[:40]!r} is not supported")
    if architecture == _LLAMA_LIKE[0]:
        bias = fields.flag("attention_bias") or fields.flag("mlp_bias")
    else:
        bias = architecture == _LLAMA_LIKE[2]  # of queries, keys and values; the others are zero
    return {
        "vocab_size": fields.count("vocab_size"),
        "context_length": context,
        "n_embeddings": width,
        "n_heads": n_heads,
        "n_layers": fields.count("num_hidden_layers"),
        "ffn_hid_dim": fields.count("intermediate_size"),
        "model_family": "llama",
        "n_kv_heads": None if n_kv_heads == n_heads else n_kv_heads,
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps"),
        "positions": "rope",
        "feed_forward": fields.choose("hidden_act", _GATES),
        "bias": bias,
        **_read_rope(fields),
    }


def _check_sliding(architecture: str, fields: _Fields, context: int) -> None:
    """Refuse a window that is shorter than the context."""
    if architecture == "MistralForCausalLM":
        window = fields.get("sliding_window", int, type(None))
        if window is not None and window < context:
            raise ValueError(f"sliding_window {window} is not supported")
    if architecture == "Qwen2ForCausalLM":
        fields.require("use_sliding_window", False)


def _read_rope(fields: _Fields) -> dict[str, Any]:
    """Theta and scaling, from the fields of transformers 4 or the object of transformers 5."""
    newer, older = (fields.get(n, dict, type(None)) for n in ("rope_parameters", "rope_scaling"))
    if newer and older and newer != older:
        raise ValueError("rope_parameters and rope_scaling contradict each other")
    scaling = newer or older or {}
    theta = fields.get("rope_theta", int, float, type(None))
    theta = scaling.get("rope_theta", 10_000.0 if theta is None else theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if type(theta) not in (int, float) or kind not in ("default", "linear"):
        raise ValueError(f"rope_scaling {str(kind)[:40]!r} is not supported: default or linear")
    if scaling.get("partial_rotary_factor", 1.0) != 1:
        raise ValueError("partial_rotary_factor is not supported")
    values: dict[str, Any] = {"rope_theta": float(theta)}
    factor = scaling.get("factor", 1.0) if kind == "linear" else 1.0
    if type(factor) not in (int, float):
        raise ValueError(f"the factor of rope_scaling is {str(factor)[:40]!r}")
    if factor != 1:
        values |= {"rope_scaling": "linear", "rope_factor": float(factor)}
    return values


# ---- to Hugging Face ----------------------------------------------------------------------------


def find_export_architecture(config: ModelConfig) -> str:
    """The class that computes what this model does.

    Raises:
        PreflightError: code CHECKPOINT, naming every part that neither class has.
    """
    gaps = {
        GPT2: list_gaps(
            config,
            model_family=("gpt2", "llama", "modern"),
            norm=("layer",),
            positions=("learned",),
            feed_forward=("mlp",),
            n_kv_heads=(None, config.n_heads),
            qk_norm=(False,),
            logit_softcap=(None,),
        ),
        _LLAMA_LIKE[0]: list_gaps(
            config,
            model_family=("gpt2", "llama", "modern"),
            norm=("rms",),
            positions=("rope",),
            feed_forward=tuple(_GATES.values()),
            qk_norm=(False,),
            logit_softcap=(None,),
        ),
    }
    architecture = min(gaps, key=lambda name: len(gaps[name]))
    if gaps[architecture]:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{architecture}, the nearest class of transformers, lacks parts of this model: "
            + ", ".join(gaps[architecture]),
            "nothing was written; such a model stays here, or train one of --model-family gpt2 or "
            "llama",
        )
    return architecture


def list_gaps(config: ModelConfig, **allowed: Iterable[Any]) -> list[str]:
    """The parts of a model that are not among those allowed, as ``norm rms``."""
    return [
        f"{name} {getattr(config, name)}"
        for name, values in allowed.items()
        if getattr(config, name) not in values
    ]


def write_config(config: ModelConfig, end_of_text_id: int, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``, for `find_export_architecture`'s class.

    Args:
        config: with biases wherever the class has them.
        end_of_text_id: comes after each document; it begins one too.
        dtype: of the weights, as torch calls it.
    """
    architecture = find_export_architecture(config)
    shared = {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": dtype,  # as transformers 4 calls it; 5 reads it too
        "use_cache": True,
    }
    write = _write_gpt2 if architecture == GPT2 else _write_llama
    return shared | write(config)


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.n_embeddings,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "n_inner": config.ffn_hid_dim,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_GATES.items())}
    scaling: dict[str, Any] | None = None
    if config.rope_scaling == "linear":
        scaling = {"type": "linear", "rope_type": "linear", "factor": config.rope_factor}
    return {
        "model_type": "llama",
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embeddings,
        "intermediate_size": config.ffn_hid_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": names[config.feed_forward],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }
