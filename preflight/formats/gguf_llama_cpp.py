"""llama.cpp's own answers about a GGUF file, where the binding `cyllama` is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflight.formats.proof import proof_error

BINDING = "cyllama"
_CHILD = Path(__file__).with_name("gguf_llama_cpp_child.py")
# An answer takes a pass over the weights for each token; a machine may be busy with other things.
_TIMEOUT_SECONDS, _SECONDS_PER_GIB = 300, 300


@dataclass(frozen=True)
class Answer:
    """What llama.cpp computes.

    Attributes:
        plain, special: ids of texts; in `special` the names of tokens were read as these tokens.
        logits: (T V) in fp32, after each of the ids that were asked for.
        continuation: the most probable ids that follow, one by one.
    """

    plain: list[list[int]]
    special: list[list[int]]
    logits: np.ndarray
    continuation: list[int]


def is_installed() -> bool:
    """Whether llama.cpp can be asked."""
    return importlib.util.find_spec(BINDING) is not None


def ask_llama_cpp(
    path: Path, plain: Sequence[str], special: Sequence[str], ids: Sequence[int], n_new: int
) -> Answer | None:
    """Let llama.cpp load a file, in a process of its own.

    Args:
        path: the file's.
        plain, special: texts to encode.
        ids: a text to compute the logits of.
        n_new: ids to continue it with.

    Returns:
        ``None`` when no answer comes in time: that says nothing about the file.

    Raises:
        PreflightError: code CHECK_FAILED, when llama.cpp cannot use the file.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "path": str(path.absolute()),
            "plain": list(plain),
            "special": list(special),
            "ids": list(ids),
            "n_new": n_new,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        try:
            # -P: modules beside the program are not to be taken for the library's.
            done = subprocess.run(
                [sys.executable, "-P", str(_CHILD), name],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS + _SECONDS_PER_GIB * path.stat().st_size / 2**30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise proof_error(f"llama.cpp cannot use it: {last[:160]}")
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return Answer(**answer, logits=np.load(folder / "logits.npy"))
