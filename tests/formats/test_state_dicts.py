"""nanoGPT's `ckpt.pt` and plain state dicts: the shapes decide, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.proof import build_from
from preflight.formats.protocol import ImportedModel
from preflight.formats.state_dict_import import StateDictImporter

ROWS, WIDTH, CONTEXT, N_HEADS, N_LAYERS = 50_304, 8, 16, 2, 2


def draw_state(*, bias: bool = True, prefix: str = "") -> OrderedDict[str, Tensor]:
    """The state of nanoGPT's model (model.py of karpathy/nanoGPT), its head tied."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (ROWS, WIDTH),
        "wpe.weight": (CONTEXT, WIDTH),
        "ln_f.weight": (WIDTH,),
    }
    for layer in range(N_LAYERS):
        shapes |= {
            f"h.{layer}.ln_1.weight": (WIDTH,),
            f"h.{layer}.attn.c_attn.weight": (3 * WIDTH, WIDTH),
            f"h.{layer}.attn.c_proj.weight": (WIDTH, WIDTH),
            f"h.{layer}.ln_2.weight": (WIDTH,),
            f"h.{layer}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"h.{layer}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        }
    if bias:
        names = [name for name in shapes if not name.startswith(("wte", "wpe"))]
        shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in names}
    state = OrderedDict(
        (f"{prefix}transformer.{name}", torch.randn(shape) * 0.5) for name, shape in shapes.items()
    )
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    return state


def compute(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """nanoGPT's forward, written from its source: logits (T V)."""

    def get(name: str) -> Tensor | None:
        return state.get(f"transformer.{name}")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"transformer.{name}.weight"], get(f"{name}.bias"))

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: len(ids)]
    for layer in range(N_LAYERS):
        h = f"h.{layer}"
        q, k, v = (
            part.view(len(ids), N_HEADS, -1).transpose(0, 1)
            for part in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(WIDTH, dim=1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(mixed.transpose(0, 1).reshape(len(ids), WIDTH), f"{h}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        x = x + linear(inner, f"{h}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), state["lm_head.weight"])


def read(content: Any, path: Path) -> ImportedModel:
    torch.save(content, path)
    assert StateDictImporter().accepts(path)
    return StateDictImporter().read(path)


def compare(found: ImportedModel, state: dict[str, Tensor]) -> float:
    ids = torch.randint(ROWS, (CONTEXT,))
    with torch.no_grad():
        ours = build_from(found.config, found.weights)(ids[None])[0]
    return float((ours - compute(state, ids)).abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(bias: bool, tmp_path: Path) -> None:
    content = {
        "model": draw_state(bias=bias, prefix="_orig_mod."),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "model_args": {"n_head": N_HEADS, "n_layer": N_LAYERS, "bias": bias, "vocab_size": ROWS},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.0),
        "config": {"dataset": "openwebtext"},
    }
    found = read(content, tmp_path / "ckpt.pt")
    assert compare(found, draw_state(bias=bias)) < 1e-4
    assert found.config.tied
    assert (found.config.activation, found.config.bias) == ("gelu", bias)
    assert found.origin["format"] == "nanogpt"
    assert found.tokenizer.name == "gpt2"


def test_wrapped_names_and_the_layout_of_conv1d(tmp_path: Path) -> None:
    """As transformers keeps GPT-2, with the names of a model on several devices."""
    state = draw_state(prefix="module.")
    for name, tensor in state.items():
        if ".h." in name and tensor.ndim == 2:
            state[name] = tensor.T.contiguous()
    state["module.lm_head.weight"] = state["module.lm_head.weight"].clone()
    content = {"model_args": {"n_head": N_HEADS}, "state_dict": state}
    found = read(content, tmp_path / "x.bin")
    assert (found.config.activation, found.config.tied) == ("gelu_tanh", True)
    plain = draw_state()
    for ours, theirs in (("o_proj", "attn.c_proj"), ("qkv_proj", "attn.c_attn")):
        weight = found.weights[f"layers.1.self_attn.{ours}.weight"]
        assert torch.equal(weight, plain[f"transformer.h.1.{theirs}.weight"])


def change(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    full = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | full).items() if value is not None}


def test_what_is_no_gpt2_is_refused(tmp_path: Path) -> None:
    state = draw_state()
    args = {"n_head": N_HEADS}
    wte = "transformer__wte__weight"
    repeated = torch.ones(1).expand(ROWS, WIDTH)
    cases: dict[str, Any] = {
        "heads": state,
        "pickle": {"model": change(state, **{wte: torch.ones(65, WIDTH)}), "model_args": args},
        "missing": {"model": change(state, transformer__ln_f__weight=None), "model_args": args},
        "no part": {"model": change(state, transformer__x=torch.ones(1)), "model_args": args},
        "NaN": {
            "model": change(state, transformer__ln_f__weight=torch.full((WIDTH,), torch.nan)),
            "model_args": args,
        },
        "view of other memory": {
            "model": change(state, lm_head__weight=None, **{wte: repeated}),
            "model_args": args,
        },
        "not floating-point": {
            "model": change(state, transformer__ln_f__weight=torch.ones(WIDTH).long()),
            "model_args": args,
        },
        "GPT-2's names": {"a": torch.ones(1)},
        "no tensor": {"a": 1},
        "no dict": [1, 2],
    }
    for told, content in cases.items():
        with pytest.raises(PreflightError, match=told) as caught:
            read(content, tmp_path / "x.pt")
        assert caught.value.code == ExitCode.CHECKPOINT


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_nothing_is_executed_and_no_bomb_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile("c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02}." + b" " * 10**6)
    Path("d.pt").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    Path("e.pt").write_bytes(b"")
    for name in "abcde":
        with pytest.raises(PreflightError) as caught:
            StateDictImporter().read(Path(f"{name}.pt"))
        assert caught.value.code == ExitCode.CHECKPOINT
    assert not Path("executed").exists()
