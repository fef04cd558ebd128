"""GPT-2's weights from what `torch.save` wrote: nanoGPT's `ckpt.pt`, and plain state dicts.

Such a file is an archive of a pickle and of the tensors' bytes. torch reads it with `weights_only`,
so that nothing in it is executed, after its directory was found to ask for no more than the file
holds. Shapes decide what the model is; nanoGPT's `model_args` says how many heads it has.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preflight.checkpoints.damage import first_line
from preflight.checkpoints.weights import is_finite
from preflight.core.errors import PreflightError
from preflight.core.log import log
from preflight.core.storage import open_regular
from preflight.formats.hf_config import check_limits
from preflight.formats.hf_import import refuse
from preflight.formats.names import list_gpt2_parts
from preflight.formats.protocol import ImportedModel
from preflight.settings import ModelConfig
from preflight.tokenization import load_tokenizer

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_MAX_PICKLE_BYTES = 16 * 2**20
_MAX_ENTRIES = 2**16
# What `torch.compile` and the wrappers for several devices put before each name.
_PREFIXES = ("_orig_mod.", "module.")
_HEAD_NAME, _TABLE_NAME = "lm_head.weight", "transformer.wte.weight"
_BUFFER_ENDINGS = (".attn.bias", ".attn.masked_bias")  # masks, which are no weights
_GPT2_ROWS = (50_257, 50_304)  # GPT-2's ids; nanoGPT pads them to a multiple of 64
_HEAD_SIZE = 64  # of all of GPT-2's shapes


class StateDictImporter:
    """Reads files of `torch.save` with GPT-2's names, which have no tokenizer: GPT-2's is taken."""

    name = "state-dict"

    def accepts(self, path: Path) -> bool:
        """A file with one of the usual endings."""
        return path.is_file() and path.suffix in _SUFFIXES

    def read(self, path: Path) -> ImportedModel:
        """The model in a file, checked."""
        try:
            content, sha256, n_bytes = _load(path)
            state, facts = _find_state(content)
            config, is_conv = _read_shapes(state, facts)
            if config.vocab_size not in _GPT2_ROWS:
                raise ValueError(
                    f"it has {config.vocab_size:,} rows and no tokenizer: that of nanoGPT's "
                    "meta.pkl is a pickle; only GPT-2's 50,257 ids are known without one"
                )
            weights = _read_weights(state, config, is_conv, n_bytes)
        except (OSError, ValueError) as error:
            raise refuse(path, error) from None
        # Padded rows stay: without them the probabilities would be others.
        origin = {
            "format": self.name if is_conv else "nanogpt",
            "source": path.name,
            "sha256": sha256,
            "quantization": None,
        }
        return ImportedModel(config, weights, load_tokenizer("gpt2"), None, origin)


# ---- the file -----------------------------------------------------------------------------------


def _load(path: Path) -> tuple[Any, str, int]:
    """What the file holds, its SHA-256, and its size in bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such archive, or asks for more than the file holds.
    """
    file: Any
    with open_regular(Path(os.path.realpath(path))) as file:
        size = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            _check_archive(file, size)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), sha256, size
        except (PreflightError, MemoryError):
            raise
        except Exception as error:  # zipfile and torch raise any kind for a hostile archive
            raise ValueError(
                f"it is no archive of plain tensors by torch.save ({first_line(error)})"
            ) from None


def _check_archive(file: io.BufferedReader, size: int) -> None:
    """Entries are stored as they are, each once, and no larger together than the file."""
    file.seek(-min(size, 22 + 2**16), os.SEEK_END)  # the end of the directory is there
    if b"PK\x05\x06" not in file.read():
        raise ValueError("it is no zip archive")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > _MAX_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("it has too many entries, or names one twice")
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries are larger than the file")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if any(entry.file_size > _MAX_PICKLE_BYTES for entry in pickles):
        raise ValueError("its pickle is too large")


def _find_state(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by GPT-2's names, and nanoGPT's `model_args`, if there are any."""
    if not isinstance(content, dict):
        raise ValueError("it is no dict of tensors")
    facts = content.get("model_args")
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(name), dict):
            content = content[name]
            break
    state = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{str(name)[:60]!r} is no tensor with a name")
        while name.startswith(_PREFIXES):
            name = name.removeprefix("_orig_mod.").removeprefix("module.")
        if not name.endswith(_BUFFER_ENDINGS):
            state[
                name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            ] = tensor.detach()
    if _TABLE_NAME not in state:
        raise ValueError("it has no transformer.wte.weight: only GPT-2's names are known")
    return state, facts if isinstance(facts, dict) else {}


