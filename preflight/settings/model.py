"""The architecture: presets, the flags, and the complete configuration of a model."""

import bisect
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from preflight.settings.kinds import ACTIVATIONS, FEED_FORWARDS, MODELS, NORMS, POSITIONS
from preflight.settings.options import MAX_COUNT, check_fields, setting


@dataclass(frozen=True)
class ModelPreset:
    """A named size. ``learning_rate`` is the peak learning rate that this size trains well with."""

    n_layers: int
    n_heads: int
    n_embeddings: int
    ffn_hid_dim: int
    context_length: int
    learning_rate: float


# small to xl are the shapes published as GPT-2 117M to 1.5B (Radford et al. 2019, table 2);
# their learning rates follow GPT-3 (Brown et al. 2020, table 2.1).
MODEL_PRESETS = {
    "nano": ModelPreset(2, 4, 128, 512, 128, 2e-3),
    "micro": ModelPreset(4, 8, 256, 1024, 256, 1e-3),
    "tiny": ModelPreset(5, 8, 512, 2048, 512, 8e-4),
    "small": ModelPreset(12, 12, 768, 3072, 1024, 6e-4),
    "medium": ModelPreset(24, 16, 1024, 4096, 1024, 3e-4),
    "large": ModelPreset(36, 20, 1280, 5120, 1024, 2.5e-4),
    "xl": ModelPreset(48, 25, 1600, 6400, 1024, 2e-4),
}


def choose_learning_rate(n_layers: int, hidden_size: int) -> float:
    """The peak learning rate for a model of this size: a preset's, or one between two presets'.

    Between them its logarithm is linear in that of the size, layers x hidden size squared, to which
    the blocks' parameters are proportional. Outside of all presets it is that of the nearest.
    """
    presets = sorted(MODEL_PRESETS.values(), key=_measure_blocks)
    sizes = [math.log(_measure_blocks(preset)) for preset in presets]
    size = math.log(max(1, n_layers * hidden_size**2))
    above = bisect.bisect_left(sizes, size)
    if above == 0 or above == len(presets):
        return presets[min(above, len(presets) - 1)].learning_rate
    low, high = presets[above - 1].learning_rate, presets[above].learning_rate
    share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    return float(f"{low ** (1 - share) * high**share:.2g}")  # a preset's own comes out as it is


def _measure_blocks(preset: ModelPreset) -> int:
    return preset.n_layers * preset.n_embeddings**2


CUSTOM_SIZE_FIELDS = ("n_layers", "n_heads", "n_embeddings", "context_length")


# The parts that each family of `MODELS` prefers; all others are GPT-2's. A flag overrides them.
MODEL_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    # Touvron et al. 2023 (arXiv:2302.13971), section 2.2.
    "llama": {
        "norm": "rms",
        "positions": "rope",
        "feed_forward": "swiglu",
        "bias": False,
        "tied": False,
    },
    # A squared ReLU keeps as little as GELU does and computes less than a gate (So et al. 2021,
    # arXiv:2109.08668); norms of queries and keys allow large learning rates (Henry et al. 2020,
    # arXiv:2010.04245). With SwiGLU, or an output head of its own, less was learned in the same
    # time (benchmarks/LOG.md).
    "modern": {
        "norm": "rms",
        "positions": "rope",
        "activation": "relu_squared",
        "bias": False,
        "qk_norm": True,
    },
    # Bengio et al. 2003: the last n tokens, one or more hidden layers, and no attention.
    "mlp": {"context_length": 16, "n_heads": 1, "activation": "tanh"},
}
_PARTS_OF_MLP = {"model_family", "bias", "tied", "logit_softcap"}
ROPE_SCALINGS = ("none", "linear", "ntk")
GATED_MULTIPLE = 64  # gated hidden sizes are multiples of it, as Llama's are


