"""What was measured on this machine, kept from one call to the next: one small file for each thing.

The folder is the user's, not the run's. Nothing depends on it: a file that is missing, damaged or
another program's is measured again, and one that cannot be written is told in one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from preflight import __version__
from preflight.core.log import log
from preflight.core.schema import Schema
from preflight.core.storage import TEMPORARY_PREFIX, open_regular
from preflight.core.strict_json import MAX_JSON_BYTES, parse_json

FOLDER_VARIABLE = "PREFLIGHT_CACHE_DIR"
_FORMAT, _VERSION = "preflight measurement", 1
S = TypeVar("S", bound=Schema)
Key = Mapping[str, Any]  # plain JSON types: what the measurement holds for


class _Record(Schema):
    """A file of the folder."""

    format: str
    version: int
    key: dict[str, Any]
    found: dict[str, Any]


def find_cache_folder() -> Path:
    """The user's folder for such files: that of `PREFLIGHT_CACHE_DIR`, else the system's.

    Raises:
        OSError: there is no such place, as without a home.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).absolute()
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "preflight"
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    parent = Path(os.environ.get(variable) or home / ".cache")
    if not parent.is_absolute():  # the XDG specification: then it is to be ignored
        parent = home / ".cache"
    return parent / "preflight"


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """What a time depends on besides the work: processor or card, cores, memory, and versions."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _read_cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "preflight": __version__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_properties(device).name
    return facts


def _read_cpu_name() -> str:
    with contextlib.suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
        values = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
        # A virtual machine's names are short: the numbers tell the generation.
        names = ("model name", "cpu family", "model", "stepping")
        return " ".join(values[name].strip() for name in names if name in values)
    return platform.processor() or platform.machine()


def recall(key: Key, shape: type[S]) -> S | None:
    """What was measured for `key`, if it was; a file that is no such thing is told and ignored.

    Args:
        key: as `remember` had it.
        shape: of what was measured.
    """
    try:
        path = _find_file(key)
        with open_regular(path) as file:
            record = _Record.read(parse_json(file.read(MAX_JSON_BYTES + 1)))
        if (record.format, record.version, record.key) != (_FORMAT, _VERSION, _plain(key)):
            raise ValueError("it is about something else")
        return shape.read(record.found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info(f"what was measured before is not used: {_explain(error, key)}")
        return None


def remember(key: Key, found: Schema) -> None:
    """Keep what was measured for `key`; where that is not possible it is told.

    The file appears whole or not at all. It is not flushed to the disk: if it is lost, the
    measurement is made again.
    """
    record = _Record(format=_FORMAT, version=_VERSION, key=_plain(key), found=found.model_dump())
    try:
        path = _find_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(record.model_dump_json(indent=2) + "\n")
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        log.info(f"what was measured cannot be kept: {_explain(error, key)}")


def _find_file(key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return find_cache_folder() / "measured" / f"{digest[:32]}.json"


def _plain(key: Key) -> dict[str, Any]:
    """`key` as it is read back: tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _explain(error: OSError | ValueError, key: Key) -> str:
    """The reason, and the file that it is about."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    with contextlib.suppress(OSError):
        return f"{_find_file(key)}: {reason}"[:300]
    return reason
