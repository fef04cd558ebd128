"""The package `gguf` of llama.cpp: it packs and unpacks quantised numbers, and writes files.

Nothing else here imports it. Headers of strangers are read by `gguf_header`, before it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preflight.core.libraries import import_library
from preflight.formats.gguf_header import KINDS, TensorEntry

# How a key's value is written: `GGUFValueType` by name.
Value = tuple[str, Any]


def load_gguf() -> Any:
    """The package; PreflightError (FLAGS) with the command that installs it."""
    return import_library("gguf", "gguf", "a GGUF file")


def unpack_tensor(content: bytes, entry: TensorEntry) -> Tensor:
    """The numbers (fp32) of a tensor of a file.

    Args:
        content: its bytes.
        entry: its shape and type.
    """
    if entry.kind.name == "F32":
        numbers = torch.frombuffer(bytearray(content), dtype=torch.float32)
    elif entry.kind.block_size == 1:  # 16 bits each
        dtype = torch.float16 if entry.kind.name == "F16" else torch.bfloat16
        numbers = torch.frombuffer(bytearray(content), dtype=dtype).float()
    else:
        kind = load_gguf().GGMLQuantizationType[entry.kind.name]
        rows = np.frombuffer(content, np.uint8).reshape(*entry.shape[:-1], -1)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite; the importer looks
            numbers = torch.from_numpy(load_gguf().quants.dequantize(rows, kind))
    return numbers.reshape(entry.shape)


def pack_tensor(weight: Tensor, kind: str) -> np.ndarray:
    """The numbers of `weight` (... C) as the type of tensor called `kind` holds them.

    Bytes (... n) of a quantised type, which needs rows of whole blocks; fp32 and fp16 as such.
    """
    if kind == "BF16":  # torch rounds to the nearest even, as llama.cpp does
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    library = load_gguf()
    packed: np.ndarray = library.quants.quantize(
        weight.contiguous().numpy(), library.GGMLQuantizationType[kind]
    )
    return packed


def write_file(
    path: Path, keys: Mapping[str, Value], tensors: Mapping[str, tuple[str, Tensor]]
) -> None:
    """Write a GGUF file, one tensor after the other.

    Args:
        path: a file to make or to replace.
        keys: type and value by name, among them ``general.architecture``.
        tensors: the type and the numbers of each, by name, in the order of the file.

    Raises:
        OSError: it cannot be written.
    """
    library = load_gguf()
    writer = library.GGUFWriter(path, keys["general.architecture"][1])
    for name, (kind, value) in keys.items():
        if name != "general.architecture":  # the writer has written it
            writer.add_key_value(name, value, library.GGUFValueType[kind])
    for name, (kind, weight) in tensors.items():
        number = library.GGMLQuantizationType[kind]
        n_bytes = KINDS[kind].count_bytes(weight.numel())
        writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), n_bytes, number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind, weight in tensors.values():
            writer.write_tensor_data(pack_tensor(weight, kind))
    finally:
        writer.close()
