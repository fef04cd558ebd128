"""Apple's mps has no fp64: no mode may make such a tensor. The CPU stands in for that device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import TINY, build
from preflight.settings.kinds import MODES, OPTIMIZERS


class WithoutFloat64(TorchDispatchMode):
    """Refuses what mps refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            raise TypeError(f"{func}: this device has no float64")
        self.calls.add(func.__name__)
        return result


CASES = [
    *[("train", {"optimizer": name}) for name in OPTIMIZERS.names() if name != "adamw"],
    ("generate", {}),
    ("generate", {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}),
    ("check", {}),
    ("validate-only", {}),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained model's flags."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over a lazy dog.\n" * 300)
    places = {"text_file": [str(folder / "text.txt")], "data_dir": str(folder / "data")}
    places["output_dir"] = str(folder / "out")
    with WithoutFloat64():
        assert MODES.load("train")(build(TINY | places | {"max_steps": 2})) == 0
    return places


@pytest.mark.parametrize(("mode", "flags"), CASES)
def test_no_mode_needs_float64(
    trained: dict[str, Any], tmp_path: Path, mode: str, flags: dict[str, Any]
) -> None:
    fixed = {"max_steps": 3, "eval_every": 2, "max_new_tokens": 3, "interactive": False}
    own = {} if mode == "generate" else {"output_dir": str(tmp_path / "out")}
    with WithoutFloat64() as checked:
        code = MODES.load(mode)(build(TINY | trained | fixed | own | flags))
    assert code in (0, 1)
    assert len(checked.calls) > (0 if mode == "validate-only" else 20), checked.calls
