"""The architecture: presets, the flags, and the complete configuration of a model."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from preflight.settings.kinds import ACTIVATIONS
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
CUSTOM_SIZE_FIELDS = ("n_layers", "n_heads", "n_embeddings", "context_length")


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

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_embeddings % self.n_heads:
            raise ValueError(
                f"n_heads {self.n_heads} does not divide n_embeddings {self.n_embeddings}"
            )

    @property
    def label(self) -> str:
        """The shape in one word: layers, hidden size, attention heads, as in ``12L-768H-12A``."""
        return f"{self.n_layers}L-{self.n_embeddings}H-{self.n_heads}A"


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
    activation: str = setting(
        "gelu_tanh", "feed-forward activation function; GPT-2 uses gelu_tanh", choices=ACTIVATIONS
    )
    dropout: float = setting(0.0, "dropout probability in training", ge=0, lt=1)

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The model to build, with `vocab_size` ids unless the flags ask for more."""
        preset = MODEL_PRESETS.get(self.model_size)
        shape = {
            name: getattr(self, name) or (getattr(preset, name) if preset else 0)
            for name in CUSTOM_SIZE_FIELDS
        }
        # Another hidden size without a feed-forward size keeps GPT-2's ratio of four.
        keeps_preset = preset is not None and self.n_embeddings is None
        ffn = preset.ffn_hid_dim if preset and keeps_preset else 4 * shape["n_embeddings"]
        return ModelConfig(
            vocab_size=self.vocab_size or vocab_size,
            ffn_hid_dim=self.ffn_hid_dim or ffn,
            activation=self.activation,
            dropout=self.dropout,
            **shape,
        )
