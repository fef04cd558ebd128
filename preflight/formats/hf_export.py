"""Models to folders of Hugging Face, as `from_pretrained` of transformers reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.weights import build_header, iterate_bytes
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.libraries import import_library
from preflight.formats.hf_config import GPT2, find_export_architecture, write_config
from preflight.formats.hf_import import (
    CONFIG_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    HuggingFaceImporter,
)
from preflight.formats.model_card import write_card
from preflight.formats.names import list_gpt2_parts, list_llama_parts, list_shapes
from preflight.formats.proof import describe_computation, measure_change, proof_error, prove_equal
from preflight.formats.protocol import OutgoingModel
from preflight.formats.safetensors_files import WEIGHTS_NAME, read_json_file
from preflight.formats.tokenizer_export import build_tokenizer_json, list_special_tokens
from preflight.formats.transformers_check import ask_transformers
from preflight.tokenization import Tokenizer
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_TYPE_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_MAX_F16 = 65_504.0


class HuggingFaceExporter:
    """Writes folders that transformers, vLLM and others load."""

    name = "huggingface"
    quantizations = tuple(_TYPES)
    makes_folder = True

    def accepts(self, path: Path) -> bool:
        """Any name without an ending that means another format; the row is asked last."""
        return path.suffix not in (".gguf", ".safetensors", ".pt", ".bin", ".onnx")

    def check(self, model: OutgoingModel, quantization: str) -> None:
        """Refuse what transformers has no class or no tokenizer for."""
        find_export_architecture(model.config)
        build_tokenizer_json(model.tokenizer)
        import_library("tokenizers", "tokenizers", "--export to a folder, which is read back,")
        if quantization == "f16":
            for name, weight in model.weights.items():
                if float(weight.abs().max()) > _MAX_F16:
                    raise PreflightError(
                        ExitCode.CHECKPOINT,
                        f"{name} has values above {_MAX_F16:,.0f}, which f16 does not hold",
                        "use --quantize bf16 or f32",
                    )

    def export(self, model: OutgoingModel, path: Path, quantization: str) -> None:
        """Write all files into the folder."""
        model = round_model(model, quantization)
        end = model.tokenizer.end_of_text_id
        # A stretched theta is written as the theta that it is.
        config = write_config(describe_computation(model.config), end, _TYPE_NAMES[quantization])
        _write_weights(path / WEIGHTS_NAME, model, quantization)
        _write_json(path / CONFIG_NAME, config)
        stops = {"bos_token_id": end, "eos_token_id": list_stop_ids(model)}
        _write_json(path / "generation_config.json", stops)
        _write_json(path / "tokenizer.json", build_tokenizer_json(model.tokenizer))
        _write_json(path / TOKENIZER_CONFIG_NAME, _describe_tokenizer(model))
        if model.chat_template is not None:  # where transformers 5 looks first
            (path / TEMPLATE_NAME).write_bytes(model.chat_template.encode())
        (path / "README.md").write_bytes(write_card(model, quantization).encode())

    def verify(self, model: OutgoingModel, path: Path, quantization: str) -> list[str]:
        """Compare what our own importer reads, then what transformers computes."""
        meant = round_model(model, quantization)
        try:
            found = HuggingFaceImporter().read(path)
        except PreflightError as error:
            if error.code == ExitCode.FLAGS:  # a library is missing
                raise
            raise proof_error("it cannot be read back", *error.lines[:1]) from None
        lines = [*prove_equal(meant, found), *_prove_files(meant, path)]
        del found
        if quantization != "f32" and model.sample is not None and len(model.sample) > 1:
            weights = _complete(model).weights
            lines.append(
                measure_change(meant.config, weights, meant.weights, model.sample).describe()
            )
        return lines + ask_transformers(meant, path)


# ---- what is meant ------------------------------------------------------------------------------


def round_model(model: OutgoingModel, quantization: str) -> OutgoingModel:
    """The model as the file holds it: biases wherever the class has them, weights rounded."""
    model = _complete(model)
    dtype = _TYPES[quantization]
    weights = {name: weight.to(dtype).float() for name, weight in model.weights.items()}
    return dataclasses.replace(model, weights=weights)


def _complete(model: OutgoingModel) -> OutgoingModel:
    """The model with biases of zero, where its class always has biases and it has none."""
    if model.config.bias or find_export_architecture(model.config) != GPT2:
        return model
    config = dataclasses.replace(model.config, bias=True)
    shapes = list_shapes(config)
    zeros = {name: torch.zeros(shapes[name]) for name in shapes.keys() - model.weights.keys()}
    return dataclasses.replace(model, config=config, weights=model.weights | zeros)


def list_stop_ids(model: OutgoingModel) -> list[int]:
    """The ids that end an answer: the end of text, and the special tokens that its template has
    and that are called an end.
    """
    template = model.chat_template or ""
    special = list_special_tokens(model.tokenizer)
    ends = [
        i
        for name, i in special.items()
        if name in template and ("end" in name.lower() or name in ("</s>", "<|eot_id|>"))
    ]
    return list(dict.fromkeys([model.tokenizer.end_of_text_id, *ends]))


def _find_end_of_text(tokenizer: Tokenizer) -> str:
    """How the end of text is called."""
    names = list_special_tokens(tokenizer)
    return next(name for name, i in names.items() if i == tokenizer.end_of_text_id)


# ---- files --------------------------------------------------------------------------------------


def _write_weights(path: Path, model: OutgoingModel, quantization: str) -> None:
    list_parts = (
        list_gpt2_parts if find_export_architecture(model.config) == GPT2 else list_llama_parts
    )
    dtype = _TYPES[quantization]
    tensors: dict[str, Tensor] = {}
    for part in list_parts(model.config):
        tensors.update(part.split(model.weights[part.name].to(dtype)))
    with open(path, "xb") as file:
        file.write(build_header(tensors))
        for content in iterate_bytes(tensors):
            file.write(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_bytes(text.encode() + b"\n")


def _describe_tokenizer(model: OutgoingModel) -> dict[str, Any]:
    """``tokenizer_config.json``. Only the template puts a token before a text."""
    end = _find_end_of_text(model.tokenizer)
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
        "model_max_length": model.config.context_length,
    }
    if model.chat_template is not None:
        content["chat_template"] = model.chat_template
    return content


# ---- the rest of the proof ----------------------------------------------------------------------


def _prove_files(meant: OutgoingModel, path: Path) -> list[str]:
    """What equal weights and equal ids do not show: the merges' order, tokens put before a text."""
    document = read_document(path / "tokenizer.json")
    expected = build_tokenizer_json(meant.tokenizer)
    if document != expected:
        part = next(key for key in expected if document.get(key) != expected[key])
        raise proof_error(f"{part} of tokenizer.json differs")
    if isinstance(meant.tokenizer, TiktokenTokenizer):
        _prove_merges(document["model"])
    config = read_json_file(path / CONFIG_NAME)
    end = meant.tokenizer.end_of_text_id
    for name in ("bos_token_id", "eos_token_id"):
        if config.get(name) != end:
            raise proof_error(f"{name} is {config.get(name)}, not {end}")
    stops = read_json_file(path / "generation_config.json").get("eos_token_id")
    if stops != list_stop_ids(meant):
        raise proof_error(f"generation ends at {stops}, not at {list_stop_ids(meant)}")
    return [f"generation ends at {', '.join(map(str, stops))}"]


def read_document(path: Path) -> dict[str, Any]:
    """A ``tokenizer.json`` of ours."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _prove_merges(model: dict[str, Any]) -> None:
    """Merges stand in the order of the ids that they give, as ranks do."""
    ids = [model["vocab"].get(first + second) for first, second in model["merges"]]
    if None in ids or ids != sorted(ids) or len(set(ids)) != len(ids):
        raise proof_error("the merges of its tokenizer are not in the order of their ids")