@dataclass(frozen=True)
class ModelConfig:
    """A model's architecture, complete: what a checkpoint's ``config.json`` holds.

    Raises:
        ValueError: naming every field whose value is impossible.
    """

    vocab_size: int = setting(ge=1)
    context_length: int = setting(ge=1)
    n_embeddings: int = setting(ge=1)
    n_heads: int = setting(ge=1)
    n_layers: int = setting(ge=1)
    ffn_hid_dim: int = setting(ge=1)
    activation: str = setting("gelu_tanh", choices=ACTIVATIONS)
    dropout: float = setting(0.0, ge=0, lt=1)
    # The defaults of what follows are GPT-2: older checkpoints do not name them.
    model_family: str = setting("gpt2", choices=MODELS)
    n_kv_heads: int | None = setting(None, ge=1)
    norm: str = setting("layer", choices=NORMS)
    norm_eps: float = setting(1e-5, gt=0, lt=1)
    qk_norm: bool = setting(False)
    positions: str = setting("learned", choices=POSITIONS)
    rope_theta: float = setting(10_000.0, gt=1)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_factor: float = setting(1.0, ge=1)
    feed_forward: str = setting("mlp", choices=FEED_FORWARDS)
    bias: bool = setting(True)
    tied: bool = setting(True)
    logit_softcap: float | None = setting(None, gt=0)

    def __post_init__(self) -> None:
        check_fields(self)
        faults = _find_part_faults(self)
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def label(self) -> str:
        """The shape in one word: layers, hidden size, attention heads, as in ``12L-768H-12A``.

        Of families other than GPT-2, the name and the feed-forward size follow.
        """
        shape = f"{self.n_layers}L-{self.n_embeddings}H-{self.n_heads}A"
        if not self.list_changed_parts():
            return shape
        return f"{shape} {self.model_family} (feed-forward size {self.ffn_hid_dim:,})"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: as many as of queries, unless these share them."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.n_embeddings // self.n_heads

    def list_changed_parts(self) -> dict[str, Any]:
        """The parts that are not GPT-2's, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)[_N_FIRST_FIELDS:]
            if getattr(self, item.name) != item.default
        }


_N_FIRST_FIELDS = 8  # that every checkpoint names
PART_NAMES = tuple(item.name for item in fields(ModelConfig)[_N_FIRST_FIELDS:])


def _find_part_faults(config: ModelConfig) -> list[str]:
    """Parts that do not fit together, each message beginning with the name of a field."""
    faults = []
    if config.n_embeddings % config.n_heads:
        faults.append(
            f"n_heads {config.n_heads} does not divide n_embeddings {config.n_embeddings}"
        )
    if config.n_heads % config.kv_heads:
        faults.append(f"n_kv_heads {config.n_kv_heads} does not divide n_heads {config.n_heads}")
    changed = config.list_changed_parts()
    if config.model_family == "mlp":
        extra = {name: value for name, value in changed.items() if name not in _PARTS_OF_MLP}
        extra |= {"n_heads": config.n_heads} if config.n_heads > 1 else {}
        return [f"{name} {value} is no part of model_family mlp" for name, value in extra.items()]
    rope = [name for name in changed if name.startswith("rope_")]
    if config.positions != "rope":
        faults += [f"{name} {changed[name]} needs positions rope" for name in rope]
    elif not faults and config.head_dim % 2:
        faults.append(f"positions rope needs heads of an even size, not {config.head_dim}")
    elif (config.rope_scaling == "none") != (config.rope_factor == 1):
        faults.append("rope_factor above 1 and rope_scaling linear or ntk need each other")
    elif config.rope_scaling == "ntk" and config.head_dim == 2:
        faults.append("rope_scaling ntk needs heads of a size above 2")
    if config.feed_forward != "mlp" and config.activation != "gelu_tanh":
        faults.append(f"activation {config.activation} needs feed_forward mlp")
    return faults


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` holds: parts that are GPT-2's are left out, as older versions did."""
    first = {item.name: getattr(config, item.name) for item in fields(config)[:_N_FIRST_FIELDS]}
    return first | config.list_changed_parts()


def model_config_from_dict(values: Any) -> ModelConfig:
    """The architecture in a checkpoint's ``config.json``.

    Raises:
        ValueError: a key is missing, unknown, or holds an impossible value.
    """
    if not isinstance(values, dict):
        raise ValueError("the model section is not an object")
    known = {item.name for item in fields(ModelConfig)}
    required = {item.name for item in fields(ModelConfig) if item.default is MISSING}
    odd = (set(values) - known) | (required - set(values))
    if odd:
        raise ValueError(f"unknown or missing keys: {', '.join(sorted(map(str, odd)))}")
    return ModelConfig(**values)


