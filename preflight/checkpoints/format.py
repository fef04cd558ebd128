"""Checkpoints: save, verify, find, read and retire the folders that hold a run's state.

    <output_dir>/milestones/checkpoint-<step>/
        model.safetensors  the weights
        checkpoint.pt      the training state: tensors and plain types only
        config.json        model, tokenizer and training settings
        manifest.json      step, losses, versions, and size and SHA-256 of the three others

A folder is built beside its place and renamed into it when every byte has been read back; damage
that comes later shows in the hashes. There is no pointer file: the newest is the highest step that
verifies. Nothing found on disk is ever executed. SHA-256 tells accidents, not attackers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from preflight.core import storage, strict_json
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ModelConfig, model_config_from_dict

WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "checkpoint.pt"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
DATA_NAMES = (WEIGHTS_NAME, STATE_NAME, CONFIG_NAME)
MILESTONES_NAME = "milestones"
FORMAT = "preflight-checkpoint"
FORMAT_VERSION = 1
PREFLIGHT_VERSION = "0.1.0"

_FOLDER_NAME = re.compile(r"checkpoint-([0-9]+)")
_REPLACED_PREFIX = f"{storage.TEMPORARY_PREFIX}replaced-"
_SPARE_BYTES = 2**20  # manifest, config, zip directory, file system blocks
_MAX_HEADER_BYTES = 16 * 2**20
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Files whose hash this process has checked, by identity: a start hashes each file once.
_verified: set[tuple[int | str, ...]] = set()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is sound. Its other files may not be: verify them."""

    path: Path
    step: int
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def val_loss(self) -> float | None:
        """Validation loss in nats per token, None while it was not evaluated."""
        return self.manifest["losses"].get("val_loss")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, verified; it describes a possible model and names a tokenizer.

        Raises:
            PreflightError: code CHECKPOINT.
        """
        with _open_verified(self, CONFIG_NAME) as file:
            raw = file.read(strict_json.MAX_JSON_BYTES + 1)
        try:
            config = strict_json.parse_json(raw)
            if not isinstance(config, dict):
                raise ValueError("not an object")
            model_config_from_dict(config.get("model"))
            tokenizer = config.get("tokenizer")
            keys = ("name", "fingerprint")
            if not isinstance(tokenizer, dict) or not all(
                isinstance(tokenizer.get(key), str) for key in keys
            ):
                raise ValueError("it does not name a tokenizer")
        except ValueError as error:
            raise _damaged(self.path / CONFIG_NAME, str(error)) from None
        return config

    @property
    def model_config(self) -> ModelConfig:
        """The architecture that ``config.json`` describes."""
        return model_config_from_dict(self.config["model"])


def save_checkpoint(
    output_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    training_state: dict[str, Any],
    config: dict[str, Any],
    losses: dict[str, float | None],
) -> Checkpoint:
    """Write the state after `step` updates, read it back, and give it its name.

    `output_dir` must exist: one that vanished during a run (a lost mount) is not made anew. A
    folder of the same step is replaced; of the same weights, it hands its losses on.

    Args:
        output_dir: the run's folder.
        step: updates done.
        weights: floating-point tensors on any device.
        training_state: tensors and plain types, nested in dicts, lists and tuples.
        config: plain JSON types; ``model`` holds the architecture.
        losses: nats per token by name, ``val_loss`` among them; non-finite counts as None.

    Raises:
        PreflightError: code STORAGE when the disk is full, failing or read-only, code DIVERGED
            when a weight is not finite. Every earlier checkpoint is then as it was.
        TypeError, ValueError: the arguments cannot be stored.
    """
    model_config_from_dict(config.get("model"))
    header = _build_weights_header(weights)
    weights_bytes = len(header) + sum(tensor.nbytes for tensor in weights.values())
    state_bytes = _measure_state(training_state)
    needed_bytes = weights_bytes + state_bytes + _SPARE_BYTES
    folder = output_dir / MILESTONES_NAME / f"checkpoint-{step}"
    _prepare_place(folder, needed_bytes)
    files: dict[str, Any] = {}
    try:
        with storage.publish_folder(folder, needed_bytes) as temporary:
            with _new_file(temporary / WEIGHTS_NAME, weights_bytes, files) as file:
                file.write(header)
                for _, tensor in _order_weights(weights):
                    host = tensor.detach().cpu().contiguous().reshape(-1)
                    file.write(host.view(torch.uint8).numpy())
            with _new_file(temporary / STATE_NAME, state_bytes, files) as file:
                torch.save(training_state, file)  # type: ignore[arg-type]  # it only writes
            with _new_file(temporary / CONFIG_NAME, 0, files) as file:
                file.write(_render_json(config))
            losses = _merge_losses(folder, files[WEIGHTS_NAME], losses)
            with _new_file(temporary / MANIFEST_NAME, 0, {}) as file:
                file.write(_render_manifest(_build_manifest(step, losses, files)))
            for name in DATA_NAMES:
                _read_back(temporary / name, files[name])
            if os.path.lexists(folder):
                os.rename(folder, folder.with_name(_REPLACED_PREFIX + folder.name))
                storage.fsync_folder(folder.parent)
    finally:
        _restore_replaced(folder.parent)
    return _read_checkpoint(folder)


def record_validation(checkpoint: Checkpoint, val_loss: float) -> Checkpoint:
    """Add the validation loss, known only after the save, to the manifest in one step.

    Raises:
        PreflightError: code STORAGE; the manifest is then as it was.
    """
    losses = checkpoint.manifest["losses"] | _finite_losses({"val_loss": val_loss})
    manifest = checkpoint.manifest | {"losses": losses}
    content = _render_manifest(manifest)
    with storage.publish_file(checkpoint.path / MANIFEST_NAME, len(content)) as file:
        file.write(content)
    return Checkpoint(checkpoint.path, checkpoint.step, manifest)


def _prepare_place(folder: Path, needed_bytes: int) -> None:
    """Make the milestones folder and see that there is room, before anything is written."""
    milestones = folder.parent
    if not milestones.parent.is_dir() or milestones.is_symlink():
        raise PreflightError(
            ExitCode.STORAGE,
            f"cannot save {folder}: {milestones.parent} is gone, or a link stands in its place",
            "put the folder back (is the disk mounted?), then run the same command again",
        )
    storage.make_folder(milestones)
    if storage.free_bytes(milestones) < needed_bytes:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise storage.storage_error(folder, error, needed_bytes)


class _HashingFile:
    """What `torch.save` writes to: hashes all that passes and remembers the first OSError.

    Raised out of `write`, the error would cross torch's C++ zip writer, which replaces it by its
    own ("unexpected pos"); `_new_file` raises it when the writing has ended.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self.digest.update(data)
        self.size_bytes += count
        return count

    def flush(self) -> None:
        """Nothing: the whole file is fsynced once, at its end."""


