"""`--data-on-gpu`: the same batches bit for bit, the memory that is said, and when it is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_folders import make_folder, read_all

import train_utils
from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.strict_json import read_json
from preflight.corpus.shards import DataFolder
from preflight.device.token_store import TokenStore, choose_place, count_stored_bytes
from preflight.foresight.memory import MemoryOptions, build_batch_curve, estimate_memory
from preflight.modes import check, train
from preflight.settings import ModelConfig, TrainingSettings
from train_utils import BatchLoader

SHARDS = [70, 1, 300, 129]
KINDS = {"narrow": ("u2", 32_768), "gpt2": ("u2", 65_536), "wide": ("u4", 200_019)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataFolder]:
    root = tmp_path_factory.mktemp("tokens")
    made = {name: make_folder(root / name, SHARDS, *kind) for name, kind in KINDS.items()}
    assert read_all(made["gpt2"]).max() > 2**15, "ids that an int16 does not hold"
    assert read_all(made["wide"]).max() > 2**16
    return made


@pytest.fixture(scope="module", autouse=True)
def _read_little_and_close_at_once() -> Iterator[None]:
    """A loader that is closed waits for its thread, which may be waiting for room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_utils, "_POLL_SECONDS", 0.001)
        patch.setattr(train_utils, "_CHUNK_TOKENS", 2000)  # many chunks of few tokens
        yield


def take(
    data: DataFolder, n_batches: int, **values: Any
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int, int]:
    with BatchLoader(data, "train", **values) as loader:
        return [loader.next_batch() for _ in range(n_batches)], loader.cursor, loader.n_windows


@given(
    kind=st.sampled_from(list(KINDS)),
    context=st.integers(1, 600),
    overlap=st.one_of(st.just(0.0), st.floats(0, 0.95)),
    batch_size=st.integers(1, 40),
    cursor=st.integers(0, 1500),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_are_those_of_the_disk(
    folders: dict[str, DataFolder],
    device: str,
    kind: str,
    context: int,
    overlap: float,
    batch_size: int,
    cursor: int,
    seed: int,
) -> None:
    values: dict[str, Any] = {
        "context_length": context,
        "overlap": overlap,
        "batch_size": batch_size,
        "cursor": cursor,
        "seed": seed,
        "device": device,
    }
    disk, *of_disk = take(folders[kind], 6, **values)
    stored, *of_stored = take(folders[kind], 6, on_device=True, **values)
    assert of_disk == of_stored
    for one, other in zip(disk, stored, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype == torch.int64
            assert b.is_contiguous()
            assert a.device == b.device
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_it_takes_is_the_memory_that_is_said(
    folders: dict[str, DataFolder], kind: str
) -> None:
    data = folders[kind]
    with BatchLoader(
        data, "train", batch_size=1, context_length=9, seed=1, device="cpu", on_device=True
    ) as loader:
        loader.next_batch()
        rows: Any = loader._rows
        held = rows._store._ids.nbytes + rows._starts.nbytes
        n_windows = loader.n_windows
    said = count_stored_bytes(data.train.n_tokens, data.vocab_size, n_windows)
    assert held == said == sum(SHARDS) * int(KINDS[kind][0][1]) + 8 * n_windows


def test_all_ids_of_sixteen_bits_come_back() -> None:
    store = TokenStore(2**16, 2**16, torch.device("cpu"))
    ids = torch.arange(2**16)
    store.fill(0, ids[:40_000])
    store.fill(40_000, ids[40_000:])
    assert torch.equal(store.gather(torch.tensor([0]), 2**16)[0], ids)


def test_faults_of_the_data_are_told_at_once(folders: dict[str, DataFolder]) -> None:
    values: dict[str, Any] = {"batch_size": 1, "context_length": 9, "seed": 1, "device": "cpu"}
    small = dataclasses.replace(folders["gpt2"], vocab_size=100)
    with pytest.raises(PreflightError, match="token id") as caught:
        BatchLoader(small, "train", on_device=True, **values)
    assert caught.value.code == ExitCode.DATA
    shard = folders["gpt2"].train.shards[2]
    changed = dataclasses.replace(shard, signature=(1, 1))
    train_part = dataclasses.replace(folders["gpt2"].train, shards=(changed,))
    bad = dataclasses.replace(folders["gpt2"], train=train_part)
    with pytest.raises(PreflightError, match="changed while it was in use"):
        BatchLoader(bad, "train", on_device=True, **values)


# ---- the choice ---------------------------------------------------------------------------------


def test_auto_chooses_cuda_and_less_than_a_tenth() -> None:
    for device_type, n_bytes, free, expected in (
        ("cuda", 99, 1000, True),
        ("cuda", 100, 1000, False),
        ("cuda", 1, 0, False),
        ("cpu", 1, 10**9, False),
        ("mps", 1, 10**9, False),
    ):
        place = choose_place("auto", device_type, n_bytes, free)
        assert place.on_device is expected
        assert place.n_bytes == (n_bytes if expected else 0)
        assert place.note == f"training data: {place.why}"
    for device_type in ("cuda", "cpu"):
        assert choose_place("yes", device_type, 10**6, 10).on_device
        assert not choose_place("no", device_type, 1, 10**9).on_device


MODEL = ModelConfig(
    vocab_size=500, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_predicted_memory_grows_by_the_data(device_type: str) -> None:
    training = TrainingSettings(batch_size=4)
    options = MemoryOptions(torch.float32, device_type)
    with_data = dataclasses.replace(options, data_bytes=10**9)
    plain, stored = (estimate_memory(MODEL, training, o) for o in (options, with_data))
    assert stored.required_bytes == plain.required_bytes + 10**9
    assert stored.items.pop("training data") == 10**9
    assert stored.items == plain.items
    for phase, size in plain.phases.items():
        assert stored.phases[phase] == size + (0 if phase == "resume" else 10**9)
    curve = build_batch_curve(MODEL, training, with_data)
    assert curve(4).required_bytes == stored.required_bytes


def read_weights(folder: str) -> bytes:
    return Path(folder, "milestones/checkpoint-6/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_is_the_same_and_tells_where_its_data_is(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "auto": "training data: read from disk (a copy in memory gains nothing on cpu)\n",
        "yes": "training data: in the memory of the device (",
        "no": "training data: read from disk (as asked)\n",
    }
    weights = set()
    for asked, line in told.items():
        assert train.run(make_config(output_dir=asked, max_steps=6, data_on_gpu=asked)) == 0
        assert line in capsys.readouterr().err
        weights.add(read_weights(asked))
    assert len(weights) == 1


def test_check_tells_the_choice_for_a_card_that_is_not_here(make_config: MakeConfig) -> None:
    needed = {}
    for asked in ("auto", "no"):
        assert check.run(make_config(target_gpu="H100", data_on_gpu=asked)) == 0
        rows = read_json(Path("training_output/check_report.json"))["memory_analysis"]
        needed[asked] = rows
    assert needed["auto"]["training_data"].startswith("in the memory of the device (")
    assert needed["no"]["training_data"] == "read from disk (as asked)"
    size = needed["auto"]["training_data_bytes"]
    assert needed["auto"]["needed_bytes"] - needed["no"]["needed_bytes"] == size > 10_000