@dataclass(frozen=True)
class ModelSettings:
    """The model's architecture; unset values come from the preset or the tokenizer."""

    model_size: str = setting(
        "micro",
        "preset to start from; the flags below override it",
        choices=(*MODEL_PRESETS, "custom"),
    )
    tokenizer: str = setting(
        "auto",
        "auto: bpe for a text below 50 MiB, else gpt2; bpe and char are made from the text; byte, "
        "gpt2 (included) or another tiktoken encoding by name; a Hugging Face tokenizer.json or a "
        "SentencePiece .model by its path",
    )
    vocab_size: int | None = setting(
        None,
        "vocabulary size of the model; unset: the tokenizer's. With bpe, the size to train",
        ge=2,
        le=MAX_COUNT,
    )
    context_length: int | None = setting(None, "context length in tokens", ge=2, le=1_048_576)
    n_embeddings: int | None = setting(None, "hidden size (d_model)", ge=1, le=65_536)
    n_heads: int | None = setting(
        None, "attention heads per block; must divide the hidden size", ge=1, le=1024
    )
    n_layers: int | None = setting(None, "number of transformer blocks", ge=1, le=1024)
    ffn_hid_dim: int | None = setting(
        None,
        "feed-forward hidden size (d_ff); unset: the preset's, or 4 x the hidden size",
        ge=1,
        le=262_144,
    )
    model_family: str = setting(
        "gpt2", "where the parts come from that the flags below leave unset", choices=MODELS
    )
    activation: str | None = setting(
        None,
        "feed-forward activation function; unset: the family's (gpt2: gelu_tanh)",
        choices=ACTIVATIONS,
    )
    dropout: float = setting(0.0, "dropout probability in training", ge=0, lt=1)
    n_kv_heads: int | None = setting(
        None,
        "heads of keys and values, shared by groups of attention heads; unset: as many as heads",
        ge=1,
        le=1024,
    )
    norm: str | None = setting(
        None, "layer or root-mean-square norm; unset: the family's", choices=NORMS
    )
    norm_eps: float | None = setting(
        None, "added to the variance in a norm; unset: 1e-5", gt=0, lt=1
    )
    qk_norm: bool | None = setting(
        None, "normalise queries and keys in each head; unset: the family's"
    )
    positions: str | None = setting(
        None, "a table of positions, or rotary positions; unset: the family's", choices=POSITIONS
    )
    rope_theta: float | None = setting(
        None, "base of the rotary frequencies; unset: 10,000", gt=1, le=1e12
    )
    rope_scaling: str | None = setting(
        None,
        "how rotary positions are stretched to longer contexts: positions divided by the factor "
        "(linear), or a larger theta (ntk)",
        choices=ROPE_SCALINGS,
    )
    rope_factor: float | None = setting(
        None, "how many times longer the context is made by --rope-scaling", ge=1, le=1e6
    )
    feed_forward: str | None = setting(
        None,
        "two layers, or a gate (SiLU, GELU or ReLU) beside the first; unset: the family's",
        choices=FEED_FORWARDS,
    )
    bias: bool | None = setting(None, "biases in linear layers and norms; unset: the family's")
    tied: bool | None = setting(None, "the output head is the table of tokens; unset: the family's")
    logit_softcap: float | None = setting(
        None, "bound of the logits, by cap * tanh(logits / cap); unset: none", gt=0, le=1e6
    )

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The model to build, with `vocab_size` ids unless the flags ask for more.

        Raises:
            ValueError: naming every part that does not fit the others.
        """
        return ModelConfig(**self.choose_values(vocab_size))

    @property
    def learning_rate(self) -> float:
        """The peak learning rate for a model of this size; see `choose_learning_rate`."""
        shape = self.choose_values(1)
        return choose_learning_rate(shape["n_layers"], shape["n_embeddings"])

    def choose_values(self, vocab_size: int) -> dict[str, Any]:
        """The fields of `resolve`, whether or not they fit together."""
        preset = MODEL_PRESETS.get(self.model_size)
        family = MODEL_FAMILIES.get(self.model_family, {})
        shape: dict[str, Any] = {
            name: getattr(self, name) or family.get(name) or getattr(preset, name, 0)
            for name in CUSTOM_SIZE_FIELDS
        }
        parts = self._choose_parts()
        # Another hidden size without a feed-forward size keeps GPT-2's ratio of four.
        keeps_preset = preset is not None and self.n_embeddings is None
        ffn = preset.ffn_hid_dim if preset and keeps_preset else 4 * shape["n_embeddings"]
        if parts["feed_forward"] != "mlp":
            # Three matrices in the place of two: two thirds of it are as many parameters.
            ffn = -(-(2 * ffn // 3) // GATED_MULTIPLE) * GATED_MULTIPLE
        return {
            "vocab_size": self.vocab_size or vocab_size,
            "ffn_hid_dim": self.ffn_hid_dim or ffn,
            "dropout": self.dropout,
            **shape,
            **parts,
        }

    def _choose_parts(self) -> dict[str, Any]:
        """Each part: the flag's, else the family's, else GPT-2's."""
        defaults = {f.name: f.default for f in fields(ModelConfig) if f.default is not MISSING}
        given = {name: getattr(self, name) for name in ("activation", *PART_NAMES)}
        given = {name: value for name, value in given.items() if value is not None}
        family = MODEL_FAMILIES.get(self.model_family, {})
        family = {name: value for name, value in family.items() if name not in CUSTOM_SIZE_FIELDS}
        parts = {name: defaults[name] for name in ("activation", *PART_NAMES)} | family | given
        if parts["feed_forward"] != "mlp" and self.activation is None:
            parts["activation"] = defaults["activation"]  # the gate has its own
        return parts