# ---- what the shapes say ------------------------------------------------------------------------


def _read_shapes(state: dict[str, Tensor], facts: dict[str, Any]) -> tuple[ModelConfig, bool]:
    """The configuration, and whether matrices are kept as (in, out), as Conv1D does.

    `state` loses a head that repeats the table of tokens.
    """

    def find(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"the tensor {name} is missing")
        return tuple(state[name].shape)

    first = "transformer.h.0."
    shapes = [
        find(n) for n in (_TABLE_NAME, "transformer.wpe.weight", f"{first}attn.c_attn.weight")
    ]
    inner = find(f"{first}mlp.c_fc.weight")
    if any(len(shape) != 2 for shape in (*shapes, inner)):
        raise ValueError("its matrices are not of two dimensions")
    (n_rows, width), (context, _), attention = shapes
    is_conv = attention == (width, 3 * width)
    n_layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    config = check_limits(
        {
            "vocab_size": n_rows,
            "context_length": context,
            "n_embeddings": width,
            "n_heads": _choose_heads(width, facts),
            "n_layers": n_layers,
            "ffn_hid_dim": inner[1 if is_conv else 0],
            # nanoGPT computes GELU itself, GPT-2 its approximation.
            "activation": "gelu_tanh" if is_conv else "gelu",
            "bias": f"{first}ln_1.bias" in state,
            "tied": _drop_tied_head(state),
        }
    )
    return config, is_conv


def _choose_heads(width: int, facts: dict[str, Any]) -> int:
    """As `model_args` says, else of GPT-2's size: no shape tells it."""
    n_heads = facts.get("n_head")
    if type(n_heads) is int:
        return n_heads
    if width % _HEAD_SIZE:
        raise ValueError(f"its {width} channels do not tell how many heads it has")
    log.info(f"{width // _HEAD_SIZE} heads of {_HEAD_SIZE} channels are assumed, as in GPT-2")
    return width // _HEAD_SIZE


def _drop_tied_head(state: dict[str, Tensor]) -> bool:
    """Whether the head is the table of tokens; a copy of it is dropped."""
    head, table = state.get(_HEAD_NAME), state[_TABLE_NAME]
    if head is None:
        return True
    if head.shape != table.shape or not _is_whole(head) or not _is_whole(table):
        return False
    if torch.equal(head, table):
        del state[_HEAD_NAME]
        return True
    return False


def _is_whole(tensor: Tensor) -> bool:
    """Whether each element has a place of its own: a view may repeat a few bytes without end."""
    return tensor.is_contiguous() and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _read_weights(
    state: dict[str, Tensor], config: ModelConfig, is_conv: bool, n_bytes: int
) -> dict[str, Tensor]:
    """Our weights, all that there are; no more than the file holds."""
    parts = list_gpt2_parts(config, is_conv=is_conv)
    shapes = {part.sources[0]: part.shapes[0] for part in parts}
    odd = sorted(shapes.keys() ^ state.keys())
    if odd:
        what = "is missing" if odd[0] in shapes else "belongs to no part that is ours"
        raise ValueError(f"the tensor {odd[0][:80]!r} {what}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shapes[name]}")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.dtype}, not floating-point")
        if not _is_whole(tensor):
            raise ValueError(f"{name} is only a view of other memory")
    if sum(tensor.nbytes for tensor in state.values()) > n_bytes:
        raise ValueError("its tensors share their memory")
    for name, tensor in state.items():
        if tensor.dtype == torch.float64:
            state[name] = tensor.float()
        if not is_finite(state[name]):
            raise ValueError(f"{name} holds NaN or infinite values")
    return {part.name: part.join(state.__getitem__, state.__contains__) for part in parts}
