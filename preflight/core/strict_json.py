"""A strict reader of JSON files that may be damaged or hostile."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path
from typing import Any

from preflight.core.units import format_bytes

MAX_JSON_BYTES = 16 * 2**20


_UTF_16_OR_32_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def read_json(path: Path, *, by_hand: bool = False) -> Any:
    """Read a JSON file strictly.

    Args:
        path: the file.
        by_hand: a person wrote it: it may begin with the mark that editors put before UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is over 16 MiB, not UTF-8, not JSON, too deep, names a key twice, or
            holds a number that is not finite.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    return parse_json(raw.removeprefix(codecs.BOM_UTF8) if by_hand else raw)


def parse_json(raw: bytes) -> Any:
    """Parse JSON strictly; see `read_json`.

    Raises:
        ValueError: as `read_json`.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {format_bytes(MAX_JSON_BYTES)}")
    if raw.startswith(_UTF_16_OR_32_MARKS) or b"\0" in raw[:4]:
        raise ValueError(
            "in UTF-16 or UTF-32, not UTF-8; PowerShell writes UTF-8 with: "
            "Set-Content -Encoding utf8"
        )
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _finite_float(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is too large")
    return value
