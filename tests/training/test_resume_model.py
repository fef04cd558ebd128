"""A resumed run keeps its checkpoint's model: flags of another one are refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from preflight.checkpoints.format import Checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ModelSettings, build_config
from preflight.training.resume import check_model_flags


def check(saved: dict[str, Any], flags: dict[str, Any]) -> None:
    origin = SimpleNamespace(
        path=Path("checkpoint-1"),
        model_config=ModelSettings(**saved).resolve(97),
        config={"tokenizer": {"name": "gpt2"}},
    )
    config = build_config(flags, dict.fromkeys(flags, "the command line"))
    check_model_flags(config, cast(Checkpoint, origin))


LLAMA = {"model_family": "llama", "model_size": "nano", "n_kv_heads": 2}
MODERN = {"model_family": "modern"}
NGRAM = {"model_family": "mlp"}
THREE_HEADS = {"n_embeddings": 96, "n_heads": 6, "n_kv_heads": 3}


@pytest.mark.parametrize(
    ("saved", "flags"),
    [
        *((LLAMA, f) for f in ({}, LLAMA, {"model_size": "nano"}, {"n_kv_heads": 2})),
        (LLAMA, {"model_family": "llama"}),
        *((NGRAM, flags) for flags in ({}, NGRAM, {"activation": "tanh"}, {"context_length": 16})),
        # The preset's eight heads, which no flag replaces, have nothing to do with it.
        *((THREE_HEADS, flags) for flags in ({}, {"norm": "layer"}, THREE_HEADS)),
    ],
)
def test_flags_of_the_same_model_are_accepted(saved: dict[str, Any], flags: dict[str, Any]) -> None:
    check(saved, flags)


@pytest.mark.parametrize(
    ("saved", "flags", "words"),
    [
        (LLAMA, {"model_family": "gpt2"}, "model_family: checkpoint llama, flags gpt2"),
        ({}, {"model_family": "mlp"}, "model_family: checkpoint gpt2, flags mlp"),
        ({}, {"positions": "rope"}, "positions: checkpoint learned, flags rope"),
        (LLAMA, {"n_kv_heads": 4}, "n_kv_heads: checkpoint 2, flags 4"),
        (LLAMA, {"tied": True}, "tied: checkpoint False, flags True"),
        (LLAMA, {"model_size": "micro"}, "ffn_hid_dim: checkpoint 384, flags 704"),
        # Flags that fit each other, though not the checkpoint's other parts.
        (LLAMA, {"activation": "relu"}, "activation: checkpoint gelu_tanh, flags relu"),
        (MODERN, {"feed_forward": "geglu"}, "feed_forward: checkpoint mlp, flags geglu"),
        (NGRAM, {"positions": "rope"}, "positions: checkpoint learned, flags rope"),
        (NGRAM, {"n_kv_heads": 2}, "n_kv_heads: checkpoint None, flags 2"),
    ],
)
def test_another_model_is_refused_by_name(
    saved: dict[str, Any], flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(PreflightError) as caught:
        check(saved, flags)
    assert caught.value.code == ExitCode.CHECKPOINT
    assert words in str(caught.value)
