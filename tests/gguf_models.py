"""Small models with random weights, large enough that a wrong row shows in the logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from preflight.formats.proof import build_texts
from preflight.formats.protocol import OutgoingModel
from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig
from preflight.tokenization import Tokenizer
from preflight.tokenization.loading import load_tokenizer
from preflight.tokenization.own_bpe import OwnBpeTokenizer

SHAPE = {"context_length": 64, "n_embeddings": 64, "n_heads": 4, "n_layers": 2, "ffn_hid_dim": 96}
LLAMA = {
    "model_family": "llama",
    "norm": "rms",
    "positions": "rope",
    "feed_forward": "swiglu",
    "bias": False,
}
# Kinds of models that a GGUF file can hold, by the tests' names for them.
KINDS = {
    "gpt2": {},
    "gpt2-untied-without-bias": {"tied": False, "bias": False, "norm_eps": 1e-3},
    "gpt2-grouped": {"n_kv_heads": 2},
    "llama": LLAMA | {"tied": False, "rope_theta": 123_456.7},
    "llama-tied-grouped": LLAMA | {"n_kv_heads": 2, "norm_eps": 1e-2},
    "llama-bias": LLAMA | {"bias": True, "n_kv_heads": 1},
    "llama-linear": LLAMA | {"rope_scaling": "linear", "rope_factor": 3.0},
    "llama-ntk": LLAMA | {"rope_scaling": "ntk", "rope_factor": 3.0},
}


class _Text:
    """What a vocabulary is trained on: `TrainingText`."""

    text = "".join(build_texts(load_tokenizer("byte"), 400, seed=7)) + "The quick brown fox. " * 40

    def count_bytes(self, *splits: str) -> int:
        return len(self.text.encode())

    def read(self, *splits: str) -> Iterator[str]:
        yield self.text


@functools.cache
def load(name: str) -> Tokenizer:
    """A tokenizer: ``bpe`` has 600 ids of its own."""
    return OwnBpeTokenizer.train(_Text(), 600) if name == "bpe" else load_tokenizer(name)


def make_model(kind: str, tokenizer: str = "bpe", n_spare: int = 8, seed: int = 1) -> OutgoingModel:
    """A model with `n_spare` more rows than the tokenizer has ids."""
    ids = load(tokenizer)
    config = ModelConfig(vocab_size=ids.vocab_size + n_spare, **SHAPE | KINDS[kind])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in build_on_meta(config).state_dict().items():
        scale = 0.3 if weight.dim() == 1 else 0.15
        weights[name] = scale * torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    sample = torch.from_numpy(ids.encode(_Text.text)[:200].astype("int64"))
    facts = {"name": f"a {kind}"}
    return OutgoingModel(config, weights, ids, "{{ messages }}", facts, sample)
