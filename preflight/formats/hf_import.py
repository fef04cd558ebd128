"""Models from folders of Hugging Face: `config.json`, safetensors, a tokenizer, a chat template."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.damage import first_line
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.storage import open_regular
from preflight.formats.hf_config import GPT2, find_architecture, read_config
from preflight.formats.names import Part, list_gpt2_parts, list_llama_parts
from preflight.formats.protocol import ImportedModel
from preflight.formats.safetensors_files import TensorFiles, open_tensors, read_json_file
from preflight.settings import ModelConfig
from preflight.settings.kinds import TOKENIZER_FILES
from preflight.tokenization import MissingLibraryError, Tokenizer

CONFIG_NAME = "config.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
MAX_TEMPLATE_BYTES = 2**20
_HEAD_NAME = "lm_head.weight"
# Buffers that older versions of transformers saved: masks, and the frequencies of rotations.
_BUFFER_ENDINGS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def refuse(path: Path, error: OSError | ValueError) -> PreflightError:
    """The error for a model that cannot be imported: code CHECKPOINT."""
    what = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{path} cannot be imported: {first_line(ValueError(what))}",
        "nothing was written; import a model whose every part is ours: GPT-2, Llama, or a Mistral "
        "or Qwen2 without sliding window",
    )


class HuggingFaceImporter:
    """Reads folders as `save_pretrained` of transformers writes them."""

    name = "huggingface"

    def accepts(self, path: Path) -> bool:
        """A folder with a ``config.json``, or a file in it."""
        return (_find_folder(path) / CONFIG_NAME).is_file()

    def read(self, path: Path) -> ImportedModel:
        """The model in a folder, checked."""
        folder = _find_folder(path)
        try:
            values = read_json_file(folder / CONFIG_NAME)
            with open_tensors(folder) as tensors:
                config, weights = read_weights(values, tensors)
                sha256 = tensors.sha256
            tokenizer = read_tokenizer(folder)
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"its tokenizer has {tokenizer.vocab_size:,} ids, its weights have "
                    f"{config.vocab_size:,} rows"
                )
            template = read_template(folder)
        except (OSError, ValueError) as error:
            raise refuse(folder, error) from None
        origin = {"format": self.name, "source": folder.resolve().name, "sha256": sha256}
        return ImportedModel(config, weights, tokenizer, template, origin | {"quantization": None})


def _find_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


# ---- weights ------------------------------------------------------------------------------------


def read_weights(values: Any, tensors: TensorFiles) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and our weights, from ``config.json`` and the tensors beside it.

    Raises:
        ValueError: a part is missing, too much, of another shape, or not supported.
    """
    config = read_config(values)
    is_gpt2 = find_architecture(values) == GPT2
    there = _rename(tensors, is_gpt2)
    config = _decide_tied(values, config, tensors, there)
    if config.n_layers > len(tensors):
        raise ValueError(f"{config.n_layers:,} layers, but only {len(tensors):,} tensors")
    parts = list_gpt2_parts(config) if is_gpt2 else list_llama_parts(config)
    _check_tensors(parts, tensors, there)
    weights = {}
    for part in parts:
        weights[part.name] = part.join(
            lambda name: tensors.read(there[name]), lambda name: name in there
        )
    return config, weights


def _rename(tensors: TensorFiles, is_gpt2: bool) -> dict[str, str]:
    """The tensors' names in the file, by the names that the class gives them, without buffers."""
    names = {name for name in tensors.names() if not name.endswith(_BUFFER_ENDINGS)}
    if is_gpt2 and "wte.weight" in names:  # saved without the head, as the first ones were
        return {
            name if name == _HEAD_NAME else f"transformer.{name}": name for name in sorted(names)
        }
    return {name: name for name in sorted(names)}


def _decide_tied(
    values: dict[str, Any], config: ModelConfig, tensors: TensorFiles, there: dict[str, str]
) -> ModelConfig:
    """`config` with `tied` as the tensors have it. `there` loses a head that repeats the table."""
    table = next(
        (there[n] for n in ("transformer.wte.weight", "model.embed_tokens.weight") if n in there),
        None,
    )
    if table is None:
        raise ValueError("it has no table of tokens")
    if _HEAD_NAME not in there:
        if not config.tied and "tie_word_embeddings" in values:
            raise ValueError(f"tie_word_embeddings is false, and {_HEAD_NAME} is missing")
        return read_config(values, is_tied=True)
    if config.tied:
        head = there.pop(_HEAD_NAME)
        is_same = tensors.shape(head) == tensors.shape(table)
        if not is_same or not torch.equal(tensors.read(head), tensors.read(table)):
            raise ValueError(f"tie_word_embeddings is true, and {_HEAD_NAME} is another matrix")
    return config


def _check_tensors(parts: list[Part], tensors: TensorFiles, there: dict[str, str]) -> None:
    """Every tensor that is needed, in its shape, and no other."""
    known, unbiased = set(), []
    for part in parts:
        for source, shape in zip(part.sources, part.shapes, strict=True):
            known.add(source)
            if source not in there:
                if not part.is_optional:
                    raise ValueError(f"the tensor {source} is missing")
                unbiased.append(source)
            elif tensors.shape(there[source]) != shape:
                raise ValueError(
                    f"{source} has the shape {tensors.shape(there[source])}, not {shape}"
                )
    odd = sorted(set(there) - known)
    if odd:
        raise ValueError(f"the tensor {odd[0][:80]!r} belongs to no part that is ours")
    if unbiased:
        log.info(f"{len(unbiased)} biases that the model does not have are zero here")


# ---- tokenizer and chat template ----------------------------------------------------------------


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder: ``tokenizer.json``, else ``tokenizer.model``.

    Raises:
        ValueError: there is none, or it is damaged.
        MissingLibraryError: the library that reads it is not installed.
    """
    for name in _TOKENIZER_NAMES:
        path = folder / name
        if path.is_file():
            try:
                tokenizer: Tokenizer = TOKENIZER_FILES.load(path.suffix).load(str(path))
            except MissingLibraryError:
                raise
            except PreflightError as error:
                raise ValueError(error.lines[0].removeprefix(f"--tokenizer {path}: ")) from None
            return tokenizer
    raise ValueError(f"it has neither {' nor '.join(_TOKENIZER_NAMES)}")


def read_template(folder: Path) -> str | None:
    """The chat template: its own file, or in ``tokenizer_config.json``; of several the default.

    Raises:
        OSError, ValueError: it is there and cannot be used.
    """
    path = folder / TEMPLATE_NAME
    if path.is_file():
        with open_regular(Path(os.path.realpath(path))) as file:
            raw = file.read(MAX_TEMPLATE_BYTES + 1)
        return _check_template(raw.decode())
    if not (folder / TOKENIZER_CONFIG_NAME).is_file():
        return None
    content = read_json_file(folder / TOKENIZER_CONFIG_NAME)
    found = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):
        named = [item for item in found if isinstance(item, dict) and item.get("name") == "default"]
        found = named[0].get("template") if named else None
    return None if found is None else _check_template(found)


def _check_template(template: Any) -> str:
    if not isinstance(template, str) or len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise ValueError("its chat template is no text, or longer than 1 MiB")
    return template
