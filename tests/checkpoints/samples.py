"""What the tests of checkpoints share: small checkpoints, forged manifests, hostile pickles."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import OPTIMIZER_NAME, REQUIRED_NAMES, render_manifest
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError

ROOT = Path(__file__).parents[2]


# What `save` writes besides the manifest.
FILE_NAMES = (*REQUIRED_NAMES, OPTIMIZER_NAME)
CONFIG = {
    "model": {
        "vocab_size": 11,
        "context_length": 8,
        "n_embeddings": 4,
        "n_heads": 2,
        "n_layers": 1,
        "ffn_hid_dim": 8,
    },
    "tokenizer": {"name": "gpt2", "fingerprint": "f" * 64},
}


HOSTILE = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "wte.weight": torch.randn(11, 4, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "blocks.0.bias": torch.randn(4, 2, generator=generator).t(),  # not contiguous
        "scale": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }


def make_optimizer(seed: int) -> dict[str, torch.Tensor]:
    """AdamW's tensors after a step, by name."""
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter])
    (parameter * seed).sum().backward()
    optimizer.step()
    return {f"some.weight.{key}": value for key, value in optimizer.state[parameter].items()}


def make_state(seed: int) -> dict[str, Any]:
    return {
        "moments": make_optimizer(seed),
        "rng": torch.get_rng_state(),
        "step": seed,
        "cursor": {"epoch": 1, "seen": (1, 2.5, None, "x", True)},
    }


class FakeTokenizer:
    """Saves the files that it is given."""

    def __init__(self, **files: bytes) -> None:
        self.files = files or {"vocab.txt": b"a b c", "merges-1.json": b"[]"}

    def save(self, folder: Path) -> list[Path]:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in self.files]


def save(
    output_dir: Path,
    step: int,
    val_loss: float | None = None,
    seed: int = 0,
    tokenizer: Any | None = None,
    **options: Any,
) -> Checkpoint:
    return save_checkpoint(
        output_dir,
        step,
        make_weights(seed or step),
        make_state(seed or step),
        CONFIG,
        {"train_loss": 3.0, "val_loss": val_loss},
        tokenizer,
        optimizer=make_optimizer(seed or step),
        **options,
    )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@contextlib.contextmanager
def refused(code: ExitCode, pattern: str = "") -> Iterator[None]:
    with pytest.raises(PreflightError) as caught:
        yield
    assert caught.value.code == code, caught.value
    assert len(caught.value.lines) <= 5
    assert re.search(pattern, str(caught.value)), caught.value


def describe_bytes(raw: bytes, chunk_bytes: int | None = None) -> dict[str, Any]:
    """A manifest's entry of a file with this content."""
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if chunk_bytes is None:
        return entry
    parts = [raw[i : i + chunk_bytes] for i in range(0, len(raw), chunk_bytes)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    return entry | {"sha256": digest.hexdigest(), "chunk_bytes": chunk_bytes}


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """A consistent manifest over whatever the files hold now, as an attacker would write it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["checksum"]
    for name in manifest["files"].keys() & {*FILE_NAMES}:
        chunk_bytes = manifest["files"][name].get("chunk_bytes")
        manifest["files"][name] = describe_bytes((folder / name).read_bytes(), chunk_bytes)
    (folder / "manifest.json").write_bytes(render_manifest(manifest | changes))


def load_all(path: Path) -> None:
    """Everything a run does with a checkpoint that the user named."""
    opened = store.open_checkpoint(str(path))
    assert opened.config
    checkpoint_format.load_weights(opened, None)
    checkpoint_format.load_training_state(opened)
    if opened.manifest.format_version > 2:
        checkpoint_format.load_optimizer(opened)


def mutate(raw: bytes, kind: str, place: int) -> bytes:
    if kind == "flip":
        place %= len(raw) * 8
        return raw[: place // 8] + bytes([raw[place // 8] ^ 1 << place % 8]) + raw[place // 8 + 1 :]
    return raw[: place % len(raw)] if kind == "cut" else raw + bytes([place % 256])


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def zip_of(pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def payloads(mark: Path) -> dict[str, bytes]:
    command = f"touch '{mark}'"
    python = f"open({str(mark)!r}, 'w')"
    system = Payload(os.system, command)
    inner = pickle.dumps(system, 2)
    return {
        "os.system": torch_bytes({"x": system}),
        "exec": torch_bytes({"x": Payload(exec, python)}),
        "eval": torch_bytes([Payload(eval, python)]),
        "subprocess": torch_bytes(Payload(subprocess.call, ["touch", str(mark)])),
        "open": torch_bytes(Payload(open, str(mark), "w")),
        "torch.load inside": torch_bytes(
            Payload(torch.storage._load_from_bytes, torch_bytes(system))
        ),
        "old torch format": torch_bytes(system, _use_new_zipfile_serialization=False),
        "bare pickle 0": pickle.dumps(system, 0),
        "bare pickle 2": inner,
        "bare pickle 5": pickle.dumps(system, 5),
        "proto 0 global": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "zip proto 0": zip_of(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."),
        "zip": zip_of(inner),
        "deflated zip": zip_of(inner, zipfile.ZIP_DEFLATED),
        "zip slip": zip_of(inner, **{"../../evil": b"x"}),
        "numpy": torch_bytes({"x": Payload(numpy.load, str(mark))}),
        "inst opcode": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "code in a safetensors name": pack({"__metadata__": {"x": command}}) + inner,
    }


SYSTEM_CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "posix_fallocate")


CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")


def find_durability_faults(lines: list[str], output_dir: str) -> tuple[int, list[str]]:
    """Renames in an strace log, and those without fsync of what is renamed before, of the folder
    after."""
    dirty: set[str] = set()  # paths written or named since their last fsync
    waiting: dict[str, str] = {}  # folder whose names are not durable -> the rename
    renames, faults = 0, []
    for line in lines:
        match = CALL.search(line)
        if not match or output_dir not in line or match[3].startswith("-"):
            continue
        call, arguments = match[1], match[2]
        paths = [p for p in re.findall(r'[<"](/[^>"]*)[>"]', arguments) if output_dir in p]
        if call in ("write", "pwrite64", "ftruncate", "fallocate"):
            dirty.add(paths[0])
        elif call in ("fsync", "fdatasync"):
            dirty.discard(paths[0])
            waiting.pop(paths[0], None)
        elif call.startswith("rename"):
            renames += 1
            source, target = paths[-2:]
            faults += [
                f"not fsynced before rename: {p}"
                for p in dirty
                if p == source or p.startswith(source + "/")
            ]
            waiting[os.path.dirname(target)] = line
    return renames, faults + [f"folder not fsynced after: {line}" for line in waiting.values()]
