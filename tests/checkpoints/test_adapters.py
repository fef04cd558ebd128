"""Checkpoints of adapters: the base that they share, what is refused, and PEFT's own files."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import samples
from generate import build_empty_model, load_model
from preflight.checkpoints import store
from preflight.checkpoints.adapters import (
    describe_adapter,
    find_base,
    identify_weights,
    link_base,
    read_adapter,
    read_peft_adapter,
)
from preflight.checkpoints.format import Checkpoint, load_weights
from preflight.checkpoints.manifest import render_manifest
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.device.runtime import Runtime
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.cost import resolve_adapter
from preflight.models.lora import add_adapters, list_trained_weights, load_trained_weights
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.settings.finetuning import ADAPTER_TARGETS, AdapterConfig
from preflight.tokenization import load_tokenizer
from preflight.training.merging import keep_base
from preflight.training.optimizers import build_optimizer
from preflight.training.plan import build_plan
from preflight.training.saved_state import load_saved_state
from tests.checkpoints.samples import CONFIG, HOSTILE, FakeTokenizer, mutate, refused, same
from tests.checkpoints.samples import save as save_sample
from trainer import Trainer

MODEL = ModelConfig(
    vocab_size=257, context_length=16, n_embeddings=8, n_heads=2, n_layers=2, ffn_hid_dim=12
)
ADAPTER = resolve_adapter(MODEL, AdapterConfig(3, 12.0, ADAPTER_TARGETS))
TRAINING = TrainingSettings(batch_size=4, max_steps=9, learning_rate=1e-2, warmup_steps=0)
CPU = torch.device("cpu")
INPUTS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(3))
TEMPLATE = {"chat_template.jinja": b"{{ messages }}"}
WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def describe(**more: Any) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(MODEL),
        "tokenizer": load_tokenizer("byte").describe(),
        "training": dataclasses.asdict(TRAINING),
        **more,
    }


def build_base(seed: int = 0) -> TokenModel:
    torch.manual_seed(seed)
    model = build_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_base(folder: Path, seed: int = 0) -> Checkpoint:
    """A run's checkpoint, as it was before anyone fine-tuned it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = list_trained_weights(build_base(seed))
    return save_checkpoint(
        folder, 7, weights, {}, describe(), {"val_loss": 2.0}, FakeTokenizer(), extra_files=TEMPLATE
    )


def build_trainer(base: Checkpoint, adapter: AdapterConfig = ADAPTER) -> Trainer:
    model = build_base(0)
    model.load_state_dict(load_weights(base))
    torch.manual_seed(1)
    add_adapters(model, adapter)
    plan = build_plan(TRAINING, ControlSettings(), MODEL.context_length, 1000, 20)
    optimizer = build_optimizer(model, TRAINING, plan.peak_learning_rate)
    runtime = Runtime(CPU, torch.float32, False, ())
    return Trainer(model, optimizer, plan, runtime, skips_on_device=True)


