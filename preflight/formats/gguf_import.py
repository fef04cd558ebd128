"""A model from a GGUF file, as llama.cpp, Ollama and LM Studio use it."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from preflight.checkpoints.damage import first_line
from preflight.checkpoints.weights import is_finite
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import open_regular
from preflight.formats.gguf_header import MAGIC, Header, build_error, read_header
from preflight.formats.gguf_layout import find_parts, list_shapes, read_config
from preflight.formats.gguf_library import load_gguf, unpack_tensor
from preflight.formats.gguf_vocabulary import read_tokenizer
from preflight.formats.protocol import ImportedModel
from preflight.settings import ModelConfig

_HEAD, _TABLE = "output.weight", "token_embd.weight"


class GgufImporter:
    """Reads the kinds `llama`, `gpt2` and `qwen2` where every part of them is ours."""

    name = "gguf"

    def accepts(self, path: Path) -> bool:
        """A file that begins with GGUF, or is called so."""
        if path.suffix == ".gguf":
            return True
        try:
            with open_regular(Path(os.path.realpath(path))) as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    def read(self, path: Path) -> ImportedModel:
        """The model; see `Importer.read`."""
        try:
            # A user's own link is followed: Hugging Face's cache consists of them.
            with open_regular(Path(os.path.realpath(path))) as file:
                return read_model(path, file)
        except OSError as error:
            raise build_error(path, error.strerror or str(error)) from None


def read_model(path: Path, file: Any) -> ImportedModel:
    """The model in a file that is open to be read as bytes; see `Importer.read`."""
    header = read_header(path, file)
    load_gguf()  # its absence is told before minutes are spent
    try:
        config = read_config(
            header.keys,
            {name: entry.shape for name, entry in header.tensors.items()},
            _is_tied(file, header),
        )
        _check_tensors(header, config)
        name = "".join(c for c in path.name if c.isprintable())
        tokenizer = read_tokenizer(header.keys, config.vocab_size, name)
        weights = {
            ours: _read_weight(file, header, config, ours, shape)
            for ours, shape in list_shapes(config).items()
        }
    except ImportError:
        raise PreflightError(
            ExitCode.FLAGS,
            f"{path} needs the library tokenizers, which is not installed",
            "pip install tokenizers",
        ) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise build_error(path, first_line(error)) from None
    file.seek(0)
    origin = {
        "format": GgufImporter.name,
        "source": path.name,
        "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        "quantization": find_quantization(header),
    }
    template = header.keys.get("tokenizer.chat_template")
    return ImportedModel(
        config, weights, tokenizer, template if isinstance(template, str) else None, origin
    )


def find_quantization(header: Header) -> str | None:
    """The quantised type of the largest part of the numbers; ``None`` where they are floats."""
    sizes: Counter[str] = Counter()
    for entry in header.tensors.values():
        is_float = entry.kind.block_size == 1
        sizes["" if is_float else entry.kind.name.lower()] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0] or None


def _is_tied(file: IO[bytes], header: Header) -> bool:
    """Whether the head is the table of tokens: it is not there, or holds the same numbers."""
    head, table = header.tensors.get(_HEAD), header.tensors.get(_TABLE)
    if head is None or table is None or head.shape != table.shape:
        return head is None
    if head.kind == table.kind:
        return _hash_tensor(file, header, _HEAD) == _hash_tensor(file, header, _TABLE)
    numbers = [_read_tensor(file, header, name) for name in (_HEAD, _TABLE)]
    return torch.equal(*numbers)


def _check_tensors(header: Header, config: ModelConfig) -> None:
    """Raise `ValueError` for a tensor that is missing, of another shape, or without a place."""
    architecture = header.keys["general.architecture"]
    expected: dict[str, tuple[int, ...]] = {}
    for ours, shape in list_shapes(config).items():
        for part in find_parts(ours, config, architecture):
            n_rows = part.n_rows if part.n_rows > 0 else shape[0]
            expected[part.tensor] = (n_rows, *shape[1:])
    if config.tied:
        expected[_HEAD] = expected[_TABLE]  # it may be there twice
    for name, entry in header.tensors.items():
        if name not in expected:
            raise ValueError(f"tensor {name[:80]!r} belongs to no part that we have")
        if entry.shape != expected[name]:
            raise ValueError(f"tensor {name!r} is {entry.shape}, expected {expected[name]}")
    for name in sorted(expected.keys() - header.tensors.keys()):
        is_optional = name == _HEAD or (name.endswith(".bias") and architecture != "gpt2")
        if not is_optional:
            raise ValueError(f"tensor {name!r} is missing")


def _read_weight(
    file: IO[bytes], header: Header, config: ModelConfig, ours: str, shape: tuple[int, ...]
) -> Tensor:
    """Our weight called `ours`, in fp32. A bias that the file leaves out is zero."""
    rows = []
    for part in find_parts(ours, config, header.keys["general.architecture"]):
        if part.tensor in header.tensors:
            rows.append(part.from_file(_read_tensor(file, header, part.tensor)))
        else:
            rows.append(torch.zeros(part.n_rows if part.n_rows > 0 else shape[0]))
    weight = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
    if not is_finite(weight):
        raise ValueError(f"{ours} holds NaN or infinite numbers")
    return weight


def _read_tensor(file: IO[bytes], header: Header, name: str) -> Tensor:
    """The numbers (fp32) of a tensor."""
    return unpack_tensor(_read_bytes(file, header, name), header.tensors[name])


def _hash_tensor(file: IO[bytes], header: Header, name: str) -> Any:
    return hashlib.sha256(_read_bytes(file, header, name)).digest()


def _read_bytes(file: IO[bytes], header: Header, name: str) -> bytes:
    entry = header.tensors[name]
    file.seek(entry.offset)
    content = file.read(entry.n_bytes)
    if len(content) < entry.n_bytes:
        raise ValueError("it was cut while it was read")
    return content
