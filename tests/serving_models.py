"""Tiny models for the tests of the server, and what they answer alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from generate import stream_ids
from preflight.checkpoints.saving import save_checkpoint
from preflight.models.base import TokenModel
from preflight.serving.protocol import Job
from preflight.settings import ModelConfig, SamplingConfig
from preflight.settings.kinds import MODELS
from preflight.tokenization.raw_bytes import ByteTokenizer


@functools.cache
def make_model(family: str = "gpt2", context_length: int = 48) -> TokenModel:
    """A model of two layers with random weights, large enough to make texts differ."""
    torch.manual_seed(3)
    llama = {"n_kv_heads": 1, "norm": "rms", "positions": "rope", "feed_forward": "swiglu"}
    parts: dict[str, Any] = llama if family == "llama" else {}
    config = ModelConfig(
        vocab_size=make_tokenizer().vocab_size,
        context_length=context_length,
        n_embeddings=32,
        n_heads=1 if family == "mlp" else 2,
        n_layers=2,
        ffn_hid_dim=64,
        model_family=family,
        **parts,
    )
    model: TokenModel = MODELS.load(family)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.embed_tokens.weight[256] *= 0.5  # texts that end early show little
    return model.eval().requires_grad_(False)


@functools.cache
def make_tokenizer() -> ByteTokenizer:
    return ByteTokenizer.load("byte")


def answer_alone(model: TokenModel, job: Job) -> tuple[str, str, int]:
    """Text, reason and number of tokens, as `stream_ids` gives them."""
    ended: list[tuple[str, int]] = []
    stops = job.stop_ids | {make_tokenizer().end_of_text_id}
    pieces = stream_ids(
        model,
        make_tokenizer(),
        job.ids,
        job.sampling,
        lambda found, n: ended.extend((g.finish_reason, g.n_tokens) for _, g in found),
        job.index,
        stops,
    )
    text = "".join(pieces)
    [(reason, n_tokens)] = ended
    return text, "length" if reason == "length" else "stop", n_tokens


def make_job(ids: Sequence[int], index: int = 0, **sampling: object) -> Job:
    return Job(list(ids), SamplingConfig(**sampling), index=index)  # type: ignore[arg-type]


def save_run(folder: Path, model: TokenModel, step: int = 1) -> Path:
    """A run's folder with a checkpoint of the model."""
    tokenizer = make_tokenizer()
    config = {"model": dataclasses.asdict(model.config), "tokenizer": tokenizer.describe()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    losses = {"val_loss": 10.0 / step}
    return save_checkpoint(folder, step, weights, {}, config, losses, tokenizer).path