def train(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        tokens = torch.randint(0, 257, (4, 17), generator=torch.Generator().manual_seed(step))
        trainer.train_step(step, [(tokens[:, :-1], tokens[:, 1:])])


def save_adapted(
    output_dir: Path, trainer: Trainer, step: int, base: Checkpoint, **config: Any
) -> Checkpoint:
    state = {
        "state": {"step": step, "cursor": 4 * step, "tokens": 64 * step},
        "trainer": trainer.state_dict(),
        "data_fingerprint": "0" * 64,
        "tokens_per_step": 64,
    }
    described = describe(adapter=describe_adapter(ADAPTER, base)) | config
    return save_checkpoint(
        output_dir,
        step,
        list_trained_weights(trainer.model),
        state,
        described,
        {"val_loss": 1.5},
        optimizer=trainer.list_optimizer_tensors(),
        adapter=ADAPTER,
        extra_files=TEMPLATE,
    )


Run = tuple[Path, Path, Tensor]  # the checkpoint, the base that it was made from, the logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps on a base, and the logits of its model."""
    folder = tmp_path_factory.mktemp("run")
    origin = save_base(folder / "pretrained")
    (folder / "tuned").mkdir()
    base = link_base(origin, folder / "tuned")
    trainer = build_trainer(base)
    train(trainer, 0, 4)
    saved = save_adapted(folder / "tuned", trainer, 4, base)
    with torch.no_grad():
        return saved.path, origin.path, trainer.model(INPUTS)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of `made`, to be damaged."""
    for name in ("pretrained", "tuned"):
        shutil.copytree(made[0].parents[2] / name, tmp_path / name)
    step, origin = made[0].parts[-3:], made[1].parts[-3:]
    return tmp_path.joinpath(*step), tmp_path.joinpath(*origin), made[2]


def rewrite(folder: Path, **changes: Any) -> None:
    """A manifest of whatever the files hold now, as an attacker would write it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["checksum"]
    for name in manifest["files"]:
        if (folder / name).exists():
            raw = (folder / name).read_bytes()
            chunk_bytes = manifest["files"][name].get("chunk_bytes")
            manifest["files"][name] = samples.describe_bytes(raw, chunk_bytes)
    (folder / "manifest.json").write_bytes(render_manifest(manifest | changes))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(path: Path) -> TokenModel:
    return load_model(store.open_checkpoint(str(path)), CPU, torch.float32)[0]


# ---- what a run writes --------------------------------------------------------------------------


def test_a_model_loads_merged_and_is_the_trained_one(made: Run) -> None:
    path, origin, expected = made
    model = load(path)
    assert {type(m).__name__ for m in model.modules()}.isdisjoint({"LoRALinear"})
    found = model(INPUTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before = load(origin)(INPUTS)
    assert (found - before).abs().max() > 0.02
    # Named by the run's folder, it is found as any other is.
    torch.testing.assert_close(load(path.parents[1])(INPUTS), found, rtol=0, atol=0)


def test_the_checkpoint_holds_adapters_in_the_place_of_weights(made: Run) -> None:
    checkpoint = store.open_checkpoint(str(made[0]))
    assert checkpoint.manifest.weights_name == WEIGHTS
    assert "model.safetensors" not in checkpoint.manifest.files
    assert set(os.listdir(made[0])) == {*checkpoint.manifest.files, "manifest.json"}
    assert read_adapter(checkpoint) == ADAPTER
    config = json.loads((made[0] / PEFT_CONFIG).read_text())
    assert [config[key] for key in ("peft_type", "r", "lora_alpha")] == ["LORA", 3, 12.0]
    assert config["target_modules"] == ["down_proj", "o_proj", "qkv_proj", "up_proj"]
    assert (made[0] / "chat_template.jinja").read_bytes() == TEMPLATE["chat_template.jinja"]
    assert read_peft_adapter(made[0])[0] == ADAPTER
    shapes = {n: t.shape for n, t in load_file(made[0] / WEIGHTS).items()}
    assert len(shapes) == 16
    name = "base_model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    assert shapes[name] == (24, 3)


def test_the_base_is_kept_once_by_hard_links(made: Run) -> None:
    path, origin, _ = made
    base = path.parents[1] / "base"
    expected = set(os.listdir(origin)) - {"checkpoint.pt"}
    assert set(os.listdir(base)) == expected
    for name in expected - {"manifest.json"}:
        assert (base / name).stat().st_ino == (origin / name).stat().st_ino
    assert (base / "manifest.json").read_bytes() == (origin / "manifest.json").read_bytes()
    found = find_base(store.open_checkpoint(str(path)))
    assert found.path == base.resolve()
    for odd in (base.parent / "best", path / ".." / path.name):
        if not odd.exists():
            odd.symlink_to(path)
        assert find_base(store.open_checkpoint(str(odd))).path == base.resolve()
    # It is a checkpoint like any other, but for its training state.
    torch.testing.assert_close(load(base)(INPUTS), load(origin)(INPUTS), rtol=0, atol=0)


def test_a_cut_run_continues_bit_equal(made: Run, tmp_path: Path) -> None:
    base = Checkpoint(made[1], store.open_checkpoint(str(made[1])).manifest)
    whole = build_trainer(base)
    train(whole, 0, 7)
    origin = store.open_checkpoint(str(made[0]))
    empty = build_empty_model(origin)
    adapter = read_adapter(origin)
    assert adapter is not None
    add_adapters(empty, adapter)
    saved = load_saved_state(origin, empty, TRAINING)
    resumed = build_trainer(base)
    shapes = {n: tuple(t.shape) for n, t in list_trained_weights(empty).items()}
    load_trained_weights(resumed.model, load_weights(origin, shapes))
    resumed.load_state_dict(resumed.list_weights(), saved["optimizer"], saved["trainer"])
    train(resumed, 4, 7)
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    with refused(ExitCode.CHECKPOINT, "holds adapters, and this run trains all weights"):
        load_saved_state(origin, build_empty_model(origin), TRAINING)
    with refused(ExitCode.CHECKPOINT, "holds all weights, and this run trains adapters"):
        load_saved_state(base, empty, TRAINING)
    other = build_empty_model(origin)
    add_adapters(other, dataclasses.replace(adapter, rank=2))
    with refused(ExitCode.CHECKPOINT, "not those of this model"):
        load_saved_state(origin, other, TRAINING)


def test_the_same_adapters_on_another_base_are_other_weights(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        base = link_base(save_base(tmp_path / f"from{seed}", seed), tmp_path / f"from{seed}")
        trainer = build_trainer(base)
        saved = save_adapted(tmp_path / f"from{seed}", trainer, 8, base)
        assert identify_weights(base) == base.manifest.files["model.safetensors"].sha256
        digests += [identify_weights(saved), saved.manifest.files[WEIGHTS].sha256]
    assert digests[1] == digests[3]
    assert digests[0] != digests[2]


# ---- the base -----------------------------------------------------------------------------------


def test_linking_again_changes_nothing_and_another_base_is_refused(run: Run) -> None:
    path, origin, _ = run
    output_dir = path.parents[1]
    before = os.stat(output_dir / "base")
    checkpoint = store.open_checkpoint(str(origin))
    link_base(checkpoint, output_dir)
    link_base(store.open_checkpoint(str(output_dir / "base")), output_dir)
    assert os.stat(output_dir / "base") == before
    other = save_base(output_dir.parent / "other", seed=5)
    digests = [c.manifest.files["model.safetensors"].sha256 for c in (checkpoint, other)]
    with refused(ExitCode.CHECKPOINT, f"there {digests[0]}, here {digests[1]}"):
        link_base(other, output_dir)
    with pytest.raises(ValueError, match="no base by themselves"):
        link_base(store.open_checkpoint(str(path)), output_dir.parent / "other")
    assert os.stat(output_dir / "base") == before


def test_adapters_that_are_tuned_again_are_merged_into_a_base(run: Run) -> None:
    first = store.open_checkpoint(str(run[0]))
    output_dir = run[0].parents[2] / "again"
    output_dir.mkdir()
    base = keep_base(first, output_dir)
    assert set(os.listdir(base.path)) == {
        *("chat_template.jinja", "config.json", "manifest.json", "model.safetensors")
    }
    found = load(base.path)(INPUTS)
    torch.testing.assert_close(found, load(run[0])(INPUTS), rtol=0, atol=0)
    assert keep_base(first, output_dir).manifest == base.manifest
    assert keep_base(base, output_dir).manifest == base.manifest
    with refused(ExitCode.CHECKPOINT, f"there {identify_weights(first)}, here"):
        keep_base(store.open_checkpoint(str(run[1])), output_dir)
    trainer = build_trainer(base)
    train(trainer, 0, 3)
    second = save_adapted(output_dir, trainer, 3, base)
    expected = trainer.model(INPUTS)
    torch.testing.assert_close(load(second.path)(INPUTS), expected, rtol=1e-5, atol=1e-5)
    assert (expected - found).abs().max() > 0.01


@pytest.mark.parametrize("obstacle", ["another disk", "read only"])
def test_files_that_cannot_be_linked_are_copied(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = save_base(tmp_path / "pretrained")
    if obstacle == "read only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "tuned").mkdir()
    base = link_base(origin, tmp_path / "tuned")
    for name in base.manifest.files.keys() - {"checkpoint.pt"}:
        assert (base.path / name).stat().st_ino != (origin.path / name).stat().st_ino
        assert (base.path / name).read_bytes() == (origin.path / name).read_bytes()
    assert not (base.path / "checkpoint.pt").exists()


def test_a_damaged_origin_leaves_no_base_and_leftovers_are_cleared(tmp_path: Path) -> None:
    origin = save_base(tmp_path / "pretrained")
    weights = origin.path / "model.safetensors"
    content = weights.read_bytes()
    output_dir = tmp_path / "tuned"
    (output_dir / ".tmp-base").mkdir(parents=True)
    (output_dir / ".tmp-base" / "model.safetensors").write_bytes(b"half of it")
    weights.write_bytes(mutate(content, "flip", 9_000))
    with refused(ExitCode.CHECKPOINT, "its content has changed"):
        link_base(origin, output_dir)
    assert os.listdir(output_dir) == []
    weights.write_bytes(content)
    link_base(origin, output_dir)
    assert os.listdir(output_dir) == ["base"]
    (output_dir / ".tmp-base").mkdir()
    store.remove_leftovers(output_dir)
    assert os.listdir(output_dir) == ["base"]


def break_base(kind: str, base: Path, other: Path) -> None:
    if kind == "missing":
        shutil.rmtree(base)
    elif kind == "another":
        shutil.rmtree(base)
        shutil.copytree(other, base)
    elif kind == "flipped":
        path = base / "model.safetensors"
        path.write_bytes(mutate(path.read_bytes(), "flip", 5_000))
    elif kind == "a link":
        base.rename(base.with_name("moved"))
        base.symlink_to(base.with_name("moved"))
    elif kind == "another model":
        edit_json(base / "config.json", model=dataclasses.asdict(MODEL) | {"n_heads": 4})
        rewrite(base)
    else:
        (base / "manifest.json").unlink()


BROKEN = {
    "missing": r"SHA-256 of its model.safetensors: expected [0-9a-f]{64}\n.*put the checkpoint",
    "another": r"expected [0-9a-f]{64}, found [0-9a-f]{64}\n.*put the checkpoint",
    "flipped": r"base/model.safetensors: its content has changed\nSHA-256: expected",
    "a link": "symbolic link, which is not followed",
    "another model": "config.json: not the model of",
    "no manifest": "No such file",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_base_that_is_not_the_adapters_is_refused(kind: str, run: Run) -> None:
    path, _, _ = run
    other = save_base(path.parents[2] / "other", seed=5)
    break_base(kind, path.parents[1] / "base", other.path)
    checkpoint = store.open_checkpoint(str(path))
    with refused(ExitCode.CHECKPOINT, BROKEN[kind]):
        find_base(checkpoint)
    with refused(ExitCode.CHECKPOINT, BROKEN[kind]):
        load(path)


# ---- files that a stranger wrote ----------------------------------------------------------------

Change = Callable[[Path], None]


def change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def put(name: str, **changes: Any) -> Change:
    return lambda folder: edit_json(folder / name, **changes)


def section(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())["adapter"]
        edit_json(folder / "config.json", adapter=found | changes)

    return apply


def both(alpha: Any = 12.0, rank: Any = 3) -> Change:
    def apply(folder: Path) -> None:
        section(alpha=alpha, rank=rank)(folder)
        edit_json(folder / PEFT_CONFIG, lora_alpha=alpha, r=rank)

    return apply


FIRST = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
OTHER = "base_model.model.layers.0.mlp.gate_up_proj.lora_A.weight"
EMBEDDING = "base_model.model.embed_tokens.lora_A.weight"
DAMAGED: dict[str, tuple[Change, str]] = {
    "a wrong shape": (
        change_weights(lambda w: w.update({FIRST: torch.ones(3, 9)})),
        r"lora_A.*checkpoint \(3, 9\), model \(3, 8\)",
    ),
    "another layer": (change_weights(lambda w: w.update({OTHER: w.pop(FIRST)})), "gate_up_proj"),
    "an embedding": (change_weights(lambda w: w.update({EMBEDDING: w[FIRST] + 0})), "embed_tokens"),
    "half an adapter": (change_weights(lambda w: w.pop(FIRST)), "checkpoint none, model"),
    "another rank": (both(rank=2), r"checkpoint \(\d+, 3\), model \(\d+, 2\)"),
    "a rank that no file can hold": (both(rank=4000), "describes .* parameters, and adapter_model"),
    "a rank of zero": (both(rank=0), "adapter section: rank"),
    "a rank too large": (both(rank=10**9), "adapter section: rank"),
    "NaN": (change_weights(lambda w: w[FIRST].fill_(float("nan"))), "NaN or infinite"),
    "alpha zero": (both(alpha=0), "adapter section: alpha"),
    "alpha negative": (both(alpha=-1.0), "adapter section: alpha"),
    "alpha a word": (both(alpha="12"), "adapter section: alpha"),
    "other alphas": (put(PEFT_CONFIG, lora_alpha=13), "contradicts config.json\n.*13.*\n.*12"),
    "other targets": (section(targets=["qkv_proj"]), "contradicts config.json"),
    "an unknown target": (section(targets=["lm_head"]), "adapter section: targets.0.*lm_head"),
    "no targets": (section(targets=[]), "adapter section: targets"),
    "a digest that is none": (section(base_sha256="x"), "adapter section: base_sha256"),
    "no section": (put("config.json", adapter=None), "adapter section"),
    "a list for a section": (put("config.json", adapter=[1]), "adapter section"),
    "dora": (put(PEFT_CONFIG, use_dora=True), "use_dora is set"),
    "another method": (put(PEFT_CONFIG, peft_type="IA3"), "peft_type"),
    "no JSON": (lambda folder: (folder / PEFT_CONFIG).write_bytes(b"{"), PEFT_CONFIG),  # type: ignore[dict-item]
    "another model": (
        put("config.json", model=dataclasses.asdict(MODEL) | {"ffn_hid_dim": 13}),
        "not those of this model",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_forged_checkpoint_of_adapters_is_refused(kind: str, run: Run) -> None:
    change, pattern = DAMAGED[kind]
    change(run[0])
    rewrite(run[0])
    with refused(ExitCode.CHECKPOINT, pattern):
        load(run[0])


def test_exactly_one_of_the_two_files_of_weights_is_listed(run: Run) -> None:
    path, origin, _ = run
    files = json.loads((path / "manifest.json").read_text())["files"]
    entry = files[WEIGHTS]
    for changed, pattern in (
        (files | {"model.safetensors": entry}, "exclude each other"),
        ({n: e for n, e in files.items() if n != WEIGHTS}, "model.safetensors must be listed"),
        ({n: e for n, e in files.items() if n != PEFT_CONFIG}, f"{PEFT_CONFIG} must be listed"),
    ):
        rewrite(path, files=changed)
        with refused(ExitCode.CHECKPOINT, pattern):
            load(path)
    edit_json(origin / "config.json", adapter={"rank": 3})
    rewrite(origin)
    with refused(ExitCode.CHECKPOINT, f"describes an adapter, and there is no {WEIGHTS}"):
        load(origin)


def test_files_are_stored_under_plain_names_and_verified(run: Run, tmp_path: Path) -> None:
    for name in ("../x", "a/b", ".hidden", "config.json", WEIGHTS, "manifest.json", ""):
        with pytest.raises(ValueError, match=r"own file|pattern"):
            save_checkpoint(tmp_path, 1, {}, {}, CONFIG, {}, extra_files={name: b"x"})
    (run[0] / "chat_template.jinja").write_bytes(b"{{ messagez }}")
    with refused(ExitCode.CHECKPOINT, r"chat_template.jinja: its content has changed"):
        load(run[0])
    plain = save_sample(tmp_path, 3)
    assert plain.manifest.weights_name == "model.safetensors"
    assert read_adapter(plain) is None


def test_what_is_saved_must_be_what_is_described(made: Run, tmp_path: Path) -> None:
    base = store.open_checkpoint(str(made[1]))
    trainer = build_trainer(base)
    for odd in ({"rank": 4}, {"alpha": 1.0}, {"targets": ["qkv_proj"]}, {"base_sha256": ""}):
        described = describe_adapter(ADAPTER, base) | odd
        with pytest.raises(ValueError, match=r"describes|base_sha256"):
            save_adapted(tmp_path, trainer, 1, base, adapter=described)
    one = dataclasses.replace(ADAPTER, targets=("qkv_proj",))
    with pytest.raises(ValueError, match="are not of"):
        save_checkpoint(
            tmp_path,
            1,
            list_trained_weights(trainer.model),
            {},
            describe(adapter=describe_adapter(one, base)),
            {},
            adapter=one,
        )
    assert os.listdir(tmp_path) == []


# ---- PEFT's own files ---------------------------------------------------------------------------

UNKNOWN = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"up_proj": 4},
    "alpha_pattern": {"up_proj": 4},
    "use_rslora": True,
    "fan_in_fan_out": True,
    "layers_to_transform": [0],
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "init_lora_weights": "pissa",
    "some_later_key": 1,
    "target_modules": "all-linear",
    "r": 4,
    "lora_alpha": 0,
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_what_an_adapter_here_cannot_be_is_refused_by_name(key: str, run: Run) -> None:
    edit_json(run[0] / PEFT_CONFIG, **{key: UNKNOWN[key]})
    with refused(ExitCode.CHECKPOINT, "rank 4" if key == "r" else key):
        read_peft_adapter(run[0])


TENSORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no adapter of": lambda w: w.update({OTHER: w.pop(FIRST)}),
    "'base_model.model.embed_tokens": lambda w: w.update({EMBEDDING: w[FIRST] + 0}),
    "no adapter of .*layers.9999": lambda w: w.update({FIRST.replace("0", "9999"): w[FIRST] + 0}),
    "is not of rank 3": lambda w: w.update({FIRST: torch.ones(4, 8)}),
    r"\(24,\) is not": lambda w: w.update({FIRST: torch.ones(24)}),
    "A or B is missing: layers.0.mlp.up_proj": lambda w: w.pop(FIRST),
    "there are no tensors": lambda w: w.clear(),
    "NaN": lambda w: w[FIRST].fill_(float("inf")),
    "not floating-point": lambda w: w.update({FIRST: torch.ones(3, 8, dtype=torch.int8)}),
}


@pytest.mark.parametrize("pattern", TENSORS)
def test_tensors_that_are_no_adapters_are_refused(pattern: str, run: Run) -> None:
    change_weights(TENSORS[pattern])(run[0])
    with refused(ExitCode.CHECKPOINT, pattern):
        read_peft_adapter(run[0])


@HOSTILE
@given(
    st.sampled_from([WEIGHTS, PEFT_CONFIG]),
    st.sampled_from(["flip", "cut", "grow"]),
    st.integers(0, 10**6),
)
def test_damaged_bytes_are_read_or_refused(
    made: Run, tmp_path: Path, name: str, kind: str, place: int
) -> None:
    for each in (WEIGHTS, PEFT_CONFIG):
        shutil.copyfile(made[0] / each, tmp_path / each)
    (tmp_path / name).write_bytes(mutate((made[0] / name).read_bytes(), kind, place))
    try:
        adapter, weights = read_peft_adapter(tmp_path)
    except PreflightError as error:
        assert error.code == ExitCode.CHECKPOINT
    else:
        assert 0 < adapter.rank <= 4096
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
