"""A checkpoint and a data folder of format v1, written by the first release: they work for ever.

``tests/fixtures/v1/README.md`` says how they were made.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faults.harness import is_equal, read_rows, read_state

from conftest import CommandRunner, build
from generate import build_empty_model
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.manifest import render_manifest
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.v1 import rename_weight
from preflight.core.errors import PreflightError
from preflight.corpus.shards import load_data_folder
from preflight.settings import TrainingSettings
from preflight.tokenization import load_tokenizer
from preflight.training import resume
from preflight.training.saved_state import load_saved_state

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1"
FOLDER = FIXTURE / "run" / "milestones" / "checkpoint-4"
LAYER_NAMES = {  # written out: the oracle must not be the code under test
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn.qkv_proj",
    "attention.projection": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.expand": "mlp.up_proj",
    "feed_forward.contract": "mlp.down_proj",
}
NAMES = {
    "token_embedding.weight": "embed_tokens.weight",
    "position_embedding.weight": "embed_positions.weight",
    "final_norm.weight": "norm.weight",
    "final_norm.bias": "norm.bias",
} | {
    f"blocks.{layer}.{old}.{kind}": f"layers.{layer}.{new}.{kind}"
    for layer in (0, 1)
    for old, new in LAYER_NAMES.items()
    for kind in ("weight", "bias")
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The fixture, where it may be changed: ``data``, ``run`` and ``text.txt``."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    return tmp_path


def open_fixture() -> Checkpoint:
    return store.open_checkpoint(str(FOLDER))


# ---- reading ------------------------------------------------------------------------------------


def test_weights_get_the_names_of_v2() -> None:
    raw = safetensors.torch.load_file(FOLDER / "model.safetensors")
    assert raw.keys() == NAMES.keys()
    found = checkpoint_format.load_weights(open_fixture())
    assert found.keys() == set(NAMES.values())
    for old, new in NAMES.items():
        assert torch.equal(found[new], raw[old]), old


def test_shapes_are_compared_by_the_new_names() -> None:
    shapes = {
        name: tuple(t.shape) for name, t in checkpoint_format.load_weights(open_fixture()).items()
    }
    checkpoint_format.load_weights(open_fixture(), shapes)
    with pytest.raises(PreflightError, match=r"norm\.bias: checkpoint \(4,\), model \(5,\)"):
        checkpoint_format.load_weights(open_fixture(), shapes | {"norm.bias": (5,)})


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",  # a name of v2: beside the v1 name, one would replace the other
        "blocks.0.final_norm.weight",
        "attention_norm.weight",
        "blocks.x.attention.qkv.weight",
        "blocks.0.attention.qkv.weight.weight",
        "token_embedding",
        "",
    ],
)
def test_a_name_that_v1_does_not_have(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="format v1 has no weight"):
        rename_weight(name)
    path = folder / "run" / "milestones" / "checkpoint-4" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights | {name: torch.ones(1)}, path)
    write_true_entry(path)
    with pytest.raises(PreflightError, match="format v1 has no weight") as caught:
        checkpoint_format.load_weights(store.open_checkpoint(str(path.parent)))
    assert caught.value.code == 5


def write_true_entry(path: Path) -> None:
    """Make the manifest true of what a file of the checkpoint holds now."""
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    del manifest["checksum"]
    entry = {"bytes": path.stat().st_size, "sha256": checkpoint_format.storage.hash_file(path)}
    manifest["files"][path.name] = entry
    (path.parent / "manifest.json").write_bytes(render_manifest(manifest))


def test_state_config_and_losses() -> None:
    found = open_fixture()
    assert (found.step, found.manifest.format_version) == (4, 1)
    assert found.val_loss == 10.603343963623047
    assert found.model_config.n_embeddings == 4
    state = checkpoint_format.load_training_state(found)
    assert state["state"]["step"] == 4
    sizes = [tuple(s["exp_avg"].shape) for s in state["trainer"]["optimizer"]["state"].values()]
    shapes = [tuple(t.shape) for t in checkpoint_format.load_weights(found).values()]
    assert sorted(sizes) == sorted(shapes)


def test_settings_are_adopted() -> None:
    found, tokenizer = open_fixture(), load_tokenizer("gpt2")
    assert "kind" not in found.config["tokenizer"]
    resume.check_tokenizer(found, tokenizer)
    config = resume.adopt_settings(build({"max_steps": 9, "batch_size": 1}), found)
    assert config.training.max_steps == 9
    assert config.training.batch_size == 1
    assert config.training.learning_rate == 0.01
    assert config.training.gradient_accumulation_steps == 2
    assert config.model.tokenizer == "gpt2"
    model_config = resume.resolve_model(config, tokenizer, found)
    assert (model_config.n_layers, model_config.dropout) == (2, 0.1)


def test_recorded_validation_keeps_the_version(folder: Path) -> None:
    """Else the v1 names in the weights would be taken for v2 names."""
    found = store.find_newest(folder / "run")
    assert found is not None
    checkpoint_format.record_validation(found, 1.0)
    again = store.open_checkpoint(str(found.path))
    assert (again.val_loss, again.manifest.format_version) == (1.0, 1)
    assert checkpoint_format.load_weights(again).keys() == set(NAMES.values())


def test_data_folder() -> None:
    data = load_data_folder(FIXTURE / "data", load_tokenizer("gpt2"))
    assert (data.train.n_tokens, data.val.n_tokens) == (4288, 211)
    assert data.fingerprint == open_fixture().config["data"]["fingerprint"]


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "flags"),
    [("greedy.txt", ["--temperature", "0"]), ("sampled.txt", ["--seed", "3"])],
)
def test_the_same_text_is_generated(
    folder: Path, preflight: CommandRunner, stored: str, flags: list[str]
) -> None:
    command = "--generate --device cpu --max-new-tokens 24 --checkpoint-path".split()
    place = "run/milestones/checkpoint-4"
    done = preflight(*command, place, "--prompts", "the quick", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (FIXTURE / stored).read_text(encoding="utf-8")


def continue_run(folder: Path, preflight: CommandRunner, output_dir: str) -> None:
    flags = "--train --text-file text.txt --data-dir data --device cpu --no-mixed-precision".split()
    every = ("--eval-every", "4", "--checkpoint-every", "4")
    done = preflight(*flags, *every, "--output-dir", output_dir)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {output_dir}/milestones/checkpoint-4 " in done.stderr


@pytest.mark.slow
def test_the_run_continues(folder: Path, preflight: CommandRunner) -> None:
    """Equal to the stored end of the run that was not cut, but for another CPU's rounding; and,
    on this machine, bit for bit equal to the same state saved in today's format."""
    old = store.open_checkpoint(str(folder / "run" / "milestones" / "checkpoint-4"))
    (folder / "new").mkdir()
    training = TrainingSettings(**resume.read_saved_settings(old))
    state = load_saved_state(old, build_empty_model(old), training)
    optimizer = state.pop("optimizer")
    save_checkpoint(
        folder / "new",
        4,
        checkpoint_format.load_weights(old),
        state,
        old.config,
        old.manifest.losses,
        optimizer=optimizer,
    )
    for output_dir in ("run", "new"):
        continue_run(folder, preflight, output_dir)
    run, new = (
        (*read_state(folder / name, 8), read_rows(folder / name)) for name in ("run", "new")
    )
    assert is_equal(run, new)

    end = store.open_checkpoint(str(folder / "run" / "milestones" / "checkpoint-8"))
    assert end.manifest.format_version == 3
    stored = safetensors.torch.load_file(FIXTURE / "step-8.safetensors")
    torch.testing.assert_close(
        checkpoint_format.load_weights(end),
        {NAMES[name]: tensor for name, tensor in stored.items()},
        rtol=1e-5,
        atol=1e-6,
    )
    expected, found = (
        [row for row in read_rows(place) if row["step"] > 4 and row["event"] != "sample"]
        for place in (FIXTURE, folder / "run")
    )
    events = [[row.pop("event") for row in rows] for rows in (expected, found)]
    assert events == [["step"] * 4 + ["eval"]] * 2
    for row, expected_row in zip(found, expected, strict=True):
        if "bits_per_byte" not in expected_row:  # format v1 logged it for evaluations only
            assert 0 < row.pop("bits_per_byte") < row["loss"] / math.log(2)
        assert row == pytest.approx(expected_row, rel=1e-5)