@contextlib.contextmanager
def _new_file(path: Path, size_bytes: int, files: dict[str, Any]) -> Iterator[_HashingFile]:
    """A new file of at most about `size_bytes`, fsynced at its end and entered in `files`."""
    with open(path, "xb") as file:
        storage.reserve_bytes(file, size_bytes)
        hashing = _HashingFile(file)
        yield hashing
        if hashing.error is not None:
            raise hashing.error
        file.truncate(hashing.size_bytes)  # what was reserved too much
        file.flush()
        os.fsync(file.fileno())
    files[path.name] = {"bytes": hashing.size_bytes, "sha256": hashing.digest.hexdigest()}


def _build_weights_header(weights: dict[str, Tensor]) -> bytes:
    """The safetensors header of `weights`.

    Written here because the library builds the whole file in memory, twice. This way one tensor
    at a time is copied to the host, and every byte passes through our hash.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in _order_weights(weights):
        if name in header or tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"cannot store the tensor {name!r} of {tensor.dtype}")
        if not _is_finite(tensor):
            raise PreflightError(
                ExitCode.DIVERGED,
                f"the weights {name} are not finite: nothing was saved",
                "earlier checkpoints are kept; lower --learning-rate, then run the command again",
            )
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    return len(raw).to_bytes(8, "little") + raw


def _is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinite; `aminmax` hands NaN on, and takes a tenth of `isfinite`'s time."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _order_weights(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest type first, as the library orders them: every tensor is then aligned."""
    return sorted(weights.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _measure_state(state: Any) -> int:
    """About the bytes that `state` takes on disk, rather more than less.

    Raises:
        TypeError: it holds something that is neither a tensor nor a plain type.
    """
    total, seen, pending = _SPARE_BYTES, set(), [state]
    while pending:  # no recursion: a hostile file nests as deep as it likes, or holds itself
        item = pending.pop()
        total += 64
        if type(item) in (Tensor, torch.nn.Parameter):
            data = item.untyped_storage()
            if data.data_ptr() not in seen:
                seen.add(data.data_ptr())
                total += data.nbytes() + 512
        elif type(item) in (dict, OrderedDict, list, tuple):
            if id(item) not in seen:
                seen.add(id(item))
                pending.extend(item)
                pending.extend(item.values() if isinstance(item, dict) else ())
        elif type(item) in (str, bytes):
            total += 4 * len(item)
        elif item is not None and type(item) not in (bool, int, float):
            raise TypeError(f"{type(item).__name__} is not a plain type")
    return total


def _read_back(path: Path, entry: dict[str, Any]) -> None:
    if {"bytes": path.stat().st_size, "sha256": storage.hash_file(path)} != entry:
        raise PreflightError(
            ExitCode.STORAGE,
            f"{path} read back differs from what was written",
            "the disk or the memory of this machine is failing",
            "earlier checkpoints are kept; choose another --output-dir",
        )


def _build_manifest(step: int, losses: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    versions = {
        "preflight": PREFLIGHT_VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "losses": losses,
        "files": files,
        "versions": versions,
    }


def _merge_losses(
    folder: Path, weights_entry: dict[str, Any], losses: dict[str, float | None]
) -> dict[str, float | None]:
    """`losses`, completed from the checkpoint that is replaced where its weights are the same."""
    new = _finite_losses(losses)
    with contextlib.suppress(PreflightError):
        old = _read_checkpoint(folder).manifest
        if old["files"][WEIGHTS_NAME] == weights_entry:
            return new | {k: v for k, v in old["losses"].items() if new.get(k) is None}
    return new


def _finite_losses(losses: dict[str, float | None]) -> dict[str, float | None]:
    return {
        name: float(loss) if loss is not None and math.isfinite(loss) else None
        for name, loss in losses.items()
    }


def _render_json(content: Any) -> bytes:
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def _render_manifest(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes: its own checksum last, so that a flipped bit in a loss shows too."""
    return _render_json(manifest | {"checksum": hashlib.sha256(_render_json(manifest)).hexdigest()})


def verify_checkpoint(checkpoint: Checkpoint, *, lack_state: bool = False) -> None:
    """Compare every file with the manifest: all sizes, then SHA-256.

    A file is hashed once per process, as long as its size and times stay. Files that the manifest
    does not name are never read. With `lack_state`, ``checkpoint.pt`` may be missing.

    Raises:
        PreflightError: code CHECKPOINT, naming the file, what was expected and what was found.
    """
    missing = lack_state and not os.path.lexists(checkpoint.path / STATE_NAME)
    names = [name for name in DATA_NAMES if not (missing and name == STATE_NAME)]
    for hashed in (False, True):
        for name in names:
            _open_verified(checkpoint, name, hashed=hashed).close()


def _read_checkpoint(folder: Path) -> Checkpoint:
    """The folder as its manifest describes it; no other file is opened."""
    path = folder / MANIFEST_NAME
    try:
        with storage.open_regular(path) as file:
            raw = file.read(strict_json.MAX_JSON_BYTES + 1)
        manifest = strict_json.parse_json(raw)
        _check_manifest(manifest)
        del manifest["checksum"]
        if _render_manifest(manifest) != raw:
            raise ValueError("its checksum does not match its content")
        step = manifest["step"]
        if _FOLDER_NAME.fullmatch(folder.name) and folder.name != f"checkpoint-{step}":
            raise ValueError(f"it belongs to step {step}")
    except (OSError, ValueError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from None
    return Checkpoint(folder, step, manifest)


def _check_manifest(manifest: Any) -> None:
    """Keys and types, all of them, so that nothing after this has to expect a surprise.

    Raises:
        ValueError: naming the key.
    """

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def is_digest(value: Any) -> bool:
        return type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None

    def is_entry(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and set(value) == {"bytes", "sha256"}
            and is_count(value["bytes"])
            and is_digest(value["sha256"])
        )

    def holds(value: Any, fits: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(fits, value.values()))

    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError("not the manifest of a Preflight checkpoint")
    version: Any = manifest.get("format_version")
    if is_count(version) and version > FORMAT_VERSION:
        raise ValueError(
            f"written by a newer Preflight (format {version}, this one reads up to "
            f"{FORMAT_VERSION}): update Preflight"
        )
    rules: dict[str, Callable[[Any], bool]] = {
        "format": lambda value: True,
        "format_version": lambda value: is_count(value) and value > 0,
        "step": is_count,
        "losses": lambda value: holds(value, lambda v: v is None or type(v) is float),
        "files": lambda value: holds(value, is_entry) and set(value) == set(DATA_NAMES),
        "versions": lambda value: holds(value, lambda v: type(v) is str),
        "checksum": is_digest,
    }
    for key in sorted(rules.keys() | manifest.keys()):
        if key not in rules or key not in manifest or not rules[key](manifest[key]):
            raise ValueError(f"missing, unknown or impossible: {key[:40]!r}")


def _open_verified(checkpoint: Checkpoint, name: str, *, hashed: bool = True) -> IO[bytes]:
    """Open a file of the checkpoint that is what the manifest says, at its beginning."""
    path, entry = checkpoint.path / name, checkpoint.manifest["files"][name]
    with contextlib.ExitStack() as stack:
        try:
            file: Any = stack.enter_context(storage.open_regular(path))
            info = os.fstat(file.fileno())
            if info.st_size != entry["bytes"]:
                raise _damaged(
                    path,
                    f"{_describe(path)} of another size",
                    f"bytes: expected {entry['bytes']:,}, found {info.st_size:,}",
                )
            identity = (
                name,
                entry["sha256"],
                info.st_dev,
                info.st_ino,
                info.st_size,
                info.st_mtime_ns,
                info.st_ctime_ns,
            )
            if hashed and identity not in _verified:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != entry["sha256"]:
                    raise _damaged(
                        path,
                        "its content has changed",
                        f"SHA-256: expected {entry['sha256']}, found {found}",
                    )
                _verified.add(identity)
                file.seek(0)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from None
        stack.pop_all()
    return file


def _damaged(path: Path, reason: str, *details: str) -> PreflightError:
    return PreflightError(
        ExitCode.CHECKPOINT,
        f"{path}: {reason}",
        *details,
        "nothing was changed or loaded",
        "restore it, or name another checkpoint with --resume-from or --checkpoint-path",
    )


def _describe(path: Path) -> str:
    """What a path that is no checkpoint of ours seems to be, from its first bytes."""
    if not os.path.lexists(path):
        return "there is nothing of that name"
    if path.is_dir():
        return f"a folder without {MANIFEST_NAME}"
    try:
        with storage.open_regular(path) as file:
            head = file.read(64)
    except OSError as error:
        return error.strerror or str(error)
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in place of the file (fetch it: git lfs pull)"
    if head.startswith((b"PK", b"\x80")) or path.suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        return "a pickle or an archive of pickles, which is never loaded unverified"
    return "a file"


def load_weights(
    checkpoint: Checkpoint, expected_shapes: dict[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """The weights on the CPU, verified, finite, and of the expected names and shapes.

    Raises:
        PreflightError: code CHECKPOINT, naming the first tensors that differ.
    """
    path = checkpoint.path / WEIGHTS_NAME
    size_bytes = checkpoint.manifest["files"][WEIGHTS_NAME]["bytes"]
    with _open_verified(checkpoint, WEIGHTS_NAME) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(_MAX_HEADER_BYTES, size_bytes):
            raise _damaged(path, f"its header claims {header_bytes:,} bytes")
        # Linux lends the very file that was hashed; the library takes no path that is not UTF-8.
        lent = Path(f"/proc/self/fd/{file.fileno()}")
        try:
            with safe_open(lent if lent.exists() else path, framework="pt", device="cpu") as reader:
                names = list(reader.keys())
                shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in names}
                _check_shapes(path, shapes, shapes if expected_shapes is None else expected_shapes)
                # Copied out of the mapping: a file cut short later would end us with SIGBUS.
                weights = {name: reader.get_tensor(name).clone() for name in names}
        except (PreflightError, MemoryError):
            raise
        except Exception as error:  # the library has several kinds, and not all are its own
            raise _damaged(path, f"not sound safetensors ({_first_line(error)})") from None
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise _damaged(path, f"tensor {name[:80]!r} is of {tensor.dtype}, not floating-point")
        if not _is_finite(tensor):
            raise _damaged(path, f"tensor {name[:80]!r} holds NaN or infinite values")
    return weights


def _check_shapes(
    path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    differ = [
        f"{name[:60]}: checkpoint {found.get(name, 'none')}, model {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or found[name] != tuple(expected[name])
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path}: its tensors are not those of this model",
            "; ".join(differ[:3]) + more,
            "nothing was loaded; leave the model flags out: the checkpoint knows its own size",
        )


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training state on the CPU: tensors and plain types. Nothing in the file is executed.

    Raises:
        PreflightError: code CHECKPOINT, also for a folder that holds weights only.
    """
    path = checkpoint.path / STATE_NAME
    if not os.path.lexists(path):
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{path} is missing: no run can go on from weights only",
            "they are enough to write text: python main.py --generate --checkpoint-path FOLDER",
            "to go on training, name another checkpoint with --resume-from",
        )
    try:
        with _open_verified(checkpoint, STATE_NAME) as file:
            with zipfile.ZipFile(file) as archive:  # stored, as torch writes it: nothing swells
                if any(
                    item.compress_type or item.file_size > item.compress_size
                    for item in archive.infolist()
                ):
                    raise ValueError("it is compressed")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        _measure_state(state)
        if type(state) is not dict:
            raise ValueError("it is not a dict")
    except (PreflightError, MemoryError):
        raise
    except Exception as error:  # whatever a hostile archive makes zipfile or torch say
        raise _damaged(path, f"not a training state of Preflight ({_first_line(error)})") from None
    return state


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return "".join(c for c in text if c.isprintable())[:120]


def _restore_replaced(milestones: Path) -> None:
    """Put a checkpoint back that was set aside for one that never came; delete it if it came."""
    for aside in milestones.glob(f"{_REPLACED_PREFIX}*"):
        folder = milestones / aside.name.removeprefix(_REPLACED_PREFIX)
        with contextlib.suppress(OSError):  # the next start tries again
            if os.path.lexists(folder):
                storage.remove_tree(aside)
            else:
                os.rename(aside, folder)
                storage.fsync_folder(milestones)
