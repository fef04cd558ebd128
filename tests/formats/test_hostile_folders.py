"""Folders that a stranger wrote: what we lack is refused by name, damage never ends in a crash."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.shapes import GPT2, LLAMA, TEMPLATE, draw_model, train_bpe

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.hf_config import read_config, write_config
from preflight.formats.hf_export import HuggingFaceExporter
from preflight.formats.hf_import import HuggingFaceImporter
from preflight.formats.proof import prove_tokenizer
from preflight.formats.protocol import ImportedModel
from preflight.settings import ModelConfig

LLAMA_VALUES = write_config(LLAMA, 256, "float32")
GPT2_VALUES = write_config(GPT2, 256, "float32")


@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_a_configuration_comes_back(config: ModelConfig) -> None:
    assert read_config(write_config(config, 256, "float32")) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling 'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16}, "sliding_window 16"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 10**30, "head_dim": None}, "n-embeddings"),
        ({"num_hidden_layers": 10**9}, "n-layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
    ],
)
def test_what_we_lack_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_config(LLAMA_VALUES | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"activation_function": "quick_gelu"},
        {"n_embd": 33},
    ],
)
def test_what_gpt2_computes_otherwise_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).replace("n_embd", "n_heads")):
        read_config(GPT2_VALUES | changes)


def test_a_window_as_long_as_the_context_is_none() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    values = {name: v for name, v in LLAMA_VALUES.items() if "bias" not in name}
    assert read_config(values | mistral) == LLAMA


# ---- damage -------------------------------------------------------------------------------------

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("written")
    model = draw_model(
        {"gpt2": GPT2, "llama": LLAMA}[request.param], train_bpe(), template=TEMPLATE
    )
    HuggingFaceExporter().export(model, folder, "f32")
    (folder / "chat_template.jinja").unlink()
    return folder


def damage(content: bytes, draw: random.Random, head: int) -> bytes:
    """One of the ways in which a file differs from a good one, mostly within its first bytes."""
    data = bytearray(content)
    at = draw.randrange(min(head, len(data)))
    kind = draw.randrange(6)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + draw.randrange(20)] = draw.randbytes(draw.randrange(20))
    elif kind == 3:  # a number grows
        data[at:at] = b"9" * draw.randrange(1, 30)
    elif kind == 4:
        words = (b"null", b"-1", b"1e999", b"true", b"[]", b"{}", b'"x"', b"[" * 2000, b"\xff")
        data[at : at + 4] = draw.choice(words)
    else:
        other = draw.randrange(min(head, len(data)))
        data[at : at + 30], data[other : other + 30] = data[other : other + 30], data[at : at + 30]
    return bytes(data)


def mutate(written: Path, folder: Path, count: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    for name in FILES:
        shutil.copyfile(written / name, folder / name)
    for number in range(count):
        name = FILES[number % len(FILES)]
        content = (written / name).read_bytes()
        head = 3000 if name == "model.safetensors" else len(content)
        (folder / name).write_bytes(damage(content, draw, head))
        yield name
        shutil.copyfile(written / name, folder / name)


def import_mutants(written: Path, folder: Path, count: int) -> int:
    """How many of the mutants are refused; each with exit code 5, and the others are models."""
    n_refused = 0
    for name in mutate(written, folder, count, seed=count):
        try:
            found = HuggingFaceImporter().read(folder)
        except PreflightError as error:
            assert error.code == ExitCode.CHECKPOINT, (name, error)
            assert len(error.lines) <= 5
            n_refused += 1
        else:
            check_model(found)
    return n_refused


def check_model(found: ImportedModel) -> None:
    n_weights = sum(weight.numel() for weight in found.weights.values())
    assert n_weights < 200_000
    assert all(bool(weight.isfinite().all()) for weight in found.weights.values())
    assert found.tokenizer.vocab_size <= found.config.vocab_size


def test_mutants_are_refused_or_models(written: Path, tmp_path: Path) -> None:
    assert import_mutants(written, tmp_path, 150) > 60


@pytest.mark.slow
def test_thousands_of_mutants(written: Path, tmp_path: Path) -> None:
    HuggingFaceImporter().read(written)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert import_mutants(written, tmp_path, 2500) > 1000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # KiB: of tensors and vocabularies of less than one


def test_an_index_names_plain_files_alone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "x")
    index = tmp_path / "x" / "model.safetensors.index.json"
    shutil.copyfile(written / "model.safetensors", tmp_path / "outside.safetensors")
    for parts in (
        {"a": "../outside.safetensors"},
        {"a": str(tmp_path / "outside.safetensors")},
        {"a": "/etc/passwd"},
        {"a": 3},
        {},
        {"a": "gone.safetensors"},
        {str(i): f"{i}.safetensors" for i in range(2000)},
    ):
        index.write_text(json.dumps({"weight_map": parts}))
        with pytest.raises(PreflightError) as caught:
            HuggingFaceImporter().read(tmp_path / "x")
        assert caught.value.code == ExitCode.CHECKPOINT


def test_a_tensor_that_is_missing_too_much_or_no_float_is_named(
    written: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "x"
    shutil.copytree(written, folder)
    tensors = load_file(written / "model.safetensors")
    name = next(name for name in sorted(tensors) if "norm" in name or "ln_1" in name)
    for changed, told in (
        ({name: None}, "is missing"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "belongs to no part"),
        ({name: torch.ones(3)}, "has the shape"),
        ({name: torch.ones(32, dtype=torch.int64)}, "not floating-point"),
        ({name: torch.full((32,), torch.nan)}, "NaN"),
    ):
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(PreflightError, match=told):
            HuggingFaceImporter().read(folder)


def test_what_is_not_there_is_named(written: Path, tmp_path: Path) -> None:
    for gone, told in (
        ("model.safetensors", "pickles are not read"),
        ("tokenizer.json", "neither"),
    ):
        folder = tmp_path / gone
        shutil.copytree(written, folder)
        (folder / gone).unlink()
        with pytest.raises(PreflightError, match=told):
            HuggingFaceImporter().read(folder)
    prove_tokenizer(train_bpe(), HuggingFaceImporter().read(written).tokenizer)
