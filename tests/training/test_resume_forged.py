"""A checkpoint whose content was changed and whose hashes are true: refused, or used safely."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints.samples import refused, rewrite_manifest, same, torch_bytes
from early_format import list_names, make_early
from mutations import find_places

from generate import build_empty_model
from preflight.checkpoints import store
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.device.runtime import Runtime
from preflight.models.protocol import LanguageModel, ParameterGroup
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.settings.kinds import OPTIMIZERS
from preflight.training.optimizers import OptimizerSpec
from preflight.training.plan import build_plan
from preflight.training.saved_state import load_saved_state
from preflight.training.state import TrainState
from trainer import Trainer, build_trainer

MODEL = ModelConfig(
    vocab_size=97, context_length=16, n_embeddings=8, n_heads=2, n_layers=2, ffn_hid_dim=12
)
CPU = Runtime(torch.device("cpu"), torch.float32, False, ())
STEPS = 3
State = dict[str, Any]


def build(training: TrainingSettings) -> Trainer:
    plan = build_plan(training, ControlSettings(), MODEL.context_length, 1000, 20)
    return build_trainer(MODEL, training, plan, CPU)


def train(trainer: Trainer, step: int) -> None:
    tokens = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(step))
    trainer.train_step(step, [(tokens[:, :-1], tokens[:, 1:])])


def describe(optimizer: str, **changes: Any) -> TrainingSettings:
    return TrainingSettings(batch_size=4, max_steps=9, optimizer=optimizer, **changes)


def save(output_dir: Path, training: TrainingSettings, step: int = STEPS) -> Path:
    """A checkpoint after `step` steps, as `--train` writes it."""
    trainer = build(training)
    for number in range(step):
        train(trainer, number)
    saved = save_checkpoint(
        output_dir,
        step,
        dict(trainer.model.state_dict()),
        {
            "state": {
                "step": step,
                "cursor": 4 * step,
                "tokens": 64 * step,
                "best_val_loss": 4.5,
                "evaluated_step": min(step, 2),
                "eval_windows": 8,
                "stale_evaluations": 1,
            },
            "trainer": trainer.state_dict(),
            "data_fingerprint": "0" * 64,
            "tokens_per_step": 64,
        },
        {
            "model": dataclasses.asdict(MODEL),
            "tokenizer": {"name": "gpt2", "fingerprint": "f" * 64},
            "training": dataclasses.asdict(training),
        },
        {"val_loss": 4.5},
        optimizer=trainer.list_optimizer_tensors(),
    )
    return saved.path


def save_early(output_dir: Path, training: TrainingSettings, step: int = STEPS) -> Path:
    """The same in format v2, which had the optimizer within ``checkpoint.pt``."""
    folder = save(output_dir, training, step)
    make_early(folder, training.optimizer)
    return folder


def load(folder: Path, training: TrainingSettings, model: LanguageModel | None = None) -> State:
    """What a resumed run does before it takes anything from the checkpoint."""
    origin = store.open_checkpoint(str(folder))
    return load_saved_state(origin, model or build_empty_model(origin), training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_early(tmp_path_factory.mktemp("forged"), describe("adamw"))


@pytest.fixture(scope="module")
def honest(folder: Path) -> State:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def forge(folder: Path, state: State) -> None:
    (folder / "checkpoint.pt").write_bytes(torch_bytes(state))
    rewrite_manifest(folder)


def read_early(state: State) -> State:
    """What is loaded of the content of ``checkpoint.pt`` in format v2."""
    state = copy.deepcopy(state)
    trainer = build(describe("adamw"))
    names = list_names(trainer.model, trainer.optimizer)
    held = state["trainer"].pop("optimizer")["state"]
    state["optimizer"] = {
        f"{names[i]}.{key}": t for i, each in held.items() for key, t in each.items()
    }
    return state


def put(path: str, value: Any) -> Callable[[State], None]:
    """Replaces what is at ``a/b/0/c``; a callable makes the new value of the old one."""

    def change(state: State) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def take(path: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            state = state[key]
        del state[last]

    return change


MOMENTS = "trainer/optimizer/state/0"
FORGERIES: dict[str, Callable[[State], None]] = {
    "step 0": put("state/step", 0),
    "step of another checkpoint": put("state/step", 2),
    "step 2^70": put("state/step", 2**70),
    "step as a float": put("state/step", float(STEPS)),
    "step as a text": put("state/step", str(STEPS)),
    "step True": put("state/step", True),
    "no step": take("state/step"),
    "cursor -5": put("state/cursor", -5),
    "cursor 2^70": put("state/cursor", 2**70),
    "cursor None": put("state/cursor", None),
    "cursor beyond the samples": put("state/cursor", 4 * STEPS + 1),
    "cursor beyond the tokens": put("state/cursor", 1000),
    "fewer tokens than steps": put("state/tokens", 2),
    "tokens as a tensor": put("state/tokens", torch.tensor(192)),
    "evaluated in the future": put("state/evaluated_step", STEPS + 1),
    "stale evaluations negative": put("state/stale_evaluations", -1),
    "windows negative": put("state/eval_windows", -1),
    "loss as a text": put("state/best_val_loss", "4.5"),
    "loss inf": put("state/best_val_loss", float("inf")),
    "loss nan": put("state/best_val_loss", float("nan")),
    "state as a list": put("state", []),
    "no state": take("state"),
    "no trainer": take("trainer"),
    "trainer as a list": put("trainer", []),
    "fingerprint as a number": put("data_fingerprint", 5),
    "fingerprint with colours": put("data_fingerprint", "\x1b[31m" + "0" * 59),
    "no tokens per step": put("tokens_per_step", 0),
    "tokens per step 2^70": put("tokens_per_step", 2**70),
    "device with a line end": put("trainer/device", "cpu\ncuda"),
    "no random state": put("trainer/rng", {}),
    "random state as a list": put("trainer/rng/cpu", [1] * 5056),
    "random state too short": put("trainer/rng/cpu", lambda t: t[:100].clone()),
    "random state of floats": put("trainer/rng/cpu", lambda t: t.float()),
    "random state all ones": put("trainer/rng/cpu", lambda t: torch.full_like(t, 255)),
    "random state of CUDA too long": put("trainer/rng/cuda", torch.zeros(17, dtype=torch.uint8)),
    "scaler as a number": put("trainer/scaler", 1.0),
    "scaler without a scale": put("trainer/scaler", {"_growth_tracker": 1}),
    "scaler negative": put("trainer/scaler", {"scale": -1.0, "_growth_tracker": 1}),
    "scaler 2^70 steps": put("trainer/scaler", {"scale": 1.0, "_growth_tracker": 2**70}),
    "optimizer as a list": put("trainer/optimizer", []),
    "no optimizer state": put("trainer/optimizer/state", {}),
    "optimizer state as a list": put("trainer/optimizer/state", lambda s: list(s.values())),
    "a parameter missing": take(MOMENTS),
    "a parameter more": put("trainer/optimizer/state", lambda s: s | {99: s[0]}),
    "a parameter -1": put("trainer/optimizer/state", lambda s: s | {-1: s[0]}),
    "no moments": put(MOMENTS, {}),
    "moments as a list": put(MOMENTS, lambda m: list(m.values())),
    "a moment missing": take(f"{MOMENTS}/exp_avg"),
    "a moment more": put(MOMENTS, lambda m: m | {"max_exp_avg_sq": torch.ones(24, 8)}),
    "moments of one element": put(f"{MOMENTS}/exp_avg", torch.zeros(1)),
    "moments of one element, expanded": put(
        f"{MOMENTS}/exp_avg", lambda t: torch.zeros(1).expand(t.shape)
    ),
    "moments of stride 0": put(
        f"{MOMENTS}/exp_avg_sq", lambda t: torch.zeros(t.shape[1]).as_strided(t.shape, (0, 1))
    ),
    "moments expanded to 10^12": put(f"{MOMENTS}/exp_avg", torch.zeros(1).expand(10**12)),
    "moments transposed in memory": put(f"{MOMENTS}/exp_avg", lambda t: t.t().contiguous().t()),
    "moments transposed": put(f"{MOMENTS}/exp_avg", lambda t: t.t().contiguous()),
    "moments flat": put(f"{MOMENTS}/exp_avg", lambda t: t.flatten()),
    "moments in fp64": put(f"{MOMENTS}/exp_avg", lambda t: t.double()),
    "moments of whole numbers": put(f"{MOMENTS}/exp_avg", lambda t: t.long()),
    "moments nan": put(f"{MOMENTS}/exp_avg", lambda t: t * float("nan")),
    "second moments negative": put(f"{MOMENTS}/exp_avg_sq", lambda t: -1 - t),
    "moments as a number": put(f"{MOMENTS}/exp_avg", 0.0),
    "moments shared": put(MOMENTS, lambda m: m | {"exp_avg": m["exp_avg_sq"]}),
    "empty step": put(f"{MOMENTS}/step", torch.empty(0)),
    "step of the optimizer as a number": put(f"{MOMENTS}/step", 3),
    "step of the optimizer negative": put(f"{MOMENTS}/step", torch.tensor(-3.0)),
    "step of the optimizer in the future": put(f"{MOMENTS}/step", torch.tensor(4.0)),
    "parameter groups as a number": put("trainer/optimizer/param_groups", 3),
    "no parameter groups": put("trainer/optimizer/param_groups", []),
    "a parameter group of another model": take("trainer/optimizer/param_groups/0/params/0"),
    "parameters in another order": put(
        "trainer/optimizer/param_groups/0/params", lambda ids: ids[::-1]
    ),
}
HARMLESS: dict[str, Callable[[State], None]] = {
    "unchanged": lambda state: None,
    "hyperparameters": put(
        "trainer/optimizer/param_groups/0",
        lambda group: group | {"maximize": True, "amsgrad": 1, "lr": "x", "betas": [], "new": {}},
    ),
    "more keys": lambda state: state.update(new={"x": [1, "y"]}),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_states_are_refused(folder: Path, honest: State, kind: str) -> None:
    forged = copy.deepcopy(honest)
    FORGERIES[kind](forged)
    forge(folder, forged)
    began = time.monotonic()
    with refused(ExitCode.CHECKPOINT, r"checkpoint\.pt"):
        load(folder, describe("adamw"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_a_newer_version_may_add_is_accepted(folder: Path, honest: State, kind: str) -> None:
    forged = copy.deepcopy(honest)
    HARMLESS[kind](forged)
    forge(folder, forged)
    assert same(load(folder, describe("adamw")), read_early(forged))


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("adamw", {}),
        ("adam", {}),
        ("sgd", {}),
        ("sgd", {"beta1": 0.0}),
        ("muon", {}),
        ("adafactor", {}),
    ],
)
@pytest.mark.parametrize("step", [0, STEPS])
def test_the_state_of_each_optimizer_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, changes: State, step: int
) -> None:
    """Also of one that keeps rows and columns, and of a run saved before its first step."""

    def build_adafactor(
        groups: list[ParameterGroup], training: TrainingSettings, learning_rate: float
    ) -> torch.optim.Optimizer:
        return torch.optim.Adafactor([p for g in groups for p in g.parameters], lr=1e-3)

    monkeypatch.setattr(OPTIMIZERS, "_targets", dict(OPTIMIZERS._targets))
    OPTIMIZERS.register("adafactor", OptimizerSpec(build_adafactor, lambda *_: 1))
    training = describe(optimizer, **changes)
    folder = save(tmp_path, training, step)
    expected = torch.load(folder / "checkpoint.pt", weights_only=True)
    expected["optimizer"] = safetensors.torch.load_file(folder / "optimizer.safetensors")
    assert same(load(folder, training), expected)


@pytest.mark.parametrize(
    ("saved", "other"), [("adamw", "sgd"), ("sgd", "adamw"), ("muon", "adamw"), ("adamw", "muon")]
)
def test_another_optimizer_is_refused(tmp_path: Path, saved: str, other: str) -> None:
    folder = save(tmp_path, describe(saved))
    with refused(ExitCode.CHECKPOINT, "exp_avg"):
        load(folder, describe(other))


@pytest.mark.parametrize(
    "change",
    [
        put("trainer/optimizer/state/0", lambda s: s | {"exp_avg": s["momentum_buffer"].clone()}),
        put("trainer/optimizer/state/0/momentum_buffer", lambda t: t.t().contiguous()),
        put("trainer/optimizer/state/0/momentum_buffer", lambda t: t * float("nan")),
        put("trainer/optimizer/state/8/exp_avg_sq", lambda t: -1 - t),
        put("trainer/optimizer/state/8/step", torch.tensor(4.0)),
        put("trainer/optimizer/state/0", lambda s: {}),
    ],
)
def test_forged_states_of_muon_are_refused(tmp_path: Path, change: Callable[[State], None]) -> None:
    folder = save_early(tmp_path, describe("muon"))
    forged = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(forged)
    forge(folder, forged)
    with refused(ExitCode.CHECKPOINT, r"checkpoint\.pt"):
        load(folder, describe("muon"))


# ---- one change anywhere ------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**53 + 1, 2**70, -(2**70), 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "\x1b[2J", [], {}, (), [0], {"x": 0}, {0: {}}),
    torch.zeros(()),
    torch.zeros(0),
    torch.ones(8),
    torch.zeros(8, dtype=torch.uint8),
)
TENSOR_CHANGES: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.reshape(-1)[0].expand(t.shape),
    lambda t: t.double(),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.t() if t.dim() == 2 else t[..., None],
    lambda t: torch.zeros_like(t),
    lambda t: t.bitwise_not() if t.dtype == torch.uint8 else -t,
    lambda t: t.tolist(),
)


def change_once(state: State, draw: random.Random) -> None:
    """One value replaced, doubled or renamed, or one key taken out, at any depth."""
    holder, key = draw.choice(find_places(state))
    act = draw.randrange(8)
    if act == 0:
        del holder[key]
    elif act == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif act == 2 and isinstance(holder, dict):
        holder[draw.choice([0, -1, 99, "x"])] = holder[key]
    elif act < 6 and isinstance(holder[key], torch.Tensor):
        holder[key] = draw.choice(TENSOR_CHANGES)(holder[key])
    else:
        holder[key] = draw.choice(ODD)


def test_one_change_anywhere_is_refused_or_harmless(folder: Path, honest: State) -> None:
    """What is accepted is what the file holds, and a run goes on from it."""
    draw, accepted = random.Random(1), 0
    trainer = build(describe("adamw"))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for number in range(100):
        forged = copy.deepcopy(honest)
        change_once(forged, draw)
        forge(folder, forged)
        try:
            state = load(folder, describe("adamw"), trainer.model)
        except PreflightError as error:
            assert error.code == ExitCode.CHECKPOINT, number
            assert len(error.lines) <= 5
            assert str(error).replace("\n", "").isprintable()
            continue
        accepted += 1
        assert same(state, read_early(forged)), number
        trainer.load_state_dict(weights, state["optimizer"], state["trainer"])
        train(trainer, STEPS)
        assert all(bool(p.isfinite().all()) for p in trainer.model.parameters()), number
    assert 5 < accepted < 60


# ---- the weights and config.json ----------------------------------------------------------------


def rewrite_config(folder: Path, section: str, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    config[section] |= changes
    path.write_text(json.dumps(config))
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 10**7},
        {"n_layers": 1000},
        {"n_layers": 2**70},
        {"n_layers": 10**7, "n_embeddings": 1, "n_heads": 1, "ffn_hid_dim": 1},
        {"vocab_size": 2**31 - 1},
        {"context_length": 1_048_576},
        {"ffn_hid_dim": 262_144},
        {"n_embeddings": 65_536},
        {"n_layers": 3},
        {"n_layers": 1},
        {"n_embeddings": 16},
        {"n_layers": True},
        {"dropout": 1.5},
    ],
)
def test_forged_architectures_are_refused_at_once(tmp_path: Path, changes: State) -> None:
    folder = save(tmp_path, describe("adamw"))
    rewrite_config(folder, "model", **changes)
    began = time.monotonic()
    with refused(ExitCode.CHECKPOINT):
        load(folder, describe("adamw"))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\ud800", "x" * 10_000, 5, None, []])
@pytest.mark.parametrize("key", ["name", "fingerprint", "kind"])
def test_forged_tokenizer_sections_are_refused(tmp_path: Path, key: str, name: Any) -> None:
    folder = save(tmp_path, describe("sgd"), 0)
    rewrite_config(folder, "tokenizer", **{key: name})
    with refused(ExitCode.CHECKPOINT, "tokenizer"):
        _ = store.open_checkpoint(str(folder)).config


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
def test_forged_weights_are_refused(tmp_path: Path, value: float) -> None:
    folder = save(tmp_path, describe("sgd"), 0)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["norm.bias"] = weights["norm.bias"].double().fill_(value)
    safetensors.torch.save_file(weights, path)
    rewrite_manifest(folder)
    with refused(ExitCode.CHECKPOINT, r"norm\.bias"):
        load(folder, describe("sgd"))


def test_many_small_layers_are_refused_at_once(tmp_path: Path) -> None:
    """More than any flags describe, though the file is large enough."""
    folder = save(tmp_path, describe("sgd"), 0)
    safetensors.torch.save_file({"x": torch.zeros(10**6)}, folder / "model.safetensors")
    shape = {"n_layers": 10**5, "n_embeddings": 1, "n_heads": 1, "ffn_hid_dim": 1}
    rewrite_config(folder, "model", **shape)
    began = time.monotonic()
    with refused(ExitCode.CHECKPOINT, "--n-layers must be at most"):
        load(folder, describe("sgd"))
    assert time.monotonic() - began < 2


def test_no_more_windows_are_evaluated_than_there_are() -> None:
    state = TrainState(eval_windows=2**53)
    plan = build_plan(describe("sgd"), ControlSettings(), MODEL.context_length, 1000, 20, state)
    assert plan.eval_windows == 20
